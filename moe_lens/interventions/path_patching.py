"""Path patching: what one sender does to a receiver along the paths that are left open.

The run is the clean one. At the chosen positions a sender's output is replaced by what it was in a corrupted run, and
the change is followed through the stream to a receiver: the logits, or a router. What lies between is held or
recomputed by a rule, `freeze`:

    freeze       attention layers   MoE layers                                       dense layers
    attention    clean outputs      recomputed, routing included                     recomputed
    routing      clean outputs      recomputed under the clean choice and weights    recomputed
    all          clean outputs      clean outputs                                    clean outputs

With `all` only the direct path through the residual stream is left, so that a router's logits change by the readout of
what was replaced, and by the norm's scale. The gate of shared experts is no routing: it is recomputed with them.

Every rule holds attention, so no position reads another: the change at a position goes on at that position alone. So
only the places where the sender's outputs differ are run, each as a sequence of one token that passes through the
model's own norms, MLPs, routers and unembedding, from the sender's layer on, with the clean attention outputs added.
Where a sender wrote the same in both runs, its effect is zero without a run.

Source: Wang et al. 2023, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small"
(arXiv:2211.00593), section 3.1 and appendix B, whose rule is `attention`; toward routers as in "Understanding
Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache

from moe_lens.interventions.clean_run import require_no_hooks
from moe_lens.interventions.path_result import PathPatching, RouterChange
from moe_lens.interventions.path_run import FREEZES, CleanPaths, Freeze, batches, values_at
from moe_lens.interventions.path_senders import LOGITS, Points, Sender, receiver_depth, senders_of
from moe_lens.interventions.positions import Positions, patched_places
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import require_all_layers
from moe_lens.model.text import Text
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.rank_shift import rank_shift

Tokens = Int[Tensor, "batch pos"] | Text
Metric = Callable[[Tensor], Any]

_LOGITS_AT_ONCE, _MOST_PAIRS = 2**26, 4096
"""How many logits, and how many pairs of a sender and a place, one pass makes at most."""


def path_patching_hooks(
    model: HookedMoE, senders: str | Sequence[str], receiver: str | int | Sequence[str | int] = LOGITS
) -> list[str]:
    """The hook names that `path_patch` reads of the corrupted run: a `names_filter` for its cache.

    Raises:
        ValueError: as `path_patch` for senders and receivers.
    """
    chosen = senders_of(model.cfg, senders, _checked_receivers(model, receiver))
    return list(dict.fromkeys(name for sender in chosen for name in sender.parts))


@torch.no_grad()
def path_patch(
    model: HookedMoE,
    tokens: Tokens,
    corrupted_cache_or_tokens: ActivationCache | Mapping[str, Tensor] | Tokens,
    senders: str | Sequence[str],
    *,
    receiver: str | int | Sequence[str | int] = LOGITS,
    freeze: Freeze = "attention",
    positions: Positions = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    metric: Metric | None = None,
    keep_router_logits: bool = False,
    verbose: bool = False,
) -> PathPatching:
    """Replace each sender's output, one at a time, by that of a corrupted run, and see what receivers make of it.

    What senders write is held for both runs at the replaced places. For experts it is layers x places x k x d_model
    numbers a run: for OLMoE in float32 1 MiB a place, so that `positions` matter; with the logits as receiver, the
    clean ones of the whole batch are held too.

    Args:
        model: run without gradients, and without hooks of its own.
        tokens: the clean prompts.
        corrupted_cache_or_tokens: prompts whose tokens stand in the same places; or the cache of their run, with at
            least `path_patching_hooks`.
        senders: a name (`A2H1`, `A2`, `M1E9`, `M1S`, `M1`, `embed`), several, or all of a kind that come before the
            receiver: `"heads"`, `"experts"`, `"layers"`.
        receiver: `"logits"`; a router by its layer (`"M3"`, or 3); or several of these.
        freeze: what lies between; see above.
        positions: where the output is replaced: a column of every row (negative from the end of the batch's columns),
            one for each row, or a bool mask `[batch, pos]`; None is every real token. Padding raises.
        attention_mask: of the tokens, and of the corrupted ones: true where they are real.
        metric: of the logits `[batch, pos, d_vocab]`: one number, or one for each row. Needed for the logits.
        keep_router_logits: keep the changes of router logits, not only what is measured of them.
        verbose: show a progress bar.

    Returns:
        For the logits each sender's effect on the metric; for routers what is measured of the change of their logits.

    Raises:
        ValueError: no such sender or receiver; a sender after all receivers; no such position; padding; runs that do
            not line up; a metric without logits or logits without a metric; a metric that is NaN; router logits
            that are not finite; a model that carries hooks; a streamed model.
        KeyError: the cache lacks a hook, which is named.
    """
    if freeze not in FREEZES:
        raise ValueError(f"freeze={freeze!r} must be one of {', '.join(map(repr, FREEZES))}")
    receivers = _checked_receivers(model, receiver)
    chosen = senders_of(model.cfg, senders, receivers)
    if (metric is not None) != (LOGITS in receivers):
        said = "needs" if metric is None else "does not go with"
        raise ValueError(f"receiver={receiver!r} {said} metric=, which is a function of the logits")
    require_no_hooks(model)
    require_all_layers(model, "path_patch")
    tokens, mask = model.tokens_and_mask(tokens, attention_mask)
    at = patched_places(positions, real_tokens(tokens, mask))
    corrupted = _corrupted_points(model, corrupted_cache_or_tokens, tokens, mask, at, chosen)
    clean = CleanPaths.of(model, tokens, mask, at, receivers, freeze, chosen)
    effects = _Effects(clean, chosen, metric, keep_router_logits)
    at_once = max(1, min(_MOST_PAIRS, _LOGITS_AT_ONCE // model.cfg.d_vocab))
    with tqdm(total=len(chosen), disable=not verbose, desc="path patching", unit="sender") as bar:
        for batch in batches(clean, corrupted, chosen, at_once):
            # Where a component writes what it did, nothing changes.
            read = clean.follow(batch, at_once) if batch.n_pairs else {}
            for sender, places, logits in batch.apart(read):
                effects.add(sender, places, logits)
            bar.update(len(batch.senders))
    return effects.result(clean.null_change(at_once))


# ---- input ----


def _checked_receivers(model: HookedMoE, receiver: str | int | Sequence[str | int]) -> tuple[str, ...]:
    """Raises:
    ValueError: no such receiver, one that comes twice, or none.
    """
    given = (receiver,) if isinstance(receiver, str | int) else tuple(receiver)
    names = tuple(f"M{name}" if isinstance(name, int) else name for name in given)
    there = (LOGITS, *(f"M{layer}" for layer in model.cfg.moe_layers))
    for name in names:
        if name not in there:
            raise ValueError(f"there is no receiver {name!r}; {model.cfg.model_name} has {', '.join(there)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"receivers must be named, each once, not {names}")
    return names


def _corrupted_points(
    model: HookedMoE,
    given: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    at: Bool[Tensor, "batch pos"],
    senders: Sequence[Sender],
) -> Points:
    """What the senders wrote in the corrupted run, at the places that are replaced.

    Raises:
        ValueError: the corrupted run does not have the clean one's shape or padding.
        KeyError: a cache lacks a hook.
    """
    names = list(dict.fromkeys(name for sender in senders for name in sender.parts))
    if isinstance(given, (ActivationCache, Mapping)):
        stored = given.cache_dict if isinstance(given, ActivationCache) else given
        for name in names:
            if name not in stored:
                raise KeyError(f"the corrupted cache lacks {name}; path_patching_hooks lists what is needed")
            if stored[name].shape[:2] != at.shape:
                raise ValueError(
                    f"the corrupted cache must be of the clean tokens' shape {tuple(at.shape)}; its {name} is "
                    f"{tuple(stored[name].shape)}"
                )
        return {name: stored[name].detach()[at.to(stored[name].device)].to(at.device) for name in names}
    other, other_mask = model.tokens_and_mask(given, mask if isinstance(given, Tensor) else None)
    same_padding = (mask is None) == (other_mask is None) and (
        mask is None or other_mask is None or torch.equal(mask, other_mask)
    )
    if other.shape != tokens.shape or not same_padding:
        raise ValueError(
            f"the corrupted prompts {tuple(other.shape)} must have the clean ones' shape {tuple(tokens.shape)} and "
            f"padding, token for token"
        )
    stop = max(sender.layer for sender in senders) + 1
    return values_at(model, other, other_mask, at, names, stop)[0]


# ---- effects ----


class _Effects:
    """Gathers, sender by sender, what becomes of the metric and of the routers' logits.

    Raises:
        ValueError: the metric gives neither one number nor one for each row, or NaN, or edits the logits;
            router logits that are not finite.
    """

    def __init__(
        self, clean: CleanPaths, senders: Sequence[Sender], metric: Metric | None, keep_router_logits: bool
    ):
        self.clean, self.senders, self.metric, self.keep = clean, senders, metric, keep_router_logits
        self.rows, self.columns = clean.at.nonzero(as_tuple=True)
        self.routers = [receiver for receiver in clean.receivers if receiver != LOGITS]
        shape = (len(senders), *clean.at.shape)
        self.changed = torch.zeros(shape, dtype=torch.bool, device=clean.at.device)
        self.clean_metric = (
            torch.tensor(torch.nan) if metric is None else self._measured(clean.logits, "the clean run")
        )
        self.effect = self.clean_metric.new_zeros(len(senders), *self.clean_metric.shape)
        blank = torch.full(shape, torch.nan, device=clean.at.device)
        self.of_routers = {name: RouterChange(*(blank.clone() for _ in range(4))) for name in self.routers}
        self.kept: dict[str, Tensor] = {}
        if keep_router_logits:
            n_experts = clean.model.cfg.n_experts
            self.kept = {name: blank[..., None].repeat(1, 1, 1, n_experts) for name in self.routers}

    def add(self, index: int, places: Int[Tensor, " changed"], read: Mapping[str, Tensor]) -> None:
        """A sender's, with what the receivers made of it at the places where it differs."""
        rows, columns = self.rows[places], self.columns[places]
        self.changed[index, rows, columns] = True
        if self.metric is not None:
            self.effect[index] = self._effect(index, rows, columns, read)
        for name in self.routers:
            if self.senders[index].depth >= receiver_depth(name):
                continue
            before = self.clean.value(name)
            change = torch.zeros_like(before)
            if len(places):
                change[places] = read[name] - before[places]
            if not bool(change.isfinite().all()):
                raise ValueError(
                    f"logits of the router {name} are not finite in the patch of {self.senders[index].name}"
                )
            shift = rank_shift(before, -change, self.clean.model.cfg.router)
            for values, measured in zip(
                self.of_routers[name], (change.var(dim=-1, correction=0), *shift), strict=True
            ):
                values[index, self.rows, self.columns] = measured
            if self.keep:
                self.kept[name][index, self.rows, self.columns] = change

    def _effect(
        self,
        index: int,
        rows: Int[Tensor, " changed"],
        columns: Int[Tensor, " changed"],
        read: Mapping[str, Tensor],
    ) -> Float[Tensor, "*row"]:
        """What becomes of the metric, which is the clean one where nothing differs."""
        if not len(rows):
            return torch.zeros_like(self.clean_metric)
        # Written into the clean logits and taken out again: a copy for each sender costs more than all else on a CPU.
        logits = self.clean.logits
        assert logits is not None
        clean = logits[rows, columns]
        logits[rows, columns] = read[LOGITS].to(logits.dtype)
        patched = self._measured(logits, f"the patch of {self.senders[index].name}")
        logits[rows, columns] = clean
        return patched - self.clean_metric

    def _measured(self, logits: Tensor | None, what: str) -> Float[Tensor, "*row"]:
        assert self.metric is not None
        assert logits is not None
        version = None if logits.is_inference() else logits._version
        measured = torch.as_tensor(self.metric(logits)).detach()
        if version is not None and version != logits._version:
            raise ValueError("the metric changes the logits in place; it must leave them as they are")
        if measured.shape not in ((), (len(self.clean.at),)):
            raise ValueError(
                f"the metric must give one number, or one for each of {len(self.clean.at)} rows, not a tensor "
                f"{tuple(measured.shape)}"
            )
        if bool(measured.isnan().any()):
            raise ValueError(f"the metric is NaN in {what}")
        # A copy, because a metric may give a view of the logits.
        return measured.to(torch.promote_types(measured.dtype, torch.float32), copy=True)

    def result(self, null_change: float) -> PathPatching:
        return PathPatching(
            senders=tuple(sender.name for sender in self.senders),
            receivers=self.clean.receivers,
            freeze=self.clean.freeze,
            positions=self.clean.at,
            changed=self.changed,
            clean_metric=None if self.metric is None else self.clean_metric,
            effect=None if self.metric is None else self.effect,
            routers=self.of_routers,
            router_logit_changes=self.kept,
            null_change=null_change,
        )

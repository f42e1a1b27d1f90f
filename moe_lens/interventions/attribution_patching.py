"""Attribution patching: what patching every head and every expert would do, to first order, from one gradient.

Patching a sender c (a head's z, an expert's contribution) changes a metric m of the run by approximately

    <dm/dc, c' - c>          the gradient, and c, in the run that is patched; c' in the other run

which one backward pass gives for all senders at once (Nanda, "Attribution Patching: Activation Patching At Industrial
Scale", 2023; Kramár et al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components",
arXiv:2403.00745). A routed expert is a sender by identity: where it is active in one run alone, its
contribution in the other is nothing, so that c' - c is minus c, or c'.

What it misses, and so why `exact` measures the same effects by activation patching beside it:
  - Saturation: where a softmax that reads the sender (attention further on) is nearly 0 or 1, its gradient is nearly 0
    however much a whole patch would move it (AtP*): false negatives.
  - Cancellation: where the sender's direct effect and its effects through later components are large and opposite, the
    small sum is dominated by the linearisation's error (AtP*): false negatives, or the wrong sign.
  - The choice of experts is held constant: top-k has no gradient. Weights of the chosen ones do change with their
    probabilities, but what a patch does by changing a choice further on is not there at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.interventions.arguments import Layers, layer_numbers
from moe_lens.interventions.attribution_result import AttributionPatching
from moe_lens.interventions.patch_sites import CONTRIBUTIONS, INDICES, MLP_OUT, find_site
from moe_lens.interventions.patcher import Metric, Patcher, checked_metric
from moe_lens.interventions.path_senders import KINDS, all_senders
from moe_lens.interventions.positions import Positions, patched_places
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import require_gradients_of
from moe_lens.model.text import Text
from moe_lens.routing.arguments import few, positive_integer

SenderKind = Literal["heads", "experts"]
Direction = Literal["corrupted", "clean"]
Z, SHARED = "attn.hook_z", "mlp.hook_shared_out"
_READ: dict[SenderKind, tuple[str, ...]] = {"heads": (Z,), "experts": (CONTRIBUTIONS, INDICES, SHARED)}
"""The points that each kind of sender is read from; of these a model may lack the shared experts'."""


@dataclass(frozen=True)
class _Sender:
    """One sender: its name, and the patch of it as `activation_patch` takes it."""

    name: str
    activation: str
    cell: Mapping[str, int]


def attribution_patch(
    model: HookedMoE,
    clean_tokens: Int[Tensor, "batch pos"] | Text,
    corrupted_tokens: Int[Tensor, "batch pos"] | Text,
    metric: Metric,
    *,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    senders: Sequence[SenderKind] | SenderKind = ("heads", "experts"),
    direction: Direction = "corrupted",
    by_position: bool = False,
    exact: int | Literal["all"] | None = 10,
    layers: Layers = None,
    positions: Positions = None,
    seed: int = 0,
    verbose: bool = False,
) -> AttributionPatching:
    """Estimate the effect of patching every head and expert, from two forward passes and one backward pass.

    Only real tokens are patched (see `activation_patch`), all rows of the batch together. The gradient is of
    activations alone, no weight's is computed. Hooks that are on the model act in all runs.

    For experts both runs' contributions are held, each layers x tokens x k x d_model numbers, beside what the backward
    pass needs: for OLMoE in float32 2 MiB a token, so 4 GiB for 100 prompts of 20 tokens. `layers` makes it less.

    Args:
        clean_tokens, corrupted_tokens: of the same shape.
        metric: from logits to one number, differentiable. Attributions are in its units.
        attention_mask: of both, true where real.
        senders: `"heads"` (`A3H5`: z of every head) and `"experts"` (`M3E9`: every routed expert by identity; `M3S`:
            the shared experts).
        direction: the run that is patched: `"corrupted"` puts clean activations into the corrupted run (what restores
            the metric), with the gradient there; `"clean"` puts corrupted activations into the clean run (what breaks
            it).
        by_position: estimate each position (column of the batch) apart; else the sum over positions, which is the
            estimate for the patch of all of them together.
        exact: by how many activation patches the estimate is judged, each a forward pass: `"all"`; n, the n largest
            attributions and n drawn at random of the others; or None. A sender that writes the same in both runs has
            an effect of exactly 0 and is not counted; one that differs by rounding alone is.
        layers: those whose senders are wanted; None is all.
        positions: the places to patch: a column of every row (negative from the end of the batch's columns), one for
            each row, or a bool mask `[batch, pos]`; None is every real token. Padding raises.
        seed: of the random draw.
        verbose: show a progress bar of the exact patches.

    Raises:
        ValueError: an unknown kind of sender, direction, layer or position; token batches of other shapes; a metric
            that is no single number, NaN, or without a gradient; a streamed model.
        RuntimeError: called in `torch.inference_mode()`, where there are no gradients.
    """
    kinds = (senders,) if isinstance(senders, str) else tuple(senders)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(_READ):
        raise ValueError(f"senders={senders!r} must name 'heads', 'experts' or both, each once")
    if direction not in ("corrupted", "clean"):
        raise ValueError(f"direction={direction!r} must be 'corrupted' or 'clean', the run that is patched")
    if exact is not None and exact != "all":
        exact = positive_integer(exact, "exact")
    require_gradients_of(model, "attribution patching")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attribution patching needs gradients, and torch.inference_mode() has none")
    clean, mask = model.tokens_and_mask(clean_tokens, attention_mask)
    corrupted, corrupted_mask = model.tokens_and_mask(corrupted_tokens, attention_mask)
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean tokens {tuple(clean.shape)} and corrupted tokens {tuple(corrupted.shape)} must have the same shape"
        )
    real, corrupted_real = (
        torch.ones_like(clean, dtype=torch.bool) if m is None else m for m in (mask, corrupted_mask)
    )
    if not torch.equal(real, corrupted_real):
        raise ValueError(
            "clean and corrupted texts are of other lengths: they must be padded at the same places"
        )
    places = patched_places(positions, real)
    patched, other = (corrupted, clean) if direction == "corrupted" else (clean, corrupted)
    found = _senders(model, kinds, layers)
    used = sorted({sender.cell["layer"] for sender in found})

    with torch.no_grad():
        names = [
            f"blocks.{layer}.{point}"
            for layer in used
            for kind in kinds
            for point in _READ[kind]
            if f"blocks.{layer}.{point}" in model.hook_dict
        ]
        logits, source = model.run_with_cache(
            other, attention_mask=mask, names_filter=names, return_cache_object=False
        )
        assert isinstance(source, dict)
        other_metric = float(checked_metric(metric(logits), "the run that is patched from"))
    base, gradients, baseline = _differentiated(model, patched, mask, metric, names, used)

    columns = places.any(dim=0).nonzero()[:, 0].tolist() if by_position else None
    estimates = _estimates(model, found, base, source, gradients, places)
    attributions = estimates[:, columns] if columns is not None else estimates.sum(dim=1, keepdim=True)
    result = AttributionPatching(
        senders=tuple(sender.name for sender in found),
        layers=tuple(sender.cell["layer"] for sender in found),
        positions=None if columns is None else tuple(columns),
        attributions=attributions.double().cpu().numpy(),
        exact=np.full(attributions.shape, np.nan),
        measured=np.full(attributions.shape, "", dtype=object),
        baseline=baseline,
        other_metric=other_metric,
        direction=direction,
    )
    if exact is not None:
        patchers = {}
        for activation, axes in {sender.activation: tuple(sender.cell) for sender in found}.items():
            with_point = [layer for layer in used if f"blocks.{layer}.{activation}" in names]
            site = find_site(model, activation, (*axes, "pos") if by_position else axes, with_point)
            patchers[activation] = Patcher(model, patched, mask, source, metric, site, places)
        _measure(result, found, patchers, exact, seed, verbose)
    return result


def _senders(model: HookedMoE, kinds: Sequence[SenderKind], layers: Layers) -> list[_Sender]:
    """All senders of some kinds in some layers, in the order in which they write."""
    n_layers = model.cfg.n_layers
    chosen = range(n_layers) if layers is None else layer_numbers(layers)
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer} is not among this model's, 0 to {n_layers - 1}")
    wanted = [kind for name in kinds for kind in KINDS[name]]
    found: list[_Sender] = []
    for sender in all_senders(model.cfg):
        if sender.kind in wanted and sender.layer in chosen:
            activation = {"head": Z, "expert": CONTRIBUTIONS, "shared": SHARED}[sender.kind]
            place = {} if sender.index is None else {sender.kind: sender.index}
            found.append(_Sender(sender.name, activation, {"layer": sender.layer} | place))
    if not found:
        raise ValueError(
            f"layers={layers} have no sender of kind {few(kinds)}; layers with experts: {few(model.cfg.moe_layers)}"
        )
    return found


# ---- two forward passes, one backward ----


@contextmanager
def _weights_held(model: HookedMoE) -> Iterator[None]:
    """Within this no weight asks for a gradient, so that nothing is kept for one."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _differentiated(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    metric: Metric,
    names: Sequence[str],
    layers: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """A run's values at some points, the metric's gradients at those of heads and at what MoE layers write, and the
    metric."""
    values: dict[str, Tensor] = {}

    def begin(value: Tensor, hook: Any) -> Tensor:
        # The graph starts where the first sender's layer does.
        return value.detach().clone().requires_grad_()

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    # What any of a layer's experts adds has the gradient of their sum.
    written = [f"blocks.{layer}.{MLP_OUT}" for layer in layers if f"blocks.{layer}.{CONTRIBUTIONS}" in names]
    wanted = [*(name for name in names if name.endswith(Z)), *written]
    hooks = [(f"blocks.{min(layers)}.hook_resid_pre", begin)]
    with torch.enable_grad(), _weights_held(model):
        logits = model.run_with_hooks(
            tokens,
            attention_mask=mask,
            fwd_hooks=[*hooks, *((name, keep) for name in dict.fromkeys([*names, *wanted]))],
        )
        number = checked_metric(metric(logits), "the run that is patched")
        if not number.requires_grad:
            raise ValueError("the metric has no gradient: it must be differentiable in the logits")
        found = torch.autograd.grad(number, [values[name] for name in wanted], materialize_grads=True)
    gradients = {name: gradient.float() for name, gradient in zip(wanted, found, strict=True)}
    return {name: value.detach() for name, value in values.items()}, gradients, float(number.detach())


def _estimates(
    model: HookedMoE,
    senders: Sequence[_Sender],
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    places: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "sender pos"]:
    """Gradient times difference of every sender, summed over rows."""
    by_site: dict[tuple[int, str], Float[Tensor, "batch pos *sender"]] = {}
    for layer, activation in dict.fromkeys((sender.cell["layer"], sender.activation) for sender in senders):
        name, indices = f"blocks.{layer}.{activation}", f"blocks.{layer}.{INDICES}"
        if activation == Z:
            change = source[name].float() - base[name].float()
            products = einsum(change, gradients[name], "b p head d, b p head d -> b p head")
        elif activation == SHARED:
            change = source[name].float() - base[name].float()
            products = einsum(change, gradients[f"blocks.{layer}.{MLP_OUT}"], "b p d, b p d -> b p")[
                ..., None
            ]
        else:
            gradient = gradients[f"blocks.{layer}.{MLP_OUT}"]
            products = gradient.new_zeros(*gradient.shape[:2], model.cfg.n_experts)
            for values, sign in ((source, 1), (base, -1)):
                slots = einsum(values[name].float(), gradient, "b p k d, b p d -> b p k")
                products.scatter_add_(2, values[indices], sign * slots)
        # Padding has values too, which mean nothing.
        by_site[layer, activation] = products.masked_fill(~places[..., None], 0).sum(dim=0)
    return torch.stack(
        [
            by_site[s.cell["layer"], s.activation][:, s.cell.get("head", s.cell.get("expert", 0))]
            for s in senders
        ]
    )


# ---- the same by activation patching ----


def _differing(
    senders: Sequence[_Sender], patchers: Mapping[str, Patcher], by_position: bool
) -> Bool[np.ndarray, "sender pos"]:
    """Whether a sender writes anything else in the other run, where it would be patched."""
    by_site: dict[tuple[int, str], Tensor] = {}
    rows = []
    for sender in senders:
        layer, patcher = sender.cell["layer"], patchers[sender.activation]
        if (layer, sender.activation) not in by_site:
            differs = patcher.differs[layer]
            if sender.activation != CONTRIBUTIONS:
                differs = differs.any(dim=-1)
            differs = differs.view(*patcher.places.shape, -1) & patcher.places[..., None]
            by_site[layer, sender.activation] = differs.any(dim=0)
        index = sender.cell.get("head", sender.cell.get("expert", 0))
        rows.append(by_site[layer, sender.activation][:, index])
    table = torch.stack(rows)
    columns = next(iter(patchers.values())).labels("pos")
    return (table[:, list(columns)] if by_position else table.any(dim=1, keepdim=True)).cpu().numpy()


def _measure(
    result: AttributionPatching,
    senders: Sequence[_Sender],
    patchers: Mapping[str, Patcher],
    exact: int | Literal["all"],
    seed: int,
    verbose: bool,
) -> None:
    """Fill in the exact effects of those asked for, and why each was measured."""
    by_position = result.positions is not None
    differing = _differing(senders, patchers, by_position)
    result.exact[~differing] = 0.0
    result.measured[~differing] = "no difference"
    candidates = np.flatnonzero(differing)
    if exact == "all":
        chosen = {int(i): "all" for i in candidates}
    else:
        size = np.abs(result.attributions.ravel()[candidates])
        order = candidates[np.argsort(-size, kind="stable")]
        largest, rest = order[:exact], np.sort(order[exact:])
        drawn = np.random.default_rng(seed).choice(rest, size=min(exact, len(rest)), replace=False)
        chosen = {int(i): "largest" for i in largest} | {int(i): "random" for i in np.sort(drawn)}
    for i, why in tqdm(chosen.items(), desc="exact patches", disable=not verbose):
        row, column = divmod(i, result.exact.shape[1])
        sender = senders[row]
        cell = dict(sender.cell) | ({"pos": result.positions[column]} if result.positions is not None else {})
        patcher = patchers[sender.activation]
        result.exact[row, column] = float(patcher.value(cell)) - float(patcher.baseline)
        result.measured[row, column] = why

"""Routing decisions of a few documents, packed for the page that shows them one by one (`moe_lens.routing_page`).

The scores S[sender, position, expert] are those of `router_logit_attrs`, exact before they are stored as 16-bit
integers: S = q * scale, with one float32 scale for each (router, position), the largest size of a score there over
32,767. So no stored score is off by more than half a scale; the page says the largest error that was made. Logits and
routing weights are stored as float32. A document is cut to its first positions where the page would grow too large,
which changes nothing in them: no position depends on a later one.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.corpus import Document, TokenBatches, bos_by_default, token_batches
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.routing.attribution import (
    RouterLogitAttrs,
    attribution_hooks,
    router_logit_attrs,
    with_rounding,
)
from moe_lens.routing.readout import check_receiver
from moe_lens.routing.rounding import stream_rounds
from moe_lens.routing.senders import ROUNDING, Senders, senders_before

BYTE_BUDGET = 4_000_000
"""The most bytes of data that a page holds, unless told otherwise."""

MINIMUM_POSITIONS = 32
"""Rather than cut documents shorter than this, a page leaves out a granularity, and then a document."""

N_DOCUMENTS = 6
PAGE_GRANULARITIES = ("layer", "head", "expert")
"""Those that the page can show: sources and neurons are too many."""

_LEVELS = 32_767
# The kind of sender group that each finer granularity divides.
_DIVIDED = {"head": "heads", "expert": "experts"}
# Room for the numbers that are only known after the scores, as JSON.
_NUMBERS = 200


@dataclass(frozen=True, eq=False)
class RoutingDecisions:
    """The data of the page.

    Attributes:
        json: as it stands in the page, with nothing in it that HTML could read as a tag. `assets/routing_page.js`
            reads it.
        by: the granularities, `"layer"` first.
        left_out: those asked for that did not fit.
        n_documents: how many documents.
        n_positions: how many positions of all documents together.
        quantisation_error: the largest |stored - exact score|, in logits.
        completeness_error: the largest of `RouterLogitAttrs.completeness_error`, of the scores before they are stored.
        rounding_ratio: likewise; None in float32.
        model_logit_difference: likewise, in logits.
    """

    json: str
    by: tuple[str, ...]
    left_out: tuple[str, ...]
    n_documents: int
    n_positions: int
    quantisation_error: float
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float


@torch.no_grad()
def routing_decisions(
    model: HookedMoE,
    batches_or_documents: TokenBatches | Iterable[Any] | Tensor | str,
    *,
    n_documents: int = N_DOCUMENTS,
    by: Sequence[str] = PAGE_GRANULARITIES,
    receivers: Sequence[int] | None = None,
    max_positions: int | None = None,
    byte_budget: int = BYTE_BUDGET,
) -> RoutingDecisions:
    """Take the routing decisions of a few documents apart, and pack them for a page.

    The shortest documents of at least `MINIMUM_POSITIONS` tokens are taken, and then the longest of the others. All
    are cut to the same number of positions where the budget asks for it. Where that would leave fewer than
    `MINIMUM_POSITIONS`, the bulkiest granularity is left out first, then the longest document.

    Args:
        batches_or_documents: a text or several; `Document`s; a `TokenBatches`; tokens `[batch, pos]`; or batches, each
            tokens or a tuple of tokens, the mask of real ones (or None) and, if there are, their `Document`s.
        n_documents: how many to show, if there are as many.
        by: `"layer"`, `"head"`, `"expert"`; the first is always there.
        receivers: MoE layers; None is all of them.
        max_positions: the most positions of a document; None leaves that to the budget.
        byte_budget: of the data in the page.

    Raises:
        ValueError: a granularity that the page cannot show; a receiver that is no MoE layer; no documents; a budget
            that not even one position fits.
    """
    unknown = [name for name in by if name not in PAGE_GRANULARITIES]
    if unknown:
        raise ValueError(f"by={unknown[0]!r} is none that the page shows: {', '.join(PAGE_GRANULARITIES)}")
    receivers = list(model.cfg.moe_layers if receivers is None else dict.fromkeys(receivers))
    for receiver in receivers:
        check_receiver(model, receiver)
    if not receivers or n_documents < 1 or (max_positions is not None and max_positions < 1):
        raise ValueError("the page needs at least one receiver, one document and one position")
    rows = _chosen(_rows(model, batches_or_documents), n_documents)
    by = ["layer", *(granularity for granularity in ("head", "expert") if granularity in by)]
    plan = _Plan.make(model, rows, by, receivers, max_positions, byte_budget).within_budget()
    payload = plan.skeleton()
    errors = _Errors()
    with _weights_of_heads(plan):
        for cache, document in zip(_caches(plan), payload["documents"], strict=True):
            _fill(plan, cache, document, errors)
    payload["errors"] = {
        name: None if value is None else float(f"{value:.3g}") for name, value in vars(errors).items()
    }
    text = _json(payload)
    assert len(text) <= byte_budget
    return RoutingDecisions(
        json=text,
        by=plan.by,
        left_out=plan.left_out,
        n_documents=len(plan.rows),
        n_positions=sum(min(len(row.tokens), plan.n_positions) for row in plan.rows),
        quantisation_error=errors.quantisation,
        completeness_error=errors.completeness,
        rounding_ratio=errors.rounding,
        model_logit_difference=errors.model_logits,
    )


# ---- which documents, and how much of them ----


class _Row(NamedTuple):
    """A document: its real tokens, and each of them as text."""

    name: str
    topic: str
    tokens: Int[Tensor, " pos"]
    texts: list[str]


def _rows(model: HookedMoE, given: Any) -> list[_Row]:
    if isinstance(given, Tensor):
        given = [given]
    elif not isinstance(given, TokenBatches):
        given = [given] if isinstance(given, str) else list(given)
        if given and all(isinstance(item, str | Document) for item in given):
            given = _tokenised(model, given)
    batches: Iterable[Any] = given
    rows: list[_Row] = []
    for batch in batches:
        tokens, mask, documents = _parts(batch)
        for i, ids in enumerate(tokens):
            real = ids if mask is None else ids[mask[i].bool()]
            document = documents[i] if documents else None
            name, topic = f"row {len(rows)}", ""
            if isinstance(document, Document):
                name, topic = document.name, document.topic
            if len(real):
                rows.append(_Row(name, topic, real, []))
    if not rows:
        raise ValueError("there are no documents to show")
    return rows


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """A batch's tokens, mask and documents, None where it has none."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    tokens, mask, documents, *_ = (*parts, None, None)
    return tokens, mask, documents


def _tokenised(model: HookedMoE, given: Sequence[str | Document]) -> TokenBatches:
    documents = [
        item if isinstance(item, Document) else Document(f"text {i}", "", item)
        for i, item in enumerate(given)
    ]
    return token_batches(model, documents, batch_size=8, prepend_bos=bos_by_default(model), truncate=True)


def _chosen(rows: list[_Row], n: int) -> list[_Row]:
    lengths = [len(row.tokens) for row in rows]
    order = sorted(
        range(len(rows)),
        key=lambda i: (
            lengths[i] < MINIMUM_POSITIONS,
            lengths[i] if lengths[i] >= MINIMUM_POSITIONS else -lengths[i],
        ),
    )
    return [rows[i] for i in sorted(order[:n])]


class _Senders(NamedTuple):
    """What is stored of one router at one granularity.

    `layer` stores every sender; a finer granularity stores what it divides: for each divided component its place
    among the layer's senders, how many of its rows are slots of chosen experts, and the names of the others.
    """

    senders: Senders
    divided: tuple[tuple[int, int, tuple[str, ...]], ...]

    @property
    def n_rows(self) -> int:
        return sum(slots + len(names) for _, slots, names in self.divided)

    @staticmethod
    def of(model: HookedMoE, receiver: int, by: str) -> _Senders:
        senders = senders_before(model.cfg, receiver, by)
        if stream_rounds(model.cfg.dtype):
            senders = with_rounding(senders)
        divided = []
        for place, group in enumerate(senders.groups):
            names = tuple(run.name(i) for run in group.names for i in range(run.count))
            if by == "layer" or group.component == ROUNDING or group.kind == "heads":
                divided.append((place, 0, names))
            elif group.kind == "experts":
                divided.append((place, model.cfg.top_k, names[model.cfg.n_experts :]))
        if by != "layer" and not any(group.kind == _DIVIDED[by] for group in senders.groups):
            divided = []
        return _Senders(senders, tuple(divided))


@dataclass(frozen=True)
class _Plan:
    """What goes into the page. Its size is known before anything is computed."""

    model: HookedMoE
    rows: list[_Row]
    by: tuple[str, ...]
    left_out: tuple[str, ...]
    n_dropped: int
    receivers: list[int]
    n_positions: int
    budget: int
    stored: dict[tuple[int, str], _Senders]

    @staticmethod
    def make(
        model: HookedMoE,
        rows: list[_Row],
        by: list[str],
        receivers: list[int],
        max_positions: int | None,
        budget: int,
    ) -> _Plan:
        longest = max(len(row.tokens) for row in rows)
        n_positions = longest if max_positions is None else min(longest, max_positions)
        rows = [row._replace(texts=_texts(model, row.tokens[:n_positions])) for row in rows]
        stored = {(r, g): _Senders.of(model, r, g) for r in receivers for g in by}
        return _Plan(model, rows, tuple(by), (), 0, receivers, n_positions, budget, stored)

    @property
    def routers(self) -> list[int]:
        """The MoE layers whose choice is needed: those shown, and those that send to them."""
        return [layer for layer in self.model.cfg.moe_layers if layer <= max(self.receivers)]

    def _but(self, **changes: Any) -> _Plan:
        return _Plan(**{**self.__dict__, **changes})

    def within_budget(self) -> _Plan:
        """The plan that fits."""
        wanted = min(MINIMUM_POSITIONS, self.n_positions)
        plan = self
        while plan._fitting() < wanted and len(plan.by) > 1:
            sizes = {
                g: sum(plan.stored[r, g].n_rows for r in plan.receivers) for g in plan.by if g != "layer"
            }
            bulkiest = max(sizes, key=lambda g: sizes[g])
            plan = plan._but(
                by=tuple(g for g in plan.by if g != bulkiest), left_out=(*plan.left_out, bulkiest)
            )
        while plan._fitting() < wanted and len(plan.rows) > 1:
            longest = max(plan.rows, key=lambda row: len(row.tokens))
            plan = plan._but(
                rows=[row for row in plan.rows if row is not longest], n_dropped=plan.n_dropped + 1
            )
        n_positions = plan._fitting()
        if n_positions == 0:
            raise ValueError(
                f"one position of one document takes {plan._but(n_positions=1).size():,} bytes, more than "
                f"byte_budget={self.budget:,}; raise it, or name fewer receivers"
            )
        return plan._but(n_positions=n_positions)

    def _fitting(self) -> int:
        """The most positions whose data keep to the budget; 0 where not even one does."""
        low, high = 0, self.n_positions
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self._but(n_positions=middle).size() <= self.budget else (low, middle - 1)
            )
        return low

    def size(self) -> int:
        """Bytes of the JSON."""
        cfg = self.model.cfg
        n_bytes = len(_json(self.skeleton())) + _NUMBERS
        for row in self.rows:
            n = min(len(row.tokens), self.n_positions)
            arrays = [n * len(self.routers) * cfg.top_k * size for size in (2, 4)]
            arrays += [n * len(self.receivers) * 4]
            arrays += [n * cfg.n_experts * 4 for _ in self.receivers]
            arrays += [
                n * self.stored[r, g].n_rows * cfg.n_experts * 2 for r in self.receivers for g in self.by
            ]
            n_bytes += sum(4 * -(-size // 3) for size in arrays)
        return n_bytes

    def skeleton(self) -> dict[str, Any]:
        """All of the data but the arrays."""
        cfg = self.model.cfg
        return {
            "experts": cfg.n_experts,
            "top_k": cfg.top_k,
            "grouped": cfg.router.n_groups > 1,
            "by": self.by,
            "left_out": self.left_out,
            "n_dropped": self.n_dropped,
            "budget": self.budget,
            "errors": {},
            "routers": self.routers,
            "receivers": [
                {"layer": r, "stored": {g: self.stored[r, g].divided for g in self.by}}
                for r in self.receivers
            ],
            "documents": [
                {
                    "name": row.name,
                    "topic": row.topic,
                    "length": len(row.tokens),
                    "tokens": row.texts[: self.n_positions],
                    "chosen": "",
                    "weights": "",
                    "scale": "",
                    "logits": [""] * len(self.receivers),
                    "scores": {g: [""] * len(self.receivers) for g in self.by},
                }
                for row in self.rows
            ],
        }


# ---- the numbers ----


class _Errors:
    """The largest so far."""

    def __init__(self) -> None:
        self.quantisation = self.completeness = self.model_logits = 0.0
        self.rounding: float | None = None

    def seen(self, attrs: RouterLogitAttrs) -> None:
        self.completeness = max(self.completeness, attrs.completeness_error)
        self.model_logits = max(self.model_logits, attrs.model_logit_difference)
        if attrs.rounding_ratio is not None:
            self.rounding = max(self.rounding or 0.0, attrs.rounding_ratio)


def _caches(plan: _Plan) -> Iterator[dict[str, Tensor]]:
    """What each document is taken apart from. A model in memory runs one after another when it is asked for; a streamed
    one runs all at once, for it reads its layers each time."""
    names = {
        f"blocks.{r}.mlp.hook_{what}" for r in plan.routers for what in ("expert_indices", "routing_weights")
    }
    for granularity in plan.by:
        names |= set(attribution_hooks(plan.model, plan.receivers, by=granularity))
    batches = [row.tokens[None, : plan.n_positions] for row in plan.rows]
    at_a_time = len(batches) if isinstance(plan.model, StreamedMoE) else 1
    for start in range(0, len(batches), at_a_time):
        caches: list[dict[str, Tensor]] = []

        def listening(batch: CorpusBatch, caches: list[dict[str, Tensor]] = caches) -> Any:
            cache: dict[str, Tensor] = {}
            caches.append(cache)

            def keep(value: Tensor, hook: Any) -> None:
                cache[hook.name] = value.detach()

            return plan.model.listening([(name, keep) for name in names])

        stop = max(plan.receivers) + 1
        run_batches(plan.model, batches[start : start + at_a_time], listening, stop_at_layer=stop)
        yield from caches


def _weights_of_heads(plan: _Plan) -> AbstractContextManager[None]:
    """While open, the weights that heads write with are in memory, where the page shows heads: of a streamed model they
    would be read again for every document and router."""
    if not isinstance(plan.model, StreamedMoE) or "head" not in plan.by:
        return nullcontext()
    return plan.model.copies_in_memory(
        range(max(plan.receivers) + 1), lambda name: name.endswith("attn.o_proj.weight")
    )


def _fill(plan: _Plan, cache: dict[str, Tensor], document: dict[str, Any], errors: _Errors) -> None:
    """Take one document's run apart and put its arrays into the skeleton."""
    model = plan.model
    chosen = {r: cache[f"blocks.{r}.mlp.hook_expert_indices"][0] for r in plan.routers}
    weights = [cache[f"blocks.{r}.mlp.hook_routing_weights"][0].float() for r in plan.routers]
    document["chosen"] = _packed(torch.stack(list(chosen.values())), "<u2")
    document["weights"] = _packed(torch.stack(weights), "<f4")
    scales = []
    for place, receiver in enumerate(plan.receivers):
        parts: dict[str, Float[Tensor, "pos row expert"]] = {}
        logits = None
        for granularity in plan.by:
            attrs = router_logit_attrs(model, cache, receiver=receiver, by=granularity)
            errors.seen(attrs)
            parts[granularity] = _stored_rows(plan.stored[receiver, granularity], attrs, chosen)
            logits = attrs.logits[0]
        assert logits is not None
        document["logits"][place] = _packed(logits, "<f4")
        everything = torch.cat(list(parts.values()), dim=1)
        largest = everything.abs().amax(dim=(1, 2)).cpu()
        scale = torch.where(largest > 0, largest / _LEVELS, torch.ones_like(largest))
        scales.append(scale)
        for granularity, part in parts.items():
            exact = part.cpu()
            levels = (exact / scale[:, None, None]).round().clamp(-_LEVELS, _LEVELS)
            if exact.numel():
                error = (levels.double() * scale[:, None, None].double() - exact.double()).abs().max()
                errors.quantisation = max(errors.quantisation, float(error))
            document["scores"][granularity][place] = _packed(levels, "<i2")
    document["scale"] = _packed(torch.stack(scales), "<f4")


def _stored_rows(
    stored: _Senders, attrs: RouterLogitAttrs, chosen: dict[int, Int[Tensor, "pos k"]]
) -> Float[Tensor, "pos row expert"]:
    values = attrs.values[:, 0]
    parts = [values[:0]]
    for place, slots, names in stored.divided:
        group = stored.senders.groups[place]
        part = values[attrs.senders.slice_of(group.component)]
        if slots:
            assert group.layer is not None
            # What an expert that was not chosen sends is zero.
            positions = torch.arange(part.shape[1], device=part.device)
            parts.append(part[chosen[group.layer].T, positions])
        parts.append(part[len(part) - len(names) :])
    return torch.cat(parts).transpose(0, 1)


def _packed(values: Tensor, kind: str) -> str:
    return b64encode(np.ascontiguousarray(values.cpu().numpy().astype(kind)).tobytes()).decode("ascii")


def _texts(model: HookedMoE, tokens: Int[Tensor, " pos"]) -> list[str]:
    if model.tokenizer is None:
        return [f"[{int(token)}]" for token in tokens]
    return model.to_str_tokens(tokens)


def _json(value: Any) -> str:
    """As JSON in ASCII that can stand in a script element, whatever text is in it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")

"""What a corpus says of every expert, gathered layer by layer as it runs: all that a metric is a function of.

Everything is a sum over tokens, or merges like one, so batches come one after the other and neither their size nor
their padding matters. Sums are float64. Spreads are kept around the running mean and merged as Chan, Golub and LeVeque
(1983) do, so that one that is small beside the mean survives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import Moments

QUANTITIES = (
    "selected",
    "routing_weight",
    "probability",
    "probability_entropy",
    "output_norm",
    "squared_output_norm",
    "weighted_norm",
    "gap_norm",
    "gate_entropy",
)
"""What is averaged; see `ExpertStatistics`."""
_OF_EVERY_TOKEN = [QUANTITIES.index(name) for name in ("probability", "probability_entropy")]
_OUTPUT_NORM = QUANTITIES.index("output_norm")

# Numbers in float64 at a time, of outputs that the model holds in its own dtype.
_CHUNK = 2**22


class Estimate(NamedTuple):
    """A metric's values and their standard errors, `[layer, expert]`."""

    value: Float[np.ndarray, "layer expert"]
    standard_error: Float[np.ndarray, "layer expert"]


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """What is known of the routed experts of some layers, over the real tokens of a corpus. All arrays float64.

    Averages are of these quantities, at a token and an expert i:

    - `selected`: 1 where i is among the chosen experts.
    - `routing_weight`: g_i, as applied.
    - `probability`: p_i, the router's probability before top-k; `probability_entropy`: -p_i ln p_i.
    - `output_norm`: ||E_i(x)||_2, before the routing weight; `squared_output_norm`: its square.
    - `weighted_norm`: g_i ||E_i(x)||_2.
    - `gap_norm`: ||g_i E_i(x)||_2 of what reaches the residual stream: how far the layer's output moves without i.
    - `gate_entropy`: -sum_j p_j ln p_j over all experts j, in nats.

    Attributes:
        layers: MoE layers, the first axis of every array.
        n_tokens, n_documents: real tokens, and rows of the batches.
        count: tokens at which each expert is active.
        top_k: experts that a token chooses.
        output_norm_variance: of ||E_i(x)|| over the tokens where active, ddof 1; NaN for fewer than two.
        largest_output: the largest |coordinate| of E_i(x) where active; NaN where never active.
        mean_output: the mean of E_i(x) where active; NaN where never active.
        weight_norms: Frobenius norms of `W_gate`, `W_up`, `W_down`, and the norm of the `router`'s row.
        seed: for metrics that draw.
    """

    layers: tuple[int, ...]
    n_tokens: int
    n_documents: int
    count: Int[np.ndarray, "layer expert"]
    top_k: int
    output_norm_variance: Float[np.ndarray, "layer expert"]
    largest_output: Float[np.ndarray, "layer expert"]
    mean_output: Float[np.ndarray, "layer expert d_model"]
    weight_norms: dict[str, Float[np.ndarray, "layer expert"]]
    seed: int
    active_means: dict[str, Estimate]
    token_means: dict[str, Estimate]

    @property
    def n_experts(self) -> int:
        return self.count.shape[1]

    def when_active(self, quantity: str) -> Estimate:
        """A quantity's mean over the tokens where the expert is active: NaN where it never is.

        The standard error is clustered by document: the tokens of one may go together in any way. NaN for fewer than
        two documents with such a token.

        Raises:
            ValueError: no such quantity.
        """
        return self.active_means[_known(quantity)]

    def over_tokens(self, quantity: str) -> Estimate:
        """A quantity's mean over all real tokens, with its clustered standard error.

        Where the expert is not active a quantity counts as 0, except `probability` and `probability_entropy`, which
        every token has.

        Raises:
            ValueError: no such quantity.
        """
        return self.token_means[_known(quantity)]


def _known(quantity: str) -> str:
    if quantity not in QUANTITIES:
        raise ValueError(f"there is no quantity {quantity!r}; there are {', '.join(QUANTITIES)}")
    return quantity


class ClusteredMeans:
    """Means over tokens, and what their standard errors take where the tokens of a document go together.

    The mean is m = sum_d S_d / sum_d N_d over documents d with sums S_d and N_d tokens. Its variance is
    G/(G-1) sum_d (S_d - m N_d)^2 / (sum_d N_d)^2, with G documents that have such a token.
    """

    def __init__(self, n_quantities: int, n_experts: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count: Float[Tensor, " expert"] = zeros(n_experts)
        self.n_documents: Float[Tensor, " expert"] = zeros(n_experts)
        self.squared_counts: Float[Tensor, " expert"] = zeros(n_experts)
        self.mean: Float[Tensor, "quantity expert"] = zeros(n_quantities, n_experts)
        # Over documents, of S - m N with the mean m so far: its squares, and its products with N.
        self.squares = torch.zeros_like(self.mean)
        self.products = torch.zeros_like(self.mean)

    def add(
        self,
        sums: Float[Tensor, "quantity document expert"],
        counts: Float[Tensor, "document expert"],
    ) -> None:
        """A few more documents: their sums, and how many tokens these are over."""
        more = counts.sum(dim=0)
        self.count += more
        change = (sums.sum(dim=1) - self.mean * more) / self.count.clamp(min=1)
        self.mean += change
        self.squares += change.square() * self.squared_counts - 2 * change * self.products
        self.products -= change * self.squared_counts
        deviations = sums - self.mean[:, None] * counts
        self.squares += deviations.square().sum(dim=1)
        self.products += (deviations * counts).sum(dim=1)
        self.squared_counts += counts.square().sum(dim=0)
        self.n_documents += (counts > 0).sum(dim=0)

    def estimates(self) -> tuple[Float[Tensor, "quantity expert"], Float[Tensor, "quantity expert"]]:
        """Means, NaN without a token; standard errors, NaN for fewer than two documents."""
        factor = self.n_documents / (self.n_documents - 1).clamp(min=1)
        errors = (factor * self.squares.clamp(min=0)).sqrt() / self.count.clamp(min=1)
        return (
            self.mean.masked_fill(self.count == 0, torch.nan),
            errors.masked_fill(self.n_documents < 2, torch.nan),
        )


class LayerStatistics:
    """What is gathered of one layer, and the hooks that add a batch to it."""

    def __init__(self, model: HookedMoE, layer: int):
        cfg = model.cfg
        self.layer, self.n_experts = layer, cfg.n_experts
        self.active = ClusteredMeans(len(QUANTITIES), cfg.n_experts, cfg.device)
        self.tokens = ClusteredMeans(len(QUANTITIES), cfg.n_experts, cfg.device)
        self.norms = Moments(1, 1, cfg.n_experts, cfg.device)
        self.largest: Float[Tensor, " expert"] = torch.zeros(
            cfg.n_experts, dtype=torch.float64, device=cfg.device
        )
        self.total: Float[Tensor, "expert d_model"] = torch.zeros(
            cfg.n_experts, cfg.d_model, dtype=torch.float64, device=cfg.device
        )
        self.weight_norms: dict[str, Float[np.ndarray, " expert"]] = {}
        self._mlp: Any = model.blocks[layer].mlp

    def hooks(self, real: Bool[Tensor, "batch pos"]) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks for one forward pass of a batch. They only look."""
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            seen[_short(hook)] = at(value, real, hook)

        def outputs(value: Float[Tensor, "batch pos k d_model"], hook: HookPoint) -> None:
            slots = at(value, real, hook).flatten(0, 1)
            seen[_short(hook)] = self._add_outputs(seen["hook_expert_indices"].flatten(), slots)

        def contributions(value: Float[Tensor, "batch pos k d_model"], hook: HookPoint) -> None:
            slots = at(value, real, hook).flatten(0, 1)
            seen[_short(hook)] = torch.cat([norms_of(some) for some in in_chunks(slots)])
            self._add(seen, real)
            # Of a streamed model many batches are under way at a time, and this one may long wait for its end.
            seen.clear()
            if not self.weight_norms:
                # Here, where a streamed model's layer is in memory.
                self.weight_norms = _weight_norms(self._mlp)

        points = {
            "hook_expert_weights": keep,
            "hook_expert_indices": keep,
            "hook_routing_weights": keep,
            "hook_expert_out": outputs,
            "hook_expert_contrib": contributions,
        }
        return [(f"blocks.{self.layer}.mlp.{name}", hook) for name, hook in points.items()]

    def _add_outputs(
        self, experts: Int[Tensor, " slot"], outputs: Float[Tensor, "slot d_model"]
    ) -> Float[Tensor, " slot"]:
        """Their sum and the largest coordinate of each expert's; the norms."""
        norms = []
        for some, of in zip(in_chunks(outputs), in_chunks(experts, outputs.shape[1]), strict=True):
            wide = some.double()
            self.total.index_add_(0, of, wide)
            self.largest.scatter_reduce_(0, of, wide.abs().amax(dim=1), "amax")
            norms.append(wide.norm(dim=1))
        return torch.cat(norms)

    def _add(self, seen: dict[str, Tensor], real: Bool[Tensor, "batch pos"]) -> None:
        documents, n_documents = real.nonzero()[:, 0], len(real)
        indices: Int[Tensor, "token k"] = seen["hook_expert_indices"]
        experts = indices.flatten()
        of_slot = torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
        everywhere = torch.stack(
            (probabilities := seen["hook_expert_weights"].double(), torch.special.entr(probabilities))
        )
        chosen = everywhere.gather(2, indices.expand(2, *indices.shape)).flatten(1)
        weights, norms = seen["hook_routing_weights"].double().flatten(), seen["hook_expert_out"]
        of_slots = {
            "selected": torch.ones_like(norms),
            "routing_weight": weights,
            "probability": chosen[0],
            "probability_entropy": chosen[1],
            "output_norm": norms,
            "squared_output_norm": norms.square(),
            "weighted_norm": weights * norms,
            "gap_norm": seen["hook_expert_contrib"],
            "gate_entropy": everywhere[1].sum(dim=1)[of_slot],
        }
        sums = norms.new_zeros(len(QUANTITIES), n_documents * self.n_experts)
        sums.index_add_(
            1,
            documents[of_slot] * self.n_experts + experts,
            torch.stack([of_slots[name] for name in QUANTITIES]),
        )
        sums = sums.view(len(QUANTITIES), n_documents, self.n_experts)
        counts = sums[QUANTITIES.index("selected")]
        self.active.add(sums, counts)
        add_spread(self.norms, norms, experts, counts.sum(dim=0))

        sums = sums.clone()
        sums[_OF_EVERY_TOKEN] = sums.new_zeros(2, n_documents, self.n_experts).index_add_(
            1, documents, everywhere
        )
        self.tokens.add(sums, real.sum(dim=1, dtype=torch.float64)[:, None].expand_as(counts))


def statistics_of(
    model: HookedMoE, gathered: Sequence[LayerStatistics], n_tokens: int, n_documents: int, seed: int
) -> ExpertStatistics:
    """What was gathered, on the CPU."""

    def by_layer(of: Callable[[LayerStatistics], Tensor]) -> np.ndarray:
        return torch.stack([of(layer).cpu() for layer in gathered]).numpy()

    def means(of: Callable[[LayerStatistics], ClusteredMeans]) -> dict[str, Estimate]:
        found = [of(layer).estimates() for layer in gathered]
        value, error = (np.stack([part[i].cpu().numpy() for part in found], axis=1) for i in range(2))
        return {name: Estimate(value[i], error[i]) for i, name in enumerate(QUANTITIES)}

    def never(layer: LayerStatistics) -> Bool[Tensor, " expert"]:
        return layer.active.count == 0

    return ExpertStatistics(
        layers=tuple(layer.layer for layer in gathered),
        n_tokens=n_tokens,
        n_documents=n_documents,
        count=by_layer(lambda layer: layer.active.count.long()),
        top_k=model.cfg.top_k,
        output_norm_variance=by_layer(lambda layer: variance(layer.norms)),
        largest_output=by_layer(lambda layer: layer.largest.masked_fill(never(layer), torch.nan)),
        mean_output=by_layer(lambda layer: layer.total / layer.active.count[:, None]),
        weight_norms={
            name: np.stack([layer.weight_norms[name] for layer in gathered])
            for name in gathered[0].weight_norms
        },
        seed=seed,
        active_means=means(lambda layer: layer.active),
        token_means=means(lambda layer: layer.tokens),
    )


def _weight_norms(mlp: Any) -> dict[str, Float[np.ndarray, " expert"]]:
    weights = {name: getattr(mlp.experts, name) for name in ("W_gate", "W_up", "W_down")}
    weights["router"] = mlp.router.weight
    # One expert at a time, because in float64 they are larger than what the model holds.
    return {
        name: np.array([float(one.detach().double().norm()) for one in weight])
        for name, weight in weights.items()
    }


# ---- shared with the released definitions ----


def at(value: Tensor, counted: Bool[Tensor, "batch pos"], hook: HookPoint) -> Tensor:
    """A value at the tokens that are counted, `[token, ...]`.

    Raises:
        ValueError: it is not finite there.
    """
    if value.is_floating_point():
        strange = ~value.isfinite().flatten(2).all(dim=2) & counted
        if bool(strange.any()):
            batch, pos = strange.nonzero()[0].tolist()
            raise ValueError(
                f"{hook.name} holds a value that is not finite, at row {batch}, position {pos} of a batch"
            )
    return value[counted]


def in_chunks(slots: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Slots in parts, of vectors of some width."""
    return slots.split(max(1, _CHUNK // (slots.shape[1] if width is None else width)))


def norms_of(vectors: Float[Tensor, "slot d_model"]) -> Float[Tensor, " slot"]:
    return vectors.double().norm(dim=1)


def add_spread(
    moments: Moments,
    values: Float[Tensor, " slot"],
    experts: Int[Tensor, " slot"],
    counts: Float[Tensor, " expert"],
) -> None:
    """More values of each expert, of which there are so many."""
    sums = torch.zeros_like(counts).index_add_(0, experts, values)
    mean = sums / counts.clamp(min=1)
    squares = torch.zeros_like(counts).index_add_(0, experts, (values - mean[experts]).square())
    moments.merge(counts, mean[None, None], squares[None, None])
    moments.counted(counts)


def variance(moments: Moments, ddof: int = 1) -> Float[Tensor, " expert"]:
    """Of what `add_spread` was given; NaN for `ddof` values or fewer."""
    found = moments.squares[0, 0] / (moments.count - ddof).clamp(min=1)
    return found.masked_fill(moments.count <= ddof, torch.nan)


def _short(hook: HookPoint) -> str:
    assert hook.name is not None
    return hook.name.rsplit(".", 1)[-1]

"""What a forward pass says of a layer's redistribution, summed by document and expert as it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.audit.census_plan import Documents
from moe_lens.audit.metric_statistics import in_chunks
from moe_lens.audit.redistribution_correlations import PerDocument
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE


class LayerSums:
    """Sums of one layer, `[document, expert]`, and the hooks that add a batch to them. They only look.

    Args:
        documents: of the whole corpus, for their number and their names.
    """

    def __init__(self, model: HookedMoE, layer: int, documents: Documents):
        self.layer, self.documents = layer, documents
        self.n_experts = model.cfg.n_experts
        # On the CPU, however many documents there are. What is in which row: see `_add`.
        self.sums: Float[Tensor, "sum document expert"] = torch.zeros(
            7, len(documents), self.n_experts, dtype=torch.float64
        )

    def hooks(self, first: int, real: Bool[Tensor, "batch pos"]) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks for one forward pass of a batch.

        Args:
            first: the number of the batch's first document.
            real: which tokens count.
        """
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            assert hook.name is not None
            point = hook.name.rsplit(".", 1)[-1]
            seen[point] = self._at(value, first, real, point)

        def add(value: Tensor, hook: HookPoint) -> None:
            keep(value, hook)
            self._add(seen, first, real)
            seen.clear()

        block = f"blocks.{self.layer}"
        points = ("hook_expert_indices", "hook_routing_weights", "hook_expert_contrib")
        return [*((f"{block}.mlp.{point}", keep) for point in points), (f"{block}.hook_mlp_out", add)]

    def _at(self, value: Tensor, first: int, real: Bool[Tensor, "batch pos"], point: str) -> Tensor:
        """A value at the real tokens, `[token, ...]`.

        Raises:
            FloatingPointError: it is not finite there.
        """
        if value.is_floating_point():
            strange = ~value.isfinite().flatten(2).all(dim=2) & real
            if bool(strange.any()):
                row, position = strange.nonzero()[0].tolist()
                raise FloatingPointError(
                    f"{self.documents.name(first + row)}: {point} of layer {self.layer} holds a value that is not "
                    f"finite, at position {position}"
                )
        return value[real]

    def _add(self, seen: dict[str, Tensor], first: int, real: Bool[Tensor, "batch pos"]) -> None:
        experts: Int[Tensor, "token k"] = seen["hook_expert_indices"]
        contributions: Float[Tensor, "token k d_model"] = seen["hook_expert_contrib"]
        outputs: Float[Tensor, "token d_model"] = seen["hook_mlp_out"]
        width = max(1, contributions[0].numel()) if len(contributions) else 1
        gaps, cosines, compensations = [], [], []
        for some, whole in zip(in_chunks(contributions, width), in_chunks(outputs, width), strict=True):
            gap, cosine, compensation = compensation_of(some.double(), whole.double())
            gaps.append(gap)
            cosines.append(cosine)
            compensations.append(compensation)
        cosine, compensation = torch.cat(cosines), torch.cat(compensations)
        values = torch.stack(
            (
                torch.ones_like(cosine),
                (~cosine.isnan()).double(),
                (~compensation.isnan()).double(),
                seen["hook_routing_weights"].double(),
                torch.cat(gaps),
                cosine.nan_to_num(nan=0.0),
                compensation.nan_to_num(nan=0.0),
            )
        )
        n_documents = len(real)
        rows = real.nonzero()[:, :1].expand_as(experts)
        sums = values.new_zeros(len(values), n_documents * self.n_experts)
        sums.index_add_(1, (rows * self.n_experts + experts).flatten(), values.flatten(1))
        sums = sums.view(len(values), n_documents, self.n_experts)
        self.sums[:, first : first + n_documents] = sums.cpu()

    def quantities(self) -> dict[str, PerDocument]:
        """By name, what was summed."""
        active, with_cosine, with_compensation, weight, gap, cosine, compensation = self.sums.numpy()
        return {
            "routing_weight": PerDocument(weight, active),
            "gap_norm": PerDocument(gap, active),
            "cosine": PerDocument(cosine, with_cosine),
            "relative_compensation": PerDocument(compensation, with_compensation),
        }


def compensation_of(
    contributions: Float[Tensor, "token k d_model"], outputs: Float[Tensor, "token d_model"]
) -> tuple[Float[Tensor, "token k"], Float[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Gap norm, cosine and relative compensation of each contribution to its layer's output.

    The cosine is NaN where the contribution or what remains is zero, the relative compensation where the contribution
    is. Both arguments in one dtype, which the results have.
    """
    # Not <c, y> - ||c||^2, which loses its digits where little remains.
    remaining = outputs[:, None] - contributions
    gap, rest = contributions.norm(dim=-1), remaining.norm(dim=-1)
    # Of unit vectors, so that nothing underflows. 0 / 0 is the NaN that is meant.
    cosine = (contributions / gap[..., None] * (remaining / rest[..., None])).sum(dim=-1)
    compensation = rest * cosine.masked_fill(rest == 0, 0).clamp(min=0) / gap
    return gap, cosine, compensation

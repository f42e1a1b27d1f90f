"""A layer's expert outputs as a stream: their mean, and a sample of them that no division into batches changes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.token_hashes import FOR_SAMPLE, hash_of
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE

SHARED = -1
"""The shared experts of a layer, where experts are numbered."""

# Of a place of the sample that is still free: larger than any key.
_FREE = 2**63 - 1


class LayerOutputs:
    """What is kept of one layer's experts, and the hooks that add a batch to it.

    A token's key is a hash of all that tells it from others. The sample of an expert is the tokens with the smallest
    keys, so that it can be taken batch by batch, and is the same in whatever batches they come.
    """

    def __init__(self, model: HookedMoE, layer: int, n_samples: int, seed: int):
        cfg = model.cfg
        self.layer, self.seed, self.has_shared = layer, seed, cfg.shared is not None
        n_rows = cfg.n_experts + self.has_shared
        self.count: Int[Tensor, " row"] = torch.zeros(n_rows, dtype=torch.long, device=cfg.device)
        self.total: Float[Tensor, "row d_model"] = torch.zeros(
            n_rows, cfg.d_model, dtype=torch.float64, device=cfg.device
        )
        self.keys: Int[Tensor, "row sample"] = torch.full((n_rows, n_samples), _FREE, device=cfg.device)
        self.prefixes: Int[Tensor, "row sample"] = torch.zeros_like(self.keys)
        self.samples: Float[Tensor, "row sample d_model"] = torch.full(
            (n_rows, n_samples, cfg.d_model), torch.nan, dtype=cfg.dtype, device=cfg.device
        )

    @property
    def mean(self) -> Float[Tensor, "row d_model"]:
        return (self.total / self.count[:, None]).float()

    @property
    def n_samples(self) -> Int[Tensor, " row"]:
        return (self.keys != _FREE).sum(dim=1)

    def hooks(
        self, real: Bool[Tensor, "batch pos"], prefixes: Int[Tensor, " token"], first_document: int
    ) -> list[tuple[str, Any]]:
        """Hooks for one forward pass of a batch, of whose real tokens the prefixes are given."""
        chosen: list[Int[Tensor, "token k"]] = []

        def documents() -> Int[Tensor, " token"]:
            return first_document + real.nonzero()[:, 0]

        def choice(value: Int[Tensor, "batch pos k"], hook: HookPoint) -> None:
            chosen.append(value[real])

        def routed(value: Float[Tensor, "batch pos k d_model"], hook: HookPoint) -> None:
            experts = chosen.pop()
            token = torch.arange(len(experts), device=experts.device).repeat_interleave(experts.shape[1])
            self._check_finite(value, real, hook)
            self._add(experts.flatten(), prefixes[token], documents()[token], value[real].flatten(0, 1))

        def shared(value: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
            self._check_finite(value, real, hook)
            self._add(torch.full_like(prefixes, SHARED), prefixes, documents(), value[real])

        points = {"hook_expert_indices": choice, "hook_expert_out": routed}
        if self.has_shared:
            points["hook_shared_out"] = shared
        return [(f"blocks.{self.layer}.mlp.{name}", hook) for name, hook in points.items()]

    @staticmethod
    def _check_finite(
        value: Float[Tensor, "batch pos *rest"], real: Bool[Tensor, "batch pos"], hook: HookPoint
    ) -> None:
        strange = ~value.isfinite().flatten(2).all(dim=2) & real
        if bool(strange.any()):
            batch, pos = strange.nonzero()[0].tolist()
            raise ValueError(
                f"{hook.name} holds a value that is not finite, at row {batch}, position {pos} of a batch"
            )

    def _add(
        self,
        experts: Int[Tensor, " slot"],
        prefixes: Int[Tensor, " slot"],
        documents: Int[Tensor, " slot"],
        outputs: Float[Tensor, "slot d_model"],
    ) -> None:
        rows = experts % len(self.count)
        self.count += torch.bincount(rows, minlength=len(self.count))
        # In parts, because in float64 the whole would be larger than what the model itself holds at once.
        size = max(1, 2**22 // outputs.shape[1])
        for some, of in zip(outputs.split(size), rows.split(size), strict=True):
            self.total.index_add_(0, of, some.double())
        keys = hash_of(FOR_SAMPLE, self.seed, self.layer, experts, prefixes, documents)
        self._sample(rows, keys, prefixes, outputs)

    def _sample(
        self,
        rows: Int[Tensor, " slot"],
        keys: Int[Tensor, " slot"],
        prefixes: Int[Tensor, " slot"],
        outputs: Float[Tensor, "slot d_model"],
    ) -> None:
        """Of those held and these, hold the smallest keys of each row, no prefix twice."""
        n = self.keys.shape[1]
        new = (keys < self.keys[rows, -1]).nonzero()[:, 0]
        old = (self.keys.flatten() != _FREE).nonzero()[:, 0]
        rows = torch.cat((old // n, rows[new]))
        keys = torch.cat((self.keys.flatten()[old], keys[new]))
        prefixes = torch.cat((self.prefixes.flatten()[old], prefixes[new]))

        order = _ordered(rows, prefixes, keys)
        starts = torch.ones_like(order, dtype=torch.bool)
        starts[1:] = (rows[order].diff() != 0) | (prefixes[order].diff() != 0)
        distinct = order[starts]
        order = distinct[_ordered(rows[distinct], keys[distinct])]
        row = rows[order]
        rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        order, row, rank = order[rank < n], row[rank < n], rank[rank < n]

        # A row never holds fewer than before, so every place that was in use is written anew.
        kept = outputs.new_empty(len(order), outputs.shape[1])
        is_new = order >= len(old)
        kept[is_new] = outputs[new[order[is_new] - len(old)]]
        kept[~is_new] = self.samples.flatten(0, 1)[old[order[~is_new]]]
        self.samples[row, rank] = kept
        self.keys[row, rank], self.prefixes[row, rank] = keys[order], prefixes[order]


def _ordered(*columns: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The order of rows by the first column, among equals by the second, and so on."""
    order = columns[-1].argsort(stable=True)
    for column in reversed(columns[:-1]):
        order = order[column[order].argsort(stable=True)]
    return order

"""What batches keep while all of them go through a model layer by layer, in bytes, before any has run.

A part of a component (`parts`) waits for the scales of later receivers. Where a first reading of the layers has
gathered these, parts are added at once and none is held; what remains is the stream and what the sums are checked by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moe_lens.config import MoEConfig
from moe_lens.routing.measures import MEASURES
from moe_lens.routing.rounding import stream_rounds
from moe_lens.routing.senders import SenderGroup, check_granularity, senders_before

FLOAT, INDEX = torch.float32.itemsize, torch.int64.itemsize
# Tokens, masks, position classes, documents and the places where sums are checked.
_SMALL = 32
# Of a router's choice (`rank_shift.Choice`), for each expert: chosen, weight and rank.
_CHOICE = 1 + FLOAT + INDEX


@dataclass(frozen=True)
class Held:
    """What is measured of batches, as far as it decides what they hold.

    Attributes:
        cfg: the model's.
        by: granularities.
        receivers: MoE layers.
        n_experts: over how many experts of a receiver scores are made.
        selected, rank_shift: see `parts.Measuring`.
        n_checked: at how many tokens of a batch a float32 sum over neurons is checked.
    """

    cfg: MoEConfig
    by: tuple[str, ...]
    receivers: tuple[int, ...]
    n_experts: int
    selected: bool
    rank_shift: bool
    n_checked: int

    def with_receivers(self, receivers: tuple[int, ...]) -> Held:
        return replace(self, receivers=receivers)

    @property
    def waits(self) -> bool:
        return self.selected or self.rank_shift

    @property
    def needs_two_readings(self) -> bool:
        """Whether measures ask for weights when the receivers have run, and the layer is on disk again."""
        return self.waits and "neuron" in self.by

    def bytes(self, n_batch: int, n_pos: int, n_readings: int) -> int:
        """Of a batch `[n_batch, n_pos]`, at the end of its run: when it holds most.

        Args:
            n_readings: 1 holds every part; 2 none of them, after a first reading of the layers.
        """
        n_tokens = n_batch * n_pos
        n_bytes = n_tokens * self._between_layers(n_readings) + self._sums(n_tokens)
        if n_readings == 1:
            for group, reached in self._parts:
                n_bytes += self._part(group, reached, n_batch, n_pos)
        return n_bytes

    def _between_layers(self, n_readings: int) -> int:
        """For each token: the stream, and what the receivers know."""
        n_receivers = len(self.receivers)
        n_bytes = self.cfg.d_model * self.cfg.dtype.itemsize + _SMALL + n_readings * n_receivers * FLOAT
        if self.rank_shift:
            n_bytes += n_receivers * self.n_experts * (FLOAT if n_readings == 1 else FLOAT + _CHOICE)
        if self.selected:
            n_bytes += n_receivers * self.cfg.top_k * INDEX
        return n_bytes

    def _sums(self, n_tokens: int) -> int:
        """What the senders' scores are summed in, and in half precision the stream's rounding."""
        n_bytes, rounds = 0, stream_rounds(self.cfg.dtype)
        of_token = len(self.receivers) * self.n_experts * FLOAT
        for name in self.by:
            n_bytes += of_token * (n_tokens if rounds or name != "neuron" else min(self.n_checked, n_tokens))
            if rounds:
                of_streams = 2 * self.cfg.d_model * FLOAT
                n_bytes += n_tokens * (of_streams + of_token + len(self.receivers) * FLOAT)
        return n_bytes

    @cached_property
    def _parts(self) -> list[tuple[SenderGroup, int]]:
        """Every component, once for each way in which it is divided, and how many receivers it reaches."""
        parts = {}
        for name in self.by:
            for group in senders_before(self.cfg, self.receivers[-1], check_granularity(name)).groups:
                after = 0 if group.layer is None else group.layer + group.component.startswith("M")
                reached = sum(receiver >= after for receiver in self.receivers)
                parts[group.component, group.kind] = group, reached
        return list(parts.values())

    def _part(self, group: SenderGroup, reached: int, n_batch: int, n_pos: int) -> int:
        n_tokens, cfg = n_batch * n_pos, self.cfg
        measured = reached * (self.n_experts + 1 if self.waits else len(MEASURES)) * FLOAT
        match group.kind:
            case "whole":
                return n_tokens * (2 * INDEX + measured)
            case "heads":
                return n_tokens * len(group) * (2 * INDEX + measured)
            case "experts":
                return n_tokens * (cfg.top_k + len(group.names) - 1) * (2 * INDEX + measured)
            case "sources":
                n_heads = cfg.attention.n_heads
                return n_batch * n_heads * n_pos * (n_pos * cfg.dtype.itemsize + measured)
            case "neurons":
                d_shared = cfg.shared.d_shared if cfg.shared else 0
                return n_tokens * (cfg.top_k * (cfg.d_expert * FLOAT + INDEX) + d_shared * FLOAT)
            case "dense neurons":
                return n_tokens * cfg.d_mlp * FLOAT

"""How a replay divides its work: which branches go together, how many positions at once, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lens.interventions.replay_attend import SCORE_BYTES, TILE_BYTES, mixing_bytes
from moe_lens.model.hooked_moe import HookedMoE

# Tried on x86 at d_model 512: on one core, a sixteenth to an eighth of a GiB at once and more was up to a fifth slower;
# with two pieces side by side, a quarter to twice this many rows made no difference that the noise let see.
_CPU_CACHE = 2**26
_ROWS_PER_EXPERT = 64

HELP = "a smaller memory_budget, shorter documents, or a device with more memory"
"""Where a replay meets the end of memory."""


@dataclass(frozen=True)
class ReplayPlan:
    """Which branches go together, and how many positions at once.

    Branches of several layers share a pass while all positions fit, so that short documents still make large
    matrices; where one layer's branches alone are too many, their positions are divided.
    """

    groups: list[list[int]]
    rows_at_once: int

    @classmethod
    def make(
        cls,
        model: HookedMoE,
        branches: Sequence[tuple[int, int]],
        n_rows: int,
        n_tokens: int,
        memory_budget: int,
        null_branch: bool,
        n_at_once: int = 1,
    ) -> ReplayPlan:
        """Divide the work.

        Args:
            branches: (layer, how many branches), of each that is given to `replay`.
            n_rows: positions.
            n_tokens: of the document.
            memory_budget: bytes, for each piece of the work.
            null_branch: whether one runs beside the branches of each layer.
            n_at_once: how many pieces are worked on side by side; there should be as many.
        """
        affordable = max(
            1, min(affordable_branches(model, n_tokens, memory_budget), fast_enough(model, n_tokens))
        )
        groups: list[list[int]] = []

        def width(group: Sequence[int]) -> int:
            n_layers = len({branches[i][0] for i in group})
            return sum(branches[i][1] for i in group) + null_branch * n_layers

        for i in sorted(range(len(branches)), key=lambda i: branches[i][0]):
            if groups and width([*groups[-1], i]) * n_rows <= affordable:
                groups[-1].append(i)
            else:
                groups.append([i])
        rows_at_once = max(1, min(-(-n_rows // n_at_once), affordable // max(map(width, groups))))
        return cls(groups, rows_at_once)


def affordable_branches(model: HookedMoE, n_keys: int, memory_budget: int) -> int:
    """How many branches fit at one token each, with keys of `n_keys` tokens to see; 0 where not one does.

    The scores of all of them are held at once only while these are fewer than a tile's (`replay_attend`).
    """
    left = max(0, memory_budget - mixing_bytes(model.cfg, n_keys))
    return max(
        left // branch_bytes(model, n_keys),
        (left - max(TILE_BYTES, SCORE_BYTES * model.cfg.n_heads * n_keys)) // branch_bytes(model, 0),
    )


def fast_enough(model: HookedMoE, n_keys: int) -> int:
    """Branch tokens at once beyond which nothing is gained. On a CPU, what does not fit its caches costs more than
    larger matrices win; every expert should still get some tens of rows, so that its weights are worth reading."""
    cfg = model.cfg
    if cfg.device.type != "cpu":
        return 2**62
    return max(affordable_branches(model, n_keys, _CPU_CACHE), _ROWS_PER_EXPERT * cfg.n_experts // cfg.top_k)


def branch_bytes(model: HookedMoE, n_keys: int) -> int:
    """About how much memory one branch at one token takes at its widest place.

    Args:
        n_keys: how many keys' scores are held of each head; 0 where the attention holds none.
    """
    cfg, element = model.cfg, model.cfg.dtype.itemsize
    stream = 6 * cfg.d_model * element
    heads = cfg.n_heads * (n_keys * SCORE_BYTES + 10 * cfg.d_head * max(element, 4))
    experts = cfg.top_k * (4 * cfg.d_model + 4 * cfg.d_expert) * element
    shared = 4 * cfg.shared.d_shared * element if cfg.shared else 0
    dense = 4 * cfg.d_mlp * element if len(cfg.moe_layers) < cfg.n_layers else 0
    return stream + max(heads, experts + shared, dense)

"""Attention of a replay's branches: to the clean keys and values of earlier tokens, and to their own.

    z = sum over j < t of p_j v_j  +  p_own v_own        p = softmax(scale q.k_j for j < t, scale q.k_own)

The clean keys are the same for all branches, a branch's own key is nobody else's. So that one attention over shared
keys gives it all, the own score goes through the query: it is written into coordinates of the query beyond `d_head`,
which are 1 in one more shared key and 0 in the clean ones. That key's score is then each query's own score, and its
value is 1 in a column beyond `d_value`, which therefore holds p_own where all else is already weighted rightly:

    q' = [q, q.k_own]      k'_0 = [0, 1]   k'_j = [k_j, 0]      v'_0 = [0, 1]   v'_j = [v_j, 0]

Two back ends mix these. `fused` is torch's `scaled_dot_product_attention`, which keeps no scores; as k'_0 comes first,
a branch at token t sees the first t + 1 keys, and at consecutive tokens that is a causal mask. `tiles` makes the scores
of a few tokens at a time, in memory of a fixed size. On a CPU the tiles are as fast in float32 and faster in bfloat16,
and pass a NaN on, for which torch's fused kernel there gives zeros.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moe_lens.config import MoEConfig
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.model.attend import Attend
from moe_lens.model.attention import Attention
from moe_lens.model.rotary import rotation_at

Backend = Literal["auto", "fused", "tiles"]

SCORE_BYTES = 8
"""Of one score while a tile is made: the score and its probability, in float32 or both in half precision beside it."""

TILE_BYTES = 2**24
"""Of a tile's scores. On a CPU, from a quarter to twice this made no difference beyond the noise."""

# Torch's fused kernels take rows of whole multiples of 16 bytes; of 8 numbers, that is so in every dtype.
_ALIGNED = 8

# A CUDA launch has 65,535 blocks in the direction of these.
_SEQUENCES_AT_ONCE = 2**15


class ReplayAttend(Attend):
    """Attention of branches `[pos, branch]`: each to the clean keys and values of earlier positions, and to its own.

    Args:
        clean: the document.
        rows: the tokens that the branches are at, as places among its real tokens, ascending, each once.
        backend: `fused`, `tiles`, or `auto`: the first on CUDA devices in the dtypes that its kernels have, else the
            second.
    """

    def __init__(self, clean: CleanRun, rows: Int[Tensor, " n"], backend: Backend = "auto"):
        self.clean = clean
        self.backend: Backend = backend
        self.rotation = rotation_at(clean.model.cfg.rotary, clean.columns[rows][:, None])
        # On the host once, so that no layer waits for the device.
        self.rows: list[int] = rows.tolist()

    def mix(
        self,
        attention: Attention,
        queries: Float[Tensor, "n branch head d_head"],
        keys: Float[Tensor, "n branch kv_head d_head"],
        values: Float[Tensor, "n branch kv_head d_value"],
    ) -> Float[Tensor, "n branch head d_value"]:
        layer, clean = attention.layer, self.clean
        return mix_with_own(
            queries,
            keys,
            values,
            clean.keys[layer],
            clean.values[layer],
            self.rows,
            attention.softmax_scale,
            backend=self.backend,
        )


def mix_with_own(
    queries: Float[Tensor, "n branch head d_head"],
    keys: Float[Tensor, "n branch kv_head d_head"],
    values: Float[Tensor, "n branch kv_head d_value"],
    clean_keys: Float[Tensor, "key kv_head d_head"],
    clean_values: Float[Tensor, "key kv_head d_value"],
    rows: list[int],
    scale: float,
    *,
    backend: Backend = "auto",
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, "n branch head d_value"]:
    """What branches read: each of the first `rows[n]` clean keys, and of its own key.

    Args:
        queries, keys, values: of the branches, rotated; `head` is a multiple of `kv_head`, and heads that share a
            key follow each other.
        clean_keys, clean_values: shared by all branches; `rows[-1]` of them at least.
        rows: how many clean keys the branches at each position see; ascending, each once.
        scale: of the scores.
        backend: see `ReplayAttend`.
        tile_bytes: of the scores that `tiles` makes at once.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("auto", "fused", "tiles"):
        raise ValueError(f"backend must be 'auto', 'fused' or 'tiles', not {backend!r}")
    if backend == "auto":
        on_cuda = queries.is_cuda and queries.dtype in (torch.float32, torch.bfloat16, torch.float16)
        backend = "fused" if on_cuda else "tiles"
    kv_heads, d_value = values.shape[2:]
    extended, n_own = _with_own_scores(queries, keys)
    width = extended.shape[-1]
    shared_keys = _with_first(clean_keys[: rows[-1]], n_own, width)
    if backend == "fused":
        # One width for all three: torch's fastest kernel has no other.
        shared_values = _with_first(clean_values[: rows[-1]], 1, max(width, _aligned(d_value + 1)))
        mixed = _fused(extended, shared_keys, shared_values, rows, scale)
    else:
        shared_values = _with_first(clean_values[: rows[-1]], 1, _aligned(d_value + 1))
        mixed = _tiles(extended, shared_keys, shared_values, rows, scale, tile_bytes)
    own = repeat(values, "n branch kv d -> n branch (kv group) d", group=queries.shape[2] // kv_heads)
    return torch.addcmul(mixed[..., :d_value], mixed[..., d_value : d_value + 1], own)


def mixing_bytes(cfg: MoEConfig, n_keys: int) -> int:
    """What a `mix` takes beside its branches: the clean keys and values with their coordinates for own scores."""
    attention = cfg.attention
    widths = _aligned(attention.d_head + 2) + _aligned(attention.d_value + 1)
    return (n_keys + 1) * attention.n_key_value_heads * widths * cfg.dtype.itemsize


def _aligned(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED


def _with_own_scores(
    queries: Float[Tensor, "n branch head d_head"], keys: Float[Tensor, "n branch kv_head d_head"]
) -> tuple[Float[Tensor, "kv_head n branch group width"], int]:
    """q' = [q, q.k_own], and zeros up to an aligned width; and how many coordinates the own score takes.

    In half precision they are two, so that it is not rounded as one is.
    """
    queries = rearrange(queries, "n branch (kv group) d -> kv n branch group d", kv=keys.shape[2])
    keys = rearrange(keys, "n branch kv d -> kv n branch 1 d")
    if queries.dtype.itemsize >= 4:
        own = [(queries * keys).sum(dim=-1, keepdim=True)]
    else:
        score = (queries.float() * keys.float()).sum(dim=-1, keepdim=True)
        rounded = score.to(queries.dtype)
        own = [rounded, (score - rounded.float()).to(queries.dtype)]
    d = queries.shape[-1] + len(own)
    zeros = queries.new_zeros(()).expand(*queries.shape[:-1], _aligned(d) - d)
    return torch.cat((queries, *own, zeros), dim=-1), len(own)


def _with_first(
    clean: Float[Tensor, "key kv_head d"], n_ones: int, width: int
) -> Float[Tensor, "one_more kv_head width"]:
    """k' or v': before all others one that is 1 where they are 0, in `n_ones` coordinates after theirs."""
    d = clean.shape[-1]
    extended = F.pad(clean, (0, width - d, 0, 0, 1, 0))
    extended[0, :, d : d + n_ones] = 1
    return extended


def _fused(
    queries: Float[Tensor, "kv_head n branch group d"],
    keys: Float[Tensor, "key kv_head d"],
    values: Float[Tensor, "key kv_head d_value"],
    rows: list[int],
    scale: float,
) -> Float[Tensor, "n branch head d_value"]:
    """By torch's `scaled_dot_product_attention`, a sequence of positions for each branch and each head of a group."""
    _, n, _, group, _ = queries.shape
    if rows[-1] - rows[0] + 1 == n:
        visible = causal_lower_right(n, len(keys))
    else:
        places = torch.arange(len(keys), device=queries.device)
        visible = places <= torch.tensor(rows, device=queries.device)[:, None]
    keys, values = (rearrange(t, "key kv d -> 1 kv key d") for t in (keys, values))
    at_once = max(1, _SEQUENCES_AT_ONCE // group)
    parts = []
    for part in queries.split(at_once, dim=2):
        sequences = rearrange(part, "kv n branch group d -> (branch group) kv n d")
        mixed = F.scaled_dot_product_attention(
            sequences,
            *(t.expand(len(sequences), -1, -1, -1) for t in (keys, values)),
            attn_mask=visible,
            scale=scale,
        )
        parts.append(rearrange(mixed, "(branch group) kv n d -> n branch (kv group) d", group=group))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _tiles(
    queries: Float[Tensor, "kv_head n branch group d"],
    keys: Float[Tensor, "key kv_head d"],
    values: Float[Tensor, "key kv_head d_value"],
    rows: list[int],
    scale: float,
    tile_bytes: int,
) -> Float[Tensor, "n branch head d_value"]:
    """The scores of a few positions at a time, or of a few branches where those of one are too many."""
    kv_heads, n, n_branches, group, _ = queries.shape
    of_branch = SCORE_BYTES * kv_heads * group * len(keys)
    branches_at_once = max(1, min(n_branches, tile_bytes // of_branch))
    rows_at_once = (
        max(1, tile_bytes // (of_branch * branches_at_once)) if branches_at_once == n_branches else 1
    )
    by_rows = []
    for start in range(0, n, rows_at_once):
        stop = min(n, start + rows_at_once)
        parts = [
            _tile(
                queries[:, start:stop, first : first + branches_at_once],
                keys,
                values,
                rows[start:stop],
                scale,
            )
            for first in range(0, n_branches, branches_at_once)
        ]
        by_rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return by_rows[0] if len(by_rows) == 1 else torch.cat(by_rows)


def _tile(
    queries: Float[Tensor, "kv_head n branch group d"],
    keys: Float[Tensor, "key kv_head d"],
    values: Float[Tensor, "key kv_head d_value"],
    rows: list[int],
    scale: float,
) -> Float[Tensor, "n branch head d_value"]:
    _, n, _, group, _ = queries.shape
    n_keys = rows[-1] + 1  # their own stands before the clean ones
    scores = torch.baddbmm(
        queries.new_zeros(()),
        rearrange(queries, "kv n branch group d -> kv (n branch group) d"),
        rearrange(keys[:n_keys], "key kv d -> kv d key"),
        beta=0,
        alpha=scale,
    )
    # Only the keys after the first position's are hidden from some.
    places = torch.arange(rows[0] + 1, n_keys, device=queries.device)
    hidden = places > torch.tensor(rows, device=queries.device)[:, None]
    by_token = rearrange(scores, "kv (n each) key -> kv n each key", n=n)
    by_token[..., rows[0] + 1 :].masked_fill_(hidden[:, None], -torch.inf)
    pattern = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    mixed = pattern @ rearrange(values[:n_keys], "key kv d -> kv key d")
    return rearrange(mixed, "kv (n branch group) d -> n branch (kv group) d", n=n, group=group)

"""What the queries of one run may see: positions, mask, and the keys and values of earlier tokens.

Attention layers compute queries, keys and values and ask an `Attend` the rest, so that one implementation
of a layer serves every kind of run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RotaryConfig
from moe_lens.model.rotary import Rotation, rotation_at

if TYPE_CHECKING:
    from moe_lens.model.attention import Attention


class KeyValueCache:
    """Rotated keys and values of the tokens already run, one pair per layer (for `generate`)."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.key_is_real: Bool[Tensor, "batch key"] | None = None

    @property
    def length(self) -> int:
        return 0 if self.key_is_real is None else self.key_is_real.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append this run's keys and values of a layer, and return all of that layer's so far."""
        if layer in self.layers:
            past_keys, past_values = self.layers[layer]
            keys, values = torch.cat((past_keys, keys), dim=1), torch.cat((past_values, values), dim=1)
        self.layers[layer] = keys, values
        return keys, values


class Attend:
    """Causal attention of a batch of tokens, after those in `past` where there are any.

    Args:
        rotary: the model's rotary configuration.
        shape: (batch, pos) of the tokens that are run now.
        attention_mask: `[batch, pos]` of these tokens, true where real. A padded key is seen by nobody but
            its own query, which sees nothing else: so no row is empty and nothing becomes NaN.
        positions: `[batch or 1, pos]`; counted from the first column when not given, padding included, as
            transformers' forward does (rotary angles only matter by their differences).
        past: the cache to read and extend.
    """

    def __init__(
        self,
        rotary: RotaryConfig,
        shape: tuple[int, int],
        device: torch.device,
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "batch pos"] | None = None,
        past: KeyValueCache | None = None,
    ):
        batch, n_queries = shape
        start = 0 if past is None else past.length
        if positions is None:
            positions = torch.arange(start, start + n_queries, device=device)[None]
        self.rotation: Rotation = rotation_at(rotary, positions)
        self.past = past

        key_is_real = attention_mask
        if past is not None:
            if key_is_real is None:
                key_is_real = torch.ones(batch, n_queries, dtype=torch.bool, device=device)
            if past.key_is_real is not None:
                key_is_real = torch.cat((past.key_is_real, key_is_real), dim=1)
            past.key_is_real = key_is_real
        if key_is_real is not None and bool(key_is_real.all()):
            key_is_real = None

        # None lets the kernel use its causal fast path; it is right when queries and keys are the same tokens.
        self.mask: Bool[Tensor, "batch 1 query key"] | None = None
        if key_is_real is not None or start > 0:
            self.mask = self._explicit_mask(start, n_queries, key_is_real, device)

    @staticmethod
    def _explicit_mask(
        start: int, n_queries: int, key_is_real: Bool[Tensor, "batch key"] | None, device: torch.device
    ) -> Bool[Tensor, "batch 1 query key"]:
        """True where a query may see a key: itself, or an earlier one if both are real."""
        queries = torch.arange(start, start + n_queries, device=device)[:, None]
        keys = torch.arange(start + n_queries, device=device)[None, :]
        causal = (keys <= queries)[None, None]
        if key_is_real is None:
            return causal
        query_is_real = key_is_real[:, start:]
        both_real = key_is_real[:, None, None, :] & query_is_real[:, None, :, None]
        return (causal & both_real) | (keys == queries)[None, None]

    def mix(
        self,
        attention: Attention,
        queries: Float[Tensor, "batch query head d_head"],
        keys: Float[Tensor, "batch pos kv_head d_head"],
        values: Float[Tensor, "batch pos kv_head d_value"],
    ) -> Float[Tensor, "batch query head d_value"]:
        """z of this run's queries, over all keys that they may see. Another kind of run has its own way."""
        keys, values = self.keys_and_values(attention.layer, keys, values)
        return attention.mix(queries, keys, values, self)

    def keys_and_values(
        self,
        layer: int,
        keys: Float[Tensor, "batch pos kv_head d_head"],
        values: Float[Tensor, "batch pos kv_head d_value"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_value"]]:
        """All keys and values that this run's queries may see, given those of its own tokens."""
        return (keys, values) if self.past is None else self.past.extend(layer, keys, values)

    def visible(self, n_queries: int, device: torch.device) -> Bool[Tensor, "batch 1 query key"]:
        """The mask written out, also where it is plainly causal."""
        return self._explicit_mask(0, n_queries, None, device) if self.mask is None else self.mask

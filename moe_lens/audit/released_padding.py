"""The padding that the audit's released code counts: its token, its side and its width, whatever batches were given.

The released code tokenises all texts at once with `padding=True`: every row is as long as the longest of the corpus,
filled with the tokenizer's pad token, or its EOS where it has none, on the tokenizer's side. That is the right for
OLMoE, and the left for DeepSeek-V2-Lite (class `LlamaTokenizerFast`; the positions in its results lie at the ends of
rows of 512). Then the rows are cut into batches, of 4 and of 2, which changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.attend import Attend
from moe_lens.model.attention import Attention
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.runs import Corpus

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Padding:
    """How the rows of a corpus are filled up: with which token, to how many positions, on which side."""

    token: int
    width: int
    side: Side


def pad_token_of(model: HookedMoE, pad_token: int | None) -> int:
    """The token that fills rows up: the one asked for, else the tokenizer's pad token, else its EOS.

    Raises:
        ValueError: none of them is there; it is no token of the model.
    """
    found = pad_token
    if found is None:
        names = ("pad_token_id", "eos_token_id")
        ids = [getattr(model.tokenizer, name, None) for name in names]
        found = next((one for one in ids if one is not None), None)
    whose = f"{model.cfg.model_name}, of {model.cfg.d_vocab:,} tokens"
    if found is None:
        raise ValueError(
            f"these released definitions count padding, which is the tokenizer's pad token, or its EOS, and {whose}, "
            f"has no tokenizer with either; name the token by pad_token="
        )
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < model.cfg.d_vocab:
        raise ValueError(f"the padding's token {found!r} is no token of {whose}; name one by pad_token=")
    return found


def padded_as_released(
    model: HookedMoE, corpus: Corpus, side: Side, token: int, batch_size: int
) -> tuple[Corpus, Padding]:
    """The real tokens of a corpus, each row filled up to the longest one's length.

    Raises:
        ValueError: what the model says of tokens that are none; there are no batches.
    """
    rows = [row for batch in corpus for row in _rows_of(model, *batch)]
    if not rows:
        raise ValueError("there were no batches, so there is nothing to average over")
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), token, device=rows[0].device)
    real = torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[number, place], real[number, place] = row, True
    batches = list(zip(tokens.split(batch_size), real.split(batch_size), strict=True))
    return Corpus(batches, True, corpus.description), Padding(token, width, side)


def _rows_of(
    model: HookedMoE, given: Int[Tensor, "batch pos"], mask: Tensor | None
) -> list[Int[Tensor, " pos"]]:
    tokens, mask = model.tokens_and_mask(given, mask)
    return [row[real] for row, real in zip(tokens, real_tokens(tokens, mask), strict=True)]


class PaddingAsInTransformers(Attend):
    """Causal attention in which padded queries are transformers'.

    One sees the real tokens before it. Where there are none, as on the left, eager attention has the same lowest
    number at every key, so that its softmax weighs all positions of the row alike, later ones too: that is what
    DeepSeek's own code, which has no other kernel by default, does there.
    """

    def __init__(self, model: HookedMoE, mask: Bool[Tensor, "batch pos"]):
        super().__init__(
            model.cfg.rotary, (mask.shape[0], mask.shape[1]), model.cfg.device, attention_mask=mask
        )
        self.sees_nothing: Bool[Tensor, "batch pos"] | None = None
        if self.mask is not None:
            n = mask.shape[1]
            causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
            earlier = causal & mask[:, None, None, :]
            nothing = ~earlier.any(dim=-1, keepdim=True)
            self.sees_nothing = nothing[:, 0, :, 0]
            # Itself, so that no row of the softmax is empty; `mix` puts the mean in its place.
            self.mask = earlier | (nothing & torch.eye(n, dtype=torch.bool, device=mask.device))

    def mix(
        self,
        attention: Attention,
        queries: Float[Tensor, "batch query head d_head"],
        keys: Float[Tensor, "batch pos kv_head d_head"],
        values: Float[Tensor, "batch pos kv_head d_value"],
    ) -> Float[Tensor, "batch query head d_value"]:
        z = super().mix(attention, queries, keys, values)
        if self.sees_nothing is None or not bool(self.sees_nothing.any()):
            return z
        group = attention.n_heads // attention.n_key_value_heads
        mean = repeat(values.mean(dim=1), "b h d -> b 1 (h group) d", group=group)
        return torch.where(self.sees_nothing[:, :, None, None], mean, z)

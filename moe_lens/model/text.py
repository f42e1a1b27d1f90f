"""Between text and tokens, under TransformerLens's names."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Text = str | list[str] | tuple[str, ...]


class TextInterface:
    """Methods of a model that has a `tokenizer` (or None) and a `cfg.device`."""

    tokenizer: Any
    cfg: Any

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.cfg.model_name} was loaded without a tokenizer, so it takes tokens, not text; put the "
                f"tokenizer's files beside the checkpoint, or set model.tokenizer"
            )
        return self.tokenizer

    def tokenize(
        self,
        text: Text,
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Text as tokens and the mask of real ones.

        Args:
            text: one string or several; a batch is padded to its longest row.
            prepend_bos: None leaves special tokens to the tokenizer, as transformers does; True puts exactly
                one BOS token in front; False adds no special token.
            padding_side: where shorter rows are padded.

        Raises:
            ValueError: no tokenizer, no text, something else than text, or `prepend_bos=True` without a BOS
                token.
        """
        tokenizer = self._require_tokenizer()
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there is no text: the list is empty")
        strange = [type(item).__name__ for item in texts if not isinstance(item, str)]
        if strange:
            raise ValueError(f"text must be strings, not {strange[0]}; tokens go in as a tensor of integers")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
        # Not verbose: the model itself warns where a text that it runs is longer than its context.
        rows: list[list[int]] = tokenizer(texts, add_special_tokens=prepend_bos is None, verbose=False)[
            "input_ids"
        ]
        if prepend_bos:
            if tokenizer.bos_token_id is None:
                raise ValueError(
                    f"the tokenizer of {self.cfg.model_name} has no BOS token; prepend_bos must be False"
                )
            rows = [[tokenizer.bos_token_id, *row] for row in rows]
        empty = [i for i, row in enumerate(rows) if not row]
        if empty:
            raise ValueError(f"text {empty[0]} of the batch has no tokens")

        longest = max(map(len, rows))
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        tokens = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if padding_side == "right" else slice(longest - len(row), longest)
            tokens[i, place] = torch.tensor(row)
            mask[i, place] = True
        return tokens.to(self.cfg.device), mask.to(self.cfg.device)

    def to_tokens(
        self,
        text: Text,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> Int[Tensor, "batch pos"]:
        """Text as tokens `[batch, pos]`, for texts of one length.

        Raises:
            ValueError: the texts have different lengths, so that padding would be taken for text.
        """
        tokens, mask = self.tokenize(text, prepend_bos=prepend_bos, padding_side=padding_side)
        if not bool(mask.all()):
            lengths = mask.sum(dim=1)
            raise ValueError(
                f"the texts are {int(lengths.min())} to {int(lengths.max())} tokens long, and tokens alone do not say "
                f"which are padding; use model.tokenize(texts), which gives the attention mask too, or give the "
                f"model the texts themselves"
            )
        return tokens

    def to_string(self, tokens: Int[Tensor, "*shape"] | list[int] | int) -> str | list[str]:
        """Tokens as text: one string for one row, a list for a batch."""
        tokenizer = self._require_tokenizer()
        ids = torch.as_tensor(tokens).tolist()
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def to_str_tokens(self, text: str | Int[Tensor, "*shape"], prepend_bos: bool | None = None) -> list[str]:
        """Each token of one text (or of one row of tokens), decoded by itself."""
        tokens = (
            self.to_tokens(text, prepend_bos=prepend_bos)[0]
            if isinstance(text, str)
            else torch.as_tensor(text)
        )
        tokens = tokens[0] if tokens.ndim == 2 and tokens.shape[0] == 1 else tokens
        if tokens.ndim != 1:
            raise ValueError(f"to_str_tokens takes one row of tokens, not {tuple(tokens.shape)}")
        return [str(self.to_string(int(token))) for token in tokens]

    def to_single_token(self, text: str) -> int:
        """The one token that `text` is.

        Raises:
            ValueError: it is not exactly one.
        """
        tokens = self.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(tokens) != 1:
            raise ValueError(f"{text!r} is {len(tokens)} tokens ({self.to_str_tokens(text, False)}), not one")
        return tokens[0]

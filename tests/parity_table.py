"""How close HookedMoE is to transformers on every tiny variant: `python -m tests.parity_table` prints the table.

float32: the largest difference of logits at real positions, relative to the largest logit, for unpadded, left-
and right-padded batches. bfloat16: the root mean square error of the logits against float32 with the same
(bfloat16) weights, ours over transformers' own. One token in twenty changes an expert by rounding and then carries
most of the error, in either model on tokens of its own; so many short sequences are pooled, and the error of the
median token, which no such change touches, stands beside.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens import HookedMoE
from tests.families import VARIANTS, hf_model, prompts, write_checkpoint

PADDINGS = ("none", "left", "right")
FLOAT32_LIMIT = 2e-5
BFLOAT16_LIMIT = 1.2
BFLOAT16_MEDIAN_LIMIT = 1.1


@torch.no_grad()
def real_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits `[token, vocabulary]` at real positions, of either kind of model, in float32."""
    logits = model(tokens, attention_mask=mask)
    return getattr(logits, "logits", logits)[mask.bool()].float()


def relative_error(ours: Any, theirs: Any, padding: str, seed: int = 0) -> float:
    """Largest difference of logits over largest logit, on one batch."""
    tokens, mask = prompts(padding, seed=seed, batch=3, length=21)
    expected = real_logits(theirs, tokens, mask)
    return float((real_logits(ours, tokens, mask) - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class HalfPrecision:
    """Mean square error of bfloat16 logits against float32 logits of the same weights, for each token."""

    ours: Tensor
    transformers: Tensor

    @property
    def ratio(self) -> float:
        """Root mean square error over all tokens, ours over transformers'."""
        return float((self.ours.mean() / self.transformers.mean()).sqrt())

    @property
    def median_ratio(self) -> float:
        """The same of the median token."""
        return float((self.ours.median() / self.transformers.median()).sqrt())


def half_precision_errors(directory: Path, n_batches: int = 4) -> HalfPrecision:
    """Both models' bfloat16 errors on a checkpoint stored in bfloat16."""
    exact = hf_model(directory, torch.float32, attention="sdpa", experts=None)
    theirs = hf_model(directory, torch.bfloat16, attention="sdpa", experts=None)
    ours = HookedMoE.from_pretrained(directory, dtype=torch.bfloat16, device="cpu", verbose=False)
    squares: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seed in range(n_batches):
        tokens, mask = prompts("none", seed=seed, batch=256, length=12)
        truth = real_logits(exact, tokens, mask)
        for model, errors in zip((ours, theirs), squares, strict=True):
            errors.append((real_logits(model, tokens, mask) - truth).pow(2).mean(-1))
    return HalfPrecision(*(torch.cat(errors) for errors in squares))


def main() -> None:
    """Print one row for each variant."""
    logging.disable(logging.WARNING)
    print(f"{'variant':<30}{'float32: relative error':>26}{'bf16: RMS ratio':>18}{'median ratio':>15}")
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as scratch:
            plain = write_checkpoint(variant, Path(scratch) / "plain")
            half = write_checkpoint(variant, Path(scratch) / "half", dtype=torch.bfloat16)
            ours = HookedMoE.from_pretrained(plain, dtype=torch.float32, device="cpu", verbose=False)
            theirs = hf_model(plain, torch.float32, attention="sdpa", experts=None)
            error = max(relative_error(ours, theirs, padding) for padding in PADDINGS)
            errors = half_precision_errors(half)
            print(f"{variant:<30}{error:>26.1e}{errors.ratio:>18.3f}{errors.median_ratio:>15.3f}", flush=True)


if __name__ == "__main__":
    main()

"""HookedMoE gives transformers' numbers, on a tiny random checkpoint of every variant of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import VARIANTS, hf_model, prompts, write_checkpoint
from tests.parity_table import (
    BFLOAT16_LIMIT,
    BFLOAT16_MEDIAN_LIMIT,
    FLOAT32_LIMIT,
    PADDINGS,
    half_precision_errors,
    relative_error,
)
from tests.reference import reference_cache, reference_loss_per_token


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits(hooked: Any, checkpoint: Any, variant: str, padding: str) -> None:
    """Against transformers as it runs by default: fused attention, its own choice of expert kernel."""
    theirs = hf_model(checkpoint(variant), attention="sdpa", experts=None)
    assert relative_error(hooked(variant), theirs, padding) < FLOAT32_LIMIT


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_error_is_no_larger_than_transformers(tmp_path: Path, variant: str) -> None:
    """Rounding costs what it costs transformers: over all tokens, and at the median token."""
    errors = half_precision_errors(write_checkpoint(variant, tmp_path, dtype=torch.bfloat16))
    assert errors.transformers.mean() > 0
    assert errors.ratio < BFLOAT16_LIMIT
    assert errors.median_ratio < BFLOAT16_MEDIAN_LIMIT


@pytest.mark.parametrize(
    "variant", ["olmoe_bf16", "deepseek_v2_bf16_sharded", "mixtral_bf16_sharded", "olmoe"]
)
def test_dtype_is_the_checkpoints_own_unless_asked(checkpoint: Any, variant: str) -> None:
    from moe_lens import HookedMoE

    own = HookedMoE.from_pretrained(checkpoint(variant), verbose=False)
    assert own.cfg.dtype == VARIANTS[variant].dtype
    assert {parameter.dtype for parameter in own.parameters()} == {VARIANTS[variant].dtype}
    asked = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.float16, verbose=False)
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float16}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe", "mixtral"])
def test_loss(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """Loss per token is the reference's, NaN where it is; the mean is over the others; both at once agree."""
    tokens, mask = prompts(padding)
    expected = reference_loss_per_token(hf(variant), tokens, mask)
    model = hooked(variant)
    with torch.no_grad():
        loss = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
        mean = model(tokens, attention_mask=mask, return_type="loss")
        logits, both = model(tokens, attention_mask=mask, return_type="both")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(mean, expected.nanmean(), atol=1e-5, rtol=1e-5)
    assert torch.equal(both, mean)
    assert logits.shape == (*tokens.shape, model.cfg.d_vocab)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_and_starting_at_a_layer(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """The stream that enters a layer is the reference's, and the rest of the model runs from it."""
    tokens, mask = prompts(padding)
    model = hooked(variant)
    real = mask.bool()
    stream = reference_cache(hf(variant), tokens, mask)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
        for layer in range(model.cfg.n_layers):
            stopped = model(tokens, attention_mask=mask, stop_at_layer=layer)
            expected = stream[f"blocks.{layer}.hook_resid_pre"]
            torch.testing.assert_close(stopped[real], expected[real], atol=1e-4, rtol=1e-5)
            resumed = model(stopped, attention_mask=mask, start_at_layer=layer)
            torch.testing.assert_close(resumed[real], logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(hooked: Any, variant: str) -> None:
    """A prompt alone and the same prompt padded on the right get the same logits, and never a NaN."""
    model = hooked(variant)
    tokens, mask = prompts("right")
    length = int(mask[1].sum())
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask)
        alone = model(tokens[1:2, :length])
        assert not model(*prompts("left")[:1], attention_mask=prompts("left")[1]).isnan().any()
    assert not padded.isnan().any()
    torch.testing.assert_close(padded[1, :length], alone[0], atol=1e-5, rtol=1e-5)

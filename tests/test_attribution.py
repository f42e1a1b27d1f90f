"""Router logits divided among senders: against dense loops, on every family; and that the check can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import HookedMoE
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import ROUNDING
from tests.families import PLAIN_VARIANTS, prompts
from tests.reference import reference_run
from tests.reference_routing import dense_scores

# One of each family, and those whose streams differ in kind: dense layers, attention biases, groups.
VARIANTS = (
    "olmoe",
    "olmoe_bias_odd_width",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "qwen3_moe",
    "qwen3_moe_dense_bias",
    "mixtral",
)


def load(checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype = torch.float32) -> HookedMoE:
    return HookedMoE.from_pretrained(checkpoint(variant), dtype=dtype, verbose=False)


def run(
    model: HookedMoE, padding: str = "none", length: int = 9
) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    tokens, mask = prompts(padding, length=length)
    names = attribution_hooks(model, model.cfg.moe_layers)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=names, return_type=None, return_cache_object=False
        )
    assert isinstance(cache, dict)
    return tokens, cache, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_score_is_the_reference_s(
    checkpoint: Callable[[str], Path], hf: Callable[[str], Any], variant: str, padding: str
) -> None:
    model = load(checkpoint, variant)
    tokens, cache, mask = run(model, padding)
    with torch.no_grad():
        _, values = reference_run(hf(variant), tokens, mask)
    for receiver in model.cfg.moe_layers:
        attrs = router_logit_attrs(model, cache, receiver=receiver)
        expected = dense_scores(hf(variant), values, receiver)
        assert attrs.senders == tuple(expected)
        size = float(attrs.logits.abs().max())
        for name, got in zip(attrs.senders, attrs.values.numpy(), strict=True):
            np.testing.assert_allclose(got, expected[name], atol=2e-5 * size, err_msg=f"{name} at {receiver}")


@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_scores_sum_to_the_logits_in_float32(checkpoint: Callable[[str], Path], variant: str) -> None:
    model = load(checkpoint, variant)
    _, cache, _ = run(model, "right")
    for receiver in model.cfg.moe_layers:
        attrs = router_logit_attrs(model, cache, receiver=receiver)
        assert attrs.completeness_error <= 1e-5
        assert attrs.rounding_ratio is None
        assert attrs.values.dtype == torch.float32
        largest = float(attrs.logits.abs().max())
        torch.testing.assert_close(attrs.values.sum(dim=0), attrs.logits, atol=1e-5 * largest, rtol=0)
        # In float32 the gate itself rounds no more than the sum does.
        assert attrs.model_logit_difference <= 1e-5 * largest
        torch.testing.assert_close(
            attrs.logits, cache[f"blocks.{receiver}.mlp.hook_router_logits"], atol=1e-5 * largest, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_half_precision_the_stream_s_rounding_is_a_sender(
    checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype
) -> None:
    model = load(checkpoint, variant, dtype)
    _, cache, _ = run(model, "right", length=16)
    for receiver in model.cfg.moe_layers:
        attrs = router_logit_attrs(model, cache, receiver=receiver)
        assert attrs.senders[-1] == ROUNDING
        assert attrs.completeness_error <= 1e-5
        assert attrs.rounding_ratio is not None
        assert attrs.rounding_ratio <= 1
        total = sum(cache[hook].float() for hook in attribution_hooks(model, [receiver])[:-3])
        lost = cache[f"blocks.{receiver}.hook_resid_mid"].float() - total
        scale = cache[f"blocks.{receiver}.ln2.hook_scale"]
        expected = lost @ router_readout(model, receiver).T / scale
        torch.testing.assert_close(attrs.values[-1], expected, atol=1e-5, rtol=1e-4)
        # The gate rounds too, by at most a few units of the dtype.
        size = float(attrs.logits.abs().max())
        assert attrs.model_logit_difference <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("hook", ["hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"])
def test_the_check_sees_a_sender_that_is_not_what_was_written(
    checkpoint: Callable[[str], Path], hook: str
) -> None:
    model = load(checkpoint, "olmoe")
    _, cache, _ = run(model)
    cache[hook] = 0.99 * cache[hook]
    assert router_logit_attrs(model, cache, receiver=2).completeness_error > 1e-4

    half = load(checkpoint, "olmoe", torch.bfloat16)
    _, cache, _ = run(half)
    cache[hook] = torch.zeros_like(cache[hook])
    ratio = router_logit_attrs(half, cache, receiver=2).rounding_ratio
    assert ratio is not None
    assert ratio > 5


def test_the_sum_is_not_made_from_the_logits(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint, "mixtral")
    _, cache, _ = run(model)
    cache["blocks.1.mlp.hook_router_logits"] = cache["blocks.1.mlp.hook_router_logits"] + 1
    attrs = router_logit_attrs(model, cache, receiver=1)
    assert attrs.completeness_error <= 1e-5
    assert attrs.model_logit_difference == pytest.approx(1, abs=1e-4)


def test_edited_runs_are_explained_too(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint, "qwen2_moe")
    tokens, _ = prompts()
    names = attribution_hooks(model, model.cfg.moe_layers)
    with torch.no_grad(), model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
        _, cache = model.run_with_cache(tokens, names_filter=names)
    attrs = router_logit_attrs(model, cache, receiver=2)
    assert attrs.completeness_error <= 1e-5
    assert float(attrs.values[attrs.senders.index("M0")].abs().max()) == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), length=st.integers(1, 12))
def test_sums_close_whatever_the_tokens(tiny: HookedMoE, seed: int, batch: int, length: int) -> None:
    tokens, _ = prompts(seed=seed, batch=batch, length=length)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens, names_filter=attribution_hooks(tiny, tiny.cfg.moe_layers))
    for receiver in tiny.cfg.moe_layers:
        assert router_logit_attrs(tiny, cache, receiver=receiver).completeness_error <= 1e-5


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> HookedMoE:
    return load(checkpoint, "deepseek_v2")


def test_frame_has_one_row_per_score(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint, "mixtral")
    _, cache, _ = run(model)
    attrs = router_logit_attrs(model, cache, receiver=1)
    frame = attrs.to_frame()
    assert len(frame) == attrs.values.numel()
    row = frame.query("sender == 'A1' and batch == 1 and position == 4 and expert == 3")
    expected = float(attrs.values[attrs.senders.index("A1"), 1, 4, 3])
    assert row["score"].tolist() == [pytest.approx(expected)]


def test_clear_errors(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint, "deepseek_v2")  # layer 0 is dense
    _, cache, _ = run(model)
    with pytest.raises(ValueError, match=r"receiver 0 is no MoE layer.*1, 2"):
        router_logit_attrs(model, cache, receiver=0)
    with pytest.raises(ValueError, match=r"receiver True is no MoE layer"):
        router_logit_attrs(model, cache, receiver=True)
    with pytest.raises(ValueError, match=r"by='neurons' is no granularity; available: 'layer'"):
        router_logit_attrs(model, cache, receiver=1, by="neurons")

    lacking = {name: value for name, value in cache.items() if name != "blocks.0.hook_mlp_out"}
    with pytest.raises(KeyError, match=r"blocks\.0\.hook_mlp_out"):
        router_logit_attrs(model, lacking, receiver=1)

    without_batch = {name: value[0] for name, value in cache.items()}
    with pytest.raises(ValueError, match="without its batch and position axes"):
        router_logit_attrs(model, without_batch, receiver=1)

    cache["blocks.0.hook_mlp_out"] = cache["blocks.0.hook_mlp_out"] * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        router_logit_attrs(model, cache, receiver=1)

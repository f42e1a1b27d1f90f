"""Router logits divided among senders: against dense loops, on every family; and that the check can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing import attribution
from moe_lens.routing.attribution import RouterLogitAttrs, attribution_hooks, router_logit_attrs
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import GRANULARITIES, ROUNDING
from tests.families import FAMILIES, PLAIN_VARIANTS, prompts
from tests.reference import reference_run
from tests.reference_routing import readout_scores, sender_vectors
from tests.routing_cases import VARIANTS, cached_run

Load = Callable[[str], Any]

# A hook value inside a component that each granularity divides.
INSIDE = {
    "layer": "blocks.0.hook_attn_out",
    "head": "blocks.1.attn.hook_z",
    "source": "blocks.1.attn.hook_v",
    "expert": "blocks.1.mlp.hook_expert_contrib",
    "neuron": "blocks.1.mlp.hook_expert_post",
}


def attrs_of(model: HookedMoE, by: str, padding: str = "right", length: int = 9) -> list[RouterLogitAttrs]:
    cache = cached_run(model, prompts(padding, length=length), by)
    return [router_logit_attrs(model, cache, receiver=r, by=by) for r in model.cfg.moe_layers]


# ---- against the slow reference ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_score_is_the_reference_s(hf: Load, model_of: Load, variant: str, by: str) -> None:
    model = model_of(variant)
    # One side for each; both for whole layers.
    paddings = ("left", "right") if by == "layer" else (("left", "right")[VARIANTS.index(variant) % 2],)
    for padding in paddings:
        batch = prompts(padding, length=7)
        cache = cached_run(model, batch, by)
        with torch.no_grad():
            _, values = reference_run(hf(variant), *batch)
        for receiver in model.cfg.moe_layers:
            attrs = router_logit_attrs(model, cache, receiver=receiver, by=by)
            vectors = sender_vectors(hf(variant), values, receiver, by)
            assert attrs.senders == list(vectors)
            assert (attrs.receiver, attrs.by) == (receiver, by)
            assert attrs.completeness_error <= 1e-5
            # Neurons are many: every 5th has its scores made one by one.
            compared = list(vectors)[:: 5 if by == "neuron" else 1]
            expected = {n: readout_scores(hf(variant), values, receiver, vectors[n]) for n in compared}
            size = max(np.abs(scores).max() for scores in expected.values())
            for name in compared:
                got = attrs.values[attrs.senders.index(name)].numpy()
                np.testing.assert_allclose(
                    got, expected[name], rtol=1e-4, atol=1e-5 * size, err_msg=f"{name} at {receiver}"
                )


@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_scores_sum_to_the_logits_in_float32(model_of: Load, variant: str) -> None:
    model = model_of(variant)
    for by in GRANULARITIES:
        cache = cached_run(model, prompts("right", length=5), by)
        for receiver in model.cfg.moe_layers:
            attrs = router_logit_attrs(model, cache, receiver=receiver, by=by)
            assert attrs.completeness_error <= 1e-5
            assert attrs.rounding_ratio is None
            assert ROUNDING not in attrs.senders
            assert attrs.values.dtype == torch.float32
            largest = float(attrs.logits.abs().max())
            torch.testing.assert_close(attrs.values.sum(dim=0), attrs.logits, atol=2e-5 * largest, rtol=0)
            # In float32 the gate itself rounds no more than the sum does.
            assert attrs.model_logit_difference <= 1e-5 * largest
            torch.testing.assert_close(
                attrs.logits, cache[f"blocks.{receiver}.mlp.hook_router_logits"], atol=1e-5 * largest, rtol=0
            )


def test_every_granularity_only_divides_its_own_kind(model_of: Load) -> None:
    """Parts summed back to components are the components' scores by layer."""
    model = model_of("deepseek_v2_bias")
    whole = attrs_of(model, "layer")[-1]
    for by in GRANULARITIES[1:]:
        attrs = attrs_of(model, by)[-1]
        size = float(attrs.values.abs().max())
        for i, group in enumerate(attrs.senders.groups):
            parts = attrs.values[attrs.senders.slice_of(group.component)].sum(dim=0)
            assert whole.senders[i] == group.component
            torch.testing.assert_close(parts, whole.values[i], atol=1e-5 * size, rtol=0, msg=group.component)


# ---- half precision ----


@pytest.fixture(scope="module")
def half(checkpoint: Load) -> Callable[..., HookedMoE]:
    models: dict[Any, HookedMoE] = {}

    def load(variant: str, dtype: torch.dtype = torch.bfloat16) -> HookedMoE:
        if (variant, dtype) not in models:
            models[variant, dtype] = HookedMoE.from_pretrained(
                checkpoint(variant), dtype=dtype, device="cpu", verbose=False
            )
        return models[variant, dtype]

    return load


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_half_precision_the_stream_s_rounding_is_a_sender(
    half: Callable[..., HookedMoE], variant: str, dtype: torch.dtype
) -> None:
    model = half(variant, dtype)
    for by in GRANULARITIES if dtype == torch.bfloat16 else ("layer", "expert"):
        for attrs in attrs_of(model, by, length=12):
            assert attrs.senders[-1] == ROUNDING
            assert ROUNDING not in attrs.senders[:-1]
            assert len(attrs.senders) == len(attrs.values)
            assert attrs.completeness_error <= 1e-5
            assert attrs.rounding_ratio is not None
            assert 0 < attrs.rounding_ratio <= 1, (by, attrs.receiver)
            assert attrs.values.dtype == torch.float32
            # The gate rounds too, by at most a few units of the dtype.
            size = float(attrs.logits.abs().max())
            assert attrs.model_logit_difference <= 8 * torch.finfo(dtype).eps * size


def test_rounding_is_what_the_stream_holds_beyond_its_senders(half: Callable[..., HookedMoE]) -> None:
    model = half("qwen3_moe")
    cache = cached_run(model, prompts("right", length=16))
    for receiver in model.cfg.moe_layers:
        attrs = router_logit_attrs(model, cache, receiver=receiver)
        total = sum(cache[group.written_at].float() for group in attrs.senders.groups[:-1])
        lost = cache[f"blocks.{receiver}.hook_resid_mid"].float() - total
        scale = cache[f"blocks.{receiver}.ln2.hook_scale"].float()
        expected = lost @ router_readout(model, receiver).T / scale
        torch.testing.assert_close(attrs.values[-1], expected, atol=1e-5, rtol=1e-4)


# One sender of each granularity, by the part of a hook value that holds it.
def _slot(value: Tensor, factor: float) -> Tensor:
    """Times a factor at one place of the third axis: a head, a chosen expert."""
    value = value.clone()
    value[:, :, 0] = factor * value[:, :, 0]
    return value


TAMPERED: dict[str, list[tuple[str, Callable[[Tensor, float], Tensor]]]] = {
    "layer": [
        ("hook_embed", lambda v, f: f * v),
        ("blocks.0.hook_attn_out", lambda v, f: f * v),
        ("blocks.1.hook_mlp_out", lambda v, f: f * v),
    ],
    "head": [("blocks.1.attn.hook_z", _slot)],
    "source": [
        ("blocks.1.attn.hook_v", lambda v, f: torch.cat((f * v[:, :1], v[:, 1:]), dim=1)),
        ("blocks.0.attn.hook_pattern", lambda v, f: torch.cat((f * v[:, :1], v[:, 1:]), dim=1)),
    ],
    "expert": [
        ("blocks.1.mlp.hook_expert_contrib", _slot),
        ("blocks.1.mlp.hook_shared_out", lambda v, f: f * v),
    ],
    "neuron": [
        ("blocks.1.mlp.hook_expert_post", lambda v, f: _slot(v, f)),
        ("blocks.1.mlp.hook_routing_weights", lambda v, f: _slot(v, f)),
        ("blocks.1.mlp.hook_shared_gate", lambda v, f: f * v),
        ("blocks.0.mlp.hook_shared_post", lambda v, f: f * v),
    ],
}
CASES = [(by, hook, tamper) for by, cases in TAMPERED.items() for hook, tamper in cases]


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["deleted", "doubled"])
@pytest.mark.parametrize(("by", "hook", "tamper"), CASES, ids=[f"{by}-{hook}" for by, hook, _ in CASES])
def test_the_check_sees_a_sender_left_out_or_twice(
    model_of: Load,
    half: Callable[..., HookedMoE],
    by: str,
    hook: str,
    tamper: Callable[[Tensor, float], Tensor],
    factor: float,
) -> None:
    """In float32 the sum does not close; in half precision rounding is more than it can be."""
    for model in (model_of("qwen2_moe"), half("qwen2_moe")):
        cache = cached_run(model, prompts(), by)
        clean = router_logit_attrs(model, cache, receiver=2, by=by)
        attrs = router_logit_attrs(model, {**cache, hook: tamper(cache[hook], factor)}, receiver=2, by=by)
        if model.cfg.dtype == torch.float32:
            assert clean.completeness_error <= 1e-5
            assert attrs.completeness_error > 1e-3
        else:
            assert clean.rounding_ratio is not None
            assert clean.rounding_ratio <= 1
            assert attrs.rounding_ratio is not None
            assert attrs.rounding_ratio > 1
            assert attrs.completeness_error <= 1e-5  # rounding takes up whatever is missing, and is bounded


@pytest.mark.parametrize("by", GRANULARITIES[1:])
def test_in_half_precision_each_single_part_is_missed(half: Callable[..., HookedMoE], by: str) -> None:
    """One head, one expert, one neuron, one (head, source): rounding cannot be as much as it wrote.

    Of sources, those that are attended to: what is hardly attended to is lost in rounding.
    """
    model = half("olmoe")
    cache = cached_run(model, prompts(), by)
    hook = {**INSIDE, "source": "blocks.1.attn.hook_pattern"}[by]
    value, indices = cache[hook], cache.get("blocks.1.mlp.hook_expert_indices")
    parts = {
        "head": [(slice(None), slice(None), head) for head in range(4)],
        "source": [(slice(None), head, slice(None), source) for head in range(4) for source in range(3)],
        "neuron": [(..., neuron) for neuron in range(0, 32, 5)],
    }
    where = parts.get(by) or [indices == expert for expert in range(8)]
    for part in where:
        without = value.clone()
        without[part] = 0
        ratio = router_logit_attrs(model, {**cache, hook: without}, receiver=2, by=by).rounding_ratio
        assert ratio is not None
        assert ratio > 1, part


@pytest.mark.parametrize("by", GRANULARITIES)
def test_a_small_error_is_seen_in_float32(model_of: Load, by: str) -> None:
    model = model_of("olmoe")
    cache = cached_run(model, prompts(), by)
    cache[INSIDE[by]] = 0.999 * cache[INSIDE[by]]
    assert router_logit_attrs(model, cache, receiver=2, by=by).completeness_error > 5e-5


@pytest.mark.parametrize("by", GRANULARITIES)
def test_a_stream_that_holds_more_than_its_senders_is_seen(
    model_of: Load, half: Callable[..., HookedMoE], by: str
) -> None:
    stream = "blocks.2.hook_resid_mid"
    model = model_of("olmoe")
    cache = cached_run(model, prompts(), by)
    cache[stream] = cache[stream] + 0.01
    assert router_logit_attrs(model, cache, receiver=2, by=by).completeness_error > 1e-4
    cache = cached_run(half("olmoe"), prompts(), by)
    cache[stream] = cache[stream] + 1
    ratio = router_logit_attrs(half("olmoe"), cache, receiver=2, by=by).rounding_ratio
    assert ratio is not None
    assert ratio > 1


def test_the_sum_is_not_made_from_the_logits(model_of: Load) -> None:
    model = model_of("mixtral")
    cache = cached_run(model, prompts())
    cache["blocks.1.mlp.hook_router_logits"] = cache["blocks.1.mlp.hook_router_logits"] + 1
    attrs = router_logit_attrs(model, cache, receiver=1)
    assert attrs.completeness_error <= 1e-5
    assert attrs.model_logit_difference == pytest.approx(1, abs=1e-4)


# ---- caches ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "deepseek_v2_bias"])
def test_the_hooks_suffice_and_are_needed(model_of: Load, variant: str, by: str) -> None:
    model = model_of(variant)
    for receiver in model.cfg.moe_layers:
        names = attribution_hooks(model, [receiver], by=by)
        assert len(set(names)) == len(names)
        assert set(names) <= set(model.hook_dict)
        with torch.no_grad():
            _, cache = model.run_with_cache(prompts()[0], names_filter=names)
        assert set(cache.cache_dict) == set(names)
        router_logit_attrs(model, cache, receiver=receiver, by=by)
        for name in names:
            lacking = {other: value for other, value in cache.items() if other != name}
            with pytest.raises(KeyError, match=rf"the cache lacks {name}; attribution_hooks"):
                router_logit_attrs(model, lacking, receiver=receiver, by=by)


def test_hooks_of_several_receivers_are_those_of_each(model_of: Load) -> None:
    model = model_of("qwen2_moe")
    together = attribution_hooks(model, [0, 2], by="neuron")
    each = {name for r in (0, 2) for name in attribution_hooks(model, [r], by="neuron")}
    assert set(together) == each
    assert len(together) == len(each)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_caches_without_batch_or_with_some_positions(model_of: Load, by: str) -> None:
    model, batch = model_of("olmoe"), prompts()
    whole = router_logit_attrs(model, cached_run(model, batch, by), receiver=2, by=by)
    without_batch = cached_run(model, (batch[0][:1], batch[1][:1]), by, remove_batch_dim=True)
    with pytest.raises(
        ValueError, match="without its batch and position axes; cache with remove_batch_dim=Fal"
    ):
        router_logit_attrs(model, without_batch, receiver=2, by=by)
    for where in (3, slice(2, 5)):
        sliced = cached_run(model, batch, by, pos_slice=where)
        if by == "source":  # a source is a column of the batch, and those are gone
            with pytest.raises(ValueError, match=r"which is not of the \(2, [13]\) batch rows and positions"):
                router_logit_attrs(model, sliced, receiver=2, by=by)
            continue
        some = router_logit_attrs(model, sliced, receiver=2, by=by)
        kept = whole.values[:, :, where] if isinstance(where, slice) else whole.values[:, :, [where]]
        torch.testing.assert_close(some.values, kept)
    # One value of another run.
    cache = cached_run(model, batch, by)
    name = INSIDE[by]
    cache[name] = cache[name][:1]
    with pytest.raises(ValueError, match=rf"{name} in the cache is .* which is not of the \(2, 9\) batch"):
        router_logit_attrs(model, cache, receiver=2, by=by)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_what_is_not_finite_raises(model_of: Load, by: str) -> None:
    model = model_of("olmoe")
    cache = cached_run(model, prompts(), by)
    for bad in (float("nan"), float("inf")):
        spoilt = cache[INSIDE[by]].clone()
        spoilt[1, 1] = bad
        with pytest.raises(ValueError, match="the scores at layer 2 hold values that are not finite"):
            router_logit_attrs(model, {**cache, INSIDE[by]: spoilt}, receiver=2, by=by)
    spoilt = cache["blocks.2.hook_resid_mid"] * float("nan")
    with pytest.raises(ValueError, match="the router's logits at layer 2 hold values that are not finite"):
        router_logit_attrs(model, {**cache, "blocks.2.hook_resid_mid": spoilt}, receiver=2, by=by)


def test_too_many_scores_name_the_stream(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("olmoe")
    cache = cached_run(model, prompts(), "neuron")
    n_scores = 2 * 9 * 8 * (1 + 3 + 2 * 8 * 32)
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_scores)
    assert router_logit_attrs(model, cache, receiver=2, by="neuron").values.numel() == n_scores
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_scores - 1)
    with pytest.raises(ValueError, match=rf"by='neuron' makes {n_scores:,} .*routing_contributions\(model"):
        router_logit_attrs(model, cache, receiver=2, by="neuron")


def test_gradients_are_left_alone(model_of: Load) -> None:
    model = model_of("mixtral")
    _, cache = model.run_with_cache(prompts()[0], names_filter=attribution_hooks(model, [1], by="head"))
    attrs = router_logit_attrs(model, cache, receiver=1, by="head")
    assert not attrs.values.requires_grad
    assert not attrs.logits.requires_grad


def test_edited_runs_are_explained_too(model_of: Load) -> None:
    model = model_of("qwen2_moe")
    tokens, _ = prompts()
    for by in GRANULARITIES:
        names = attribution_hooks(model, model.cfg.moe_layers, by=by)
        edit = ("blocks.0.mlp.hook_expert_contrib", lambda value, hook: 0 * value)
        if by == "neuron":  # neurons know nothing of an edit behind them, and the check says so
            with torch.no_grad(), model.hooks([edit]):
                _, cache = model.run_with_cache(tokens, names_filter=names)
            assert router_logit_attrs(model, cache, receiver=2, by=by).completeness_error > 1e-3
            edit = ("blocks.0.mlp.hook_routing_weights", lambda value, hook: 0 * value)
        with torch.no_grad(), model.hooks([edit]):
            _, cache = model.run_with_cache(tokens, names_filter=names)
        attrs = router_logit_attrs(model, cache, receiver=2, by=by)
        assert attrs.completeness_error <= 1e-5, by
        if by in ("expert", "neuron"):
            n_routed = 8 * (1 if by == "expert" else 32)
            routed = attrs.values[attrs.senders.slice_of("M0")][:n_routed]
            assert float(routed.abs().max()) == 0


@pytest.mark.parametrize("variant", FAMILIES)
def test_frame_has_one_row_per_score(model_of: Load, variant: str) -> None:
    attrs = attrs_of(model_of(variant), "expert")[-1]
    frame = attrs.to_frame()
    assert list(frame.columns) == ["sender", "batch", "position", "expert", "score"]
    assert len(frame) == attrs.values.numel()
    row = frame.query(f"sender == '{attrs.senders[-2]}' and batch == 1 and position == 4 and expert == 3")
    assert row["score"].tolist() == [float(attrs.values[-2, 1, 4, 3])]


def test_clear_errors(model_of: Load) -> None:
    model = model_of("deepseek_v2")  # layer 0 is dense
    cache = cached_run(model, prompts())
    for wrong in (0, 3, True, "M1", 1.0, None):
        with pytest.raises(ValueError, match=rf"receiver {wrong!r} is no MoE layer.*MoE layers 1, 2"):
            router_logit_attrs(model, cache, receiver=wrong)
        with pytest.raises(ValueError, match="is no MoE layer"):
            attribution_hooks(model, [1, wrong])
    for call in (
        lambda by: router_logit_attrs(model, cache, receiver=1, by=by),
        lambda by: attribution_hooks(model, [1], by=by),
    ):
        with pytest.raises(
            ValueError, match=r"by='neurons' is no granularity; available: 'layer', 'head', 's"
        ):
            call("neurons")

"""Logits divided among senders: against loops and transformers, on every family; and that the check can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.logit_attribution import LogitAttrs, logit_attrs, logits_as_rounded
from moe_lens.routing.senders import GRANULARITIES, ROUNDING
from tests.families import FAMILIES, PLAIN_VARIANTS, hf_model, prompts
from tests.reference import reference_run
from tests.reference_logits import all_sender_vectors, logit_scores, read_at, written_as_transformers_says
from tests.routing_cases import VARIANTS, final_run, targets

Load = Callable[[str], Any]


def side_of(variant: str) -> str:
    return ("left", "right")[VARIANTS.index(variant) % 2]


def assert_is_the_reference(attrs: LogitAttrs, hf: Any, values: Any, correct: Any, incorrect: Any) -> None:
    vectors = all_sender_vectors(hf, values, attrs.by)
    assert attrs.senders[: len(vectors)] == list(vectors)
    # Neurons are many: every 5th has its scores made one by one.
    compared = list(vectors)[:: 5 if attrs.by == "neuron" else 1]
    expected = {name: logit_scores(hf, values, vectors[name], correct, incorrect) for name in compared}
    size = max(np.abs(scores).max() for scores in expected.values())
    for name in compared:
        got = attrs.values[attrs.senders.index(name)].numpy()
        np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=1e-5 * size, err_msg=name)


# ---- against the slow reference, and transformers ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_score_is_the_reference_s(hf: Load, model_of: Load, variant: str, by: str) -> None:
    model, batch = model_of(variant), prompts(side_of(variant), length=7)
    correct, incorrect = targets(batch)
    with torch.no_grad():
        _, values = reference_run(hf(variant), *batch)
    cache = final_run(model, batch, by)
    for subtracted in (None, incorrect):
        attrs = logit_attrs(model, cache, correct, subtracted, by=by)
        assert attrs.by == by
        assert attrs.completeness_error <= 1e-5
        assert len(attrs.senders) == len(attrs.values)
        assert_is_the_reference(attrs, hf(variant), values, correct, subtracted)


@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_scores_sum_to_transformers_logits_in_float32(hf: Load, model_of: Load, variant: str) -> None:
    model = model_of(variant)
    for padding in ("none", "left", "right"):
        batch = prompts(padding, length=6)
        correct, incorrect = targets(batch)
        written, logits = written_as_transformers_says(hf(variant), *batch)
        real, size = batch[1].bool(), float(logits.abs().max())
        for by in GRANULARITIES:
            cache = final_run(model, batch, by)
            for subtracted in (None, incorrect):
                attrs = logit_attrs(model, cache, correct, subtracted, by=by)
                assert attrs.completeness_error <= 1e-5
                assert attrs.rounding_ratio is None
                assert ROUNDING not in attrs.senders
                assert attrs.values.dtype == torch.float32
                assert attrs.model_logit_difference <= 1e-5 * size
                expected = read_at(logits, correct, subtracted)
                for got in (attrs.values.sum(dim=0), attrs.logits):
                    torch.testing.assert_close(got[real], expected[real], atol=2e-5 * size, rtol=0)
            # Layer by layer too, from what transformers' modules hand over.
            stream = sum(written.values())
            values = {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": torch.from_numpy(stream)}
            for group in attrs.senders.groups:
                got = attrs.values[attrs.senders.slice_of(group.component)].sum(dim=0)
                whole = logit_scores(hf(variant), values, written[group.component], correct, incorrect)
                np.testing.assert_allclose(
                    got[real], whole[real.numpy()], atol=2e-5 * size, rtol=1e-4, err_msg=group.component
                )


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_score_is_what_the_logit_loses_without_the_sender(model_of: Load, variant: str) -> None:
    """What an expert wrote is taken out of the last stream, its scale held: the logits move by its scores, exactly."""
    model, batch = model_of(variant), prompts("left")
    last = model.cfg.n_layers - 1
    cache = final_run(model, batch, "expert")
    correct, incorrect = targets(batch)
    attrs = logit_attrs(model, cache, correct, incorrect, by="expert")
    contributions, indices = (
        cache[f"blocks.{last}.mlp.{p}"] for p in ("hook_expert_contrib", "hook_expert_indices")
    )
    for expert in range(0, 8, 3):
        chosen = indices == expert
        removed = (contributions * chosen[..., None]).sum(dim=2)
        with (
            torch.no_grad(),
            model.hooks(
                [
                    (f"blocks.{last}.hook_resid_post", lambda value, hook, z=removed: value - z),
                    ("ln_final.hook_scale", lambda value, hook: cache["ln_final.hook_scale"]),
                ]
            ),
        ):
            without = model(batch[0], attention_mask=batch[1])
        lost = read_at(cache["logits"] - without, correct, incorrect)
        scores = attrs.values[attrs.senders.index(f"M{last}E{expert}")]
        torch.testing.assert_close(scores, lost, atol=2e-5 * float(cache["logits"].abs().max()), rtol=0)
        # And nothing at all where it was not chosen.
        assert not scores[~chosen.any(dim=-1)].any()


def test_next_tokens_are_the_loss_s(hf: Load, model_of: Load) -> None:
    """As the docstring says: the logits of the tokens that came next."""
    model, (tokens, mask) = model_of("qwen3_moe"), prompts()
    cache = final_run(model, (tokens, mask))
    attrs = logit_attrs(model, cache, tokens[:, 1:], positions=slice(0, -1))
    with torch.no_grad():
        logits = hf("qwen3_moe")(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    got = (logits.logsumexp(dim=-1) - attrs.values.sum(dim=0)).mean()
    torch.testing.assert_close(got, loss, atol=1e-5, rtol=1e-5)


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
    model, batch = half(variant, dtype), prompts(side_of(variant), length=12)
    correct, incorrect = targets(batch)
    for by in GRANULARITIES if dtype == torch.bfloat16 else ("layer", "expert"):
        cache = final_run(model, batch, by)
        logits = cache["logits"].float()
        # Each logit is rounded once, after a gain and a norm that round: a few units of the largest.
        rounded = 4 * torch.finfo(dtype).eps * float(logits.abs().max())
        for subtracted in (None, incorrect):
            attrs = logit_attrs(model, cache, correct, subtracted, by=by)
            assert attrs.senders[-1] == ROUNDING
            assert ROUNDING not in attrs.senders[:-1]
            assert len(attrs.senders) == len(attrs.values)
            assert attrs.completeness_error <= 1e-5
            assert attrs.rounding_ratio is not None
            assert 0 < attrs.rounding_ratio <= 1, by
            assert attrs.values.dtype == torch.float32
            difference = float((attrs.logits - read_at(logits, correct, subtracted)).abs().max())
            assert 0 < difference <= rounded
            assert attrs.model_logit_difference == pytest.approx(difference, abs=rounded / 4)
        # Bit for bit the model's, but for sums in another order that fall on the other side of a rounding.
        as_rounded = logits_as_rounded(model, cache["ln_final.hook_normalized"], correct)
        assert (as_rounded == read_at(logits, correct)).float().mean() > 0.9


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_in_half_precision_scores_are_exact_for_what_was_stored(
    checkpoint: Load, half: Callable[..., HookedMoE], variant: str, by: str
) -> None:
    """The reference reads the same stored values, in float64; so only float32's own errors are left."""
    model, batch = half(variant), prompts("right", length=6)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch[0], attention_mask=batch[1], return_cache_object=False)
    assert isinstance(cache, dict)
    correct, incorrect = targets(batch)
    attrs = logit_attrs(model, cache, correct, incorrect, by=by)
    hf = hf_model(checkpoint(variant), torch.bfloat16)
    assert_is_the_reference(attrs, hf, cache, correct, incorrect)
    stream = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"].double()
    lost = stream.numpy() - sum(all_sender_vectors(hf, cache, by).values())
    expected = logit_scores(hf, cache, lost, correct, incorrect)
    np.testing.assert_allclose(
        attrs.values[-1], expected, rtol=1e-3, atol=1e-5 * float(attrs.values.abs().max())
    )


# ---- against TransformerLens ----


@pytest.mark.parametrize(
    "variant", ["olmoe_bias_odd_width", "qwen2_moe_no_bias", "deepseek_v2_bias", "mixtral"]
)
def test_layers_and_heads_are_transformerlens_s(model_of: Load, variant: str) -> None:
    """In every form that tokens can have there; its stack of heads has no bias, which the rest of it takes."""
    model, (tokens, mask) = model_of(variant), prompts("left", batch=3)
    model.set_use_attn_result(True)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        layers = cache.decompose_resid(-1)
        heads, names = cache.stack_head_results(-1, return_labels=True)
        for form, other in (
            ("e", ","),
            (7, 8),
            (torch.tensor(9), torch.tensor(1)),
            (tokens[:, 0], tokens[:, 1]),
            (tokens[0], tokens[1]),
            (tokens[:1], tokens[1:2]),
            (tokens, tokens.flip(1)),
        ):
            for subtracted in (None, other):
                expected = cache.logit_attrs(layers, form, subtracted)
                got = logit_attrs(model, cache, form, subtracted)
                torch.testing.assert_close(got.values, expected, atol=2e-5, rtol=1e-4)
                expected = cache.logit_attrs(heads, form, subtracted)
                got = logit_attrs(model, cache, form, subtracted, by="head")
                rows = [got.senders.index(f"A{name[1:]}") for name in names]
                torch.testing.assert_close(got.values[rows], expected, atol=2e-5, rtol=1e-4)


# ---- the check can fail ----


def _slot(value: Tensor, factor: float) -> Tensor:
    """Times a factor at one place of the third axis: a head, a chosen expert."""
    value = value.clone()
    value[:, :, 0] = factor * value[:, :, 0]
    return value


def _whole(value: Tensor, factor: float) -> Tensor:
    return factor * value


CASES: list[tuple[str, str, Callable[[Tensor, float], Tensor]]] = [
    ("layer", "hook_embed", _whole),
    ("layer", "blocks.0.hook_attn_out", _whole),
    ("layer", "blocks.2.hook_mlp_out", _whole),
    ("head", "blocks.2.attn.hook_z", _slot),
    ("source", "blocks.1.attn.hook_v", lambda v, f: torch.cat((f * v[:, :1], v[:, 1:]), dim=1)),
    ("source", "blocks.0.attn.hook_pattern", lambda v, f: torch.cat((f * v[:, :1], v[:, 1:]), dim=1)),
    ("expert", "blocks.2.mlp.hook_expert_contrib", _slot),
    ("expert", "blocks.1.mlp.hook_shared_out", _whole),
    ("neuron", "blocks.2.mlp.hook_expert_post", _slot),
    ("neuron", "blocks.1.mlp.hook_routing_weights", _slot),
    ("neuron", "blocks.1.mlp.hook_shared_gate", _whole),
    ("neuron", "blocks.2.mlp.hook_shared_post", _whole),
]


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
        batch = prompts()
        cache, (correct, incorrect) = final_run(model, batch, by), targets(batch)
        clean = logit_attrs(model, cache, correct, incorrect, by=by)
        attrs = logit_attrs(model, {**cache, hook: tamper(cache[hook], factor)}, correct, incorrect, by=by)
        if model.cfg.dtype == torch.float32:
            assert clean.completeness_error <= 1e-5
            assert attrs.completeness_error > 1e-3
        else:
            assert clean.rounding_ratio is not None
            assert clean.rounding_ratio <= 1
            assert attrs.rounding_ratio is not None
            assert attrs.rounding_ratio > 1
            assert attrs.completeness_error <= 1e-5  # rounding takes up whatever is missing, and is bounded


def test_the_sum_is_not_made_from_the_logits(model_of: Load) -> None:
    """A model that unembeds something else than its stream says so, and the sum is still that of the stream."""
    model, batch = model_of("mixtral"), prompts()
    cache = final_run(model, batch)
    clean = logit_attrs(model, cache, 7)
    cache["ln_final.hook_normalized"] = cache["ln_final.hook_normalized"] + 1
    attrs = logit_attrs(model, cache, 7)
    assert attrs.completeness_error <= 1e-5
    assert torch.equal(attrs.values, clean.values)
    moved = abs(float((model.ln_final.w * model.W_U[:, 7]).detach().sum()))
    assert attrs.model_logit_difference == pytest.approx(moved, rel=1e-4)


def test_edited_runs_are_explained_too(model_of: Load) -> None:
    model, batch = model_of("qwen2_moe"), prompts()
    edit = ("blocks.2.mlp.hook_routing_weights", lambda value, hook: 0 * value)
    for by in GRANULARITIES:
        with model.hooks([edit]):
            cache = final_run(model, batch, by)
        attrs = logit_attrs(model, cache, *targets(batch), by=by)
        assert attrs.completeness_error <= 1e-5
        if by in ("expert", "neuron"):
            n_routed = 8 * (1 if by == "expert" else 32)
            assert not attrs.values[attrs.senders.slice_of("M2")][:n_routed].any()
            assert attrs.values[attrs.senders.slice_of("M2")][n_routed:].any()

"""`router_logit_attrs` and `logit_attrs` of a model in nnsight against those of HookedMoE's caches of the same text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens import routing as on_caches
from moe_lens.interop.nnsight import logit_attrs, plan, router_logit_attrs, traffic
from moe_lens.routing import LogitAttrs, RouterLogitAttrs, attribution
from moe_lens.routing.senders import GRANULARITIES, ROUNDING
from tests.families import FAMILIES, VOCABULARY, prompts
from tests.nnsight_cases import lazy_model, traced_model
from tests.nnsight_server import Server, client
from tests.reference import assert_same
from tests.routing_cases import VARIANTS, cached_run, final_run, targets

Load = Callable[[str], Any]
Attrs = RouterLogitAttrs | LogitAttrs


@pytest.fixture(scope="module")
def traced_half(checkpoint: Callable[[str], Path]) -> Load:
    return once(lambda variant: traced_model(checkpoint(variant), torch.bfloat16))


@pytest.fixture(scope="module")
def half(checkpoint: Callable[[str], Path]) -> Load:
    return once(
        lambda variant: HookedMoE.from_pretrained(
            checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False
        )
    )


def assert_same_attrs(ours: Any, expected: Any, real: Tensor) -> None:
    """The same senders, scores and logits; at padded places they mean nothing."""
    assert type(ours) is type(expected)
    assert ours.senders == expected.senders
    assert ours.by == expected.by
    assert ours.values.dtype == ours.logits.dtype == torch.float32
    assert not ours.values.requires_grad
    assert_same(ours.values[:, real], expected.values[:, real], "scores", tolerance=1e-5)
    assert_same(ours.logits[real], expected.logits[real], "logits", tolerance=1e-5)
    assert ours.completeness_error <= 1e-5
    assert ours.rounding_ratio is None
    assert ours.model_logit_difference <= 1e-5 * float(expected.logits.abs().max())


# ---- in float32 ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_router_scores_are_those_of_hooked_moe(traced: Load, model_of: Load, variant: str, by: str) -> None:
    model, lm = model_of(variant), traced(variant)
    for padding in ("none", "left", "right"):
        batch = prompts(padding, length=7)
        cache = cached_run(model, batch, by)
        for receiver in {model.cfg.moe_layers[0], model.cfg.moe_layers[-1]}:
            expected = on_caches.router_logit_attrs(model, cache, receiver=receiver, by=by)
            ours = router_logit_attrs(lm, batch[0], receiver=receiver, by=by, attention_mask=batch[1])
            assert ours.receiver == receiver
            assert_same_attrs(ours, expected, batch[1].bool())


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_scores_are_those_of_hooked_moe(traced: Load, model_of: Load, variant: str, by: str) -> None:
    model, lm = model_of(variant), traced(variant)
    for padding in ("none", "left", "right"):
        batch = prompts(padding, length=7)
        correct, incorrect = targets(batch)
        cache, real = final_run(model, batch, by), batch[1].bool()
        for subtracted in (None, incorrect):
            expected = on_caches.logit_attrs(model, cache, correct, subtracted, by=by)
            ours = logit_attrs(lm, batch[0], correct, subtracted, by=by, attention_mask=batch[1])
            assert_same_attrs(ours, expected, real)
            assert torch.equal(ours.tokens, correct)
            assert (subtracted is None) == (ours.incorrect_tokens is None)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_token_scores_at_positions(traced: Load, model_of: Load, by: str) -> None:
    """Columns for all rows, or each row's own; tokens in every form that HookedMoE's counterpart takes."""
    model, lm, batch = model_of("deepseek_v2_bias"), traced("deepseek_v2_bias"), prompts("right", batch=3)
    cache, real = final_run(model, batch, by), batch[1].bool()
    last = batch[1].sum(dim=1, keepdim=True) - 1
    asked: list[tuple[Any, Any, Any]] = [
        (0, " the", "a"),
        (slice(0, -1), batch[0][:, 1:], None),
        ([2, 1], [5, 6, 7], [[8, 9]]),
        (last, torch.tensor([4, 5, 6]), torch.tensor([[9], [8], [7]])),
        (torch.cat((last, last - 1), dim=1), 11, 12),
    ]
    for positions, correct, incorrect in asked:
        if isinstance(correct, str):
            correct, incorrect = (model.tokenizer.convert_tokens_to_ids(token) for token in ("t", "a"))
        expected = on_caches.logit_attrs(model, cache, correct, incorrect, by=by, positions=positions)
        ours = logit_attrs(
            lm, batch[0], correct, incorrect, by=by, positions=positions, attention_mask=batch[1]
        )
        assert torch.equal(ours.positions, expected.positions)
        assert torch.equal(ours.tokens, expected.tokens)
        assert_same_attrs(ours, expected, real.gather(1, expected.positions))
        assert len(ours.to_frame()) == expected.values.numel()


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_what_would_be_sent_gives_the_same(traced: Load, variant: str, by: str) -> None:
    """`remote="local"` runs the serialized functions, with this package hidden; to the bit."""
    lm, (tokens, mask) = traced(variant), prompts("left", length=6)
    asked: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (router_logit_attrs, {"receiver": 1}),
        (logit_attrs, {"tokens": 7, "incorrect_tokens": 9, "positions": [-1, 4]}),
    ]
    for function, settings in asked:
        here = function(lm, tokens, by=by, attention_mask=mask, **settings)
        sent = function(lm, tokens, by=by, attention_mask=mask, remote="local", **settings)
        assert torch.equal(here.values, sent.values)
        assert torch.equal(here.logits, sent.logits)
        assert here.senders == sent.senders
        assert here.completeness_error == sent.completeness_error


def test_lazy_model_and_text(checkpoint: Callable[[str], Path], model_of: Load) -> None:
    texts = ["The router sends every token", "John gave a drink to Mary, and to"]
    model, lm = model_of("qwen3_moe"), lazy_model(checkpoint("qwen3_moe"), dtype=torch.float32)
    _, mask = model.tokenize(texts)
    cache = cached_run(model, model.tokenize(texts), "head")
    expected = on_caches.router_logit_attrs(model, cache, receiver=2, by="head")
    assert_same_attrs(router_logit_attrs(lm, texts, receiver=2, by="head"), expected, mask)
    cache = final_run(model, model.tokenize(texts))
    expected = on_caches.logit_attrs(model, cache, "t", "a", positions=2)
    assert_same_attrs(logit_attrs(lm, texts, "t", "a", positions=2), expected, mask[:, 2:3])
    longer = router_logit_attrs(lm, texts[0], receiver=2, prepend_bos=True)
    assert longer.logits.shape[1] == 1 + router_logit_attrs(lm, texts[0], receiver=2).logits.shape[1]


def test_the_forward_pass_ends_at_the_router(traced: Load) -> None:
    lm, (tokens, _) = traced("olmoe"), prompts()
    layers, ran = lm._module.model.layers, []
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: ran.append(name))
        for i, layer in enumerate(layers)
        for name, module in ((f"A{i}", layer.self_attn), (f"M{i}", layer.mlp))
    ]
    try:
        router_logit_attrs(lm, tokens, receiver=1, by="expert")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["A0", "M0", "A1"]


# ---- in half precision, and under autocast ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16(traced_half: Load, half: Load, model_of: Load, variant: str, by: str) -> None:
    """Sums close with `rounding`, which is no more than it can be. Both models round, each in its own way: they are as
    far apart as two roundings of the same values may be, each as far from float32 as HookedMoE is."""
    batch = prompts("left", length=12)
    real, receiver = batch[1].bool(), half(variant).cfg.moe_layers[-1]
    pairs: list[tuple[Any, list[Any]]] = [
        (
            router_logit_attrs(
                traced_half(variant), batch[0], receiver=receiver, by=by, attention_mask=batch[1]
            ),
            [
                on_caches.router_logit_attrs(model, cached_run(model, batch, by), receiver=receiver, by=by)
                for model in (half(variant), model_of(variant))
            ],
        ),
        (
            logit_attrs(traced_half(variant), batch[0], 7, 9, by=by, attention_mask=batch[1]),
            [
                on_caches.logit_attrs(model, final_run(model, batch, by), 7, 9, by=by)
                for model in (half(variant), model_of(variant))
            ],
        ),
    ]
    for ours, (rounded, exact) in pairs:
        assert ours.senders == rounded.senders
        assert ours.senders[-1] == ROUNDING
        assert ours.completeness_error <= 1e-5
        assert 0 < ours.rounding_ratio <= 1
        assert 0 < ours.model_logit_difference <= 2**-6 * float(rounded.logits.abs().max())
        n = len(exact.senders)
        got, theirs = ours.values[:n, real], rounded.values[:n, real]
        assert float((got - theirs).abs().mean()) <= 2 * float((theirs - exact.values[:, real]).abs().mean())


@pytest.mark.parametrize("by", GRANULARITIES)
def test_autocast_does_not_reach_the_scores(traced: Load, traced_half: Load, by: str) -> None:
    """A server runs under autocast. What the model made in bfloat16 is so; what is made of it is exact."""
    for variant in FAMILIES:
        for lm in (traced(variant), traced_half(variant)):
            batch = prompts("right", length=7)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found: list[Attrs] = [
                    router_logit_attrs(lm, batch[0], receiver=1, by=by, attention_mask=batch[1]),
                    logit_attrs(lm, batch[0], 7, 9, by=by, attention_mask=batch[1]),
                ]
                assert torch.is_autocast_enabled("cpu")
            for attrs in found:
                assert attrs.values.dtype == torch.float32
                assert attrs.senders[-1] == ROUNDING
                assert attrs.completeness_error <= 1e-5
                # Experts of a float32 model, which autocast runs in bfloat16, are computed again in float32.
                if by not in ("expert", "neuron") or lm is traced_half(variant):
                    assert attrs.rounding_ratio is not None
                    assert attrs.rounding_ratio <= 1


# ---- what can go wrong ----


@pytest.mark.parametrize("by", ["head", "expert", "neuron"])
def test_a_part_that_is_not_the_model_s_is_missed(checkpoint: Callable[[str], Path], by: str) -> None:
    """A model that writes something else than its weights and values say: sums do not close in float32, and in half
    precision rounding is more than it can be."""
    point = "self_attn.o_proj" if by == "head" else "mlp"
    for dtype in (torch.float32, torch.bfloat16):
        lm: Any = traced_model(checkpoint("olmoe"), dtype)
        lm._module.model.layers[1].get_submodule(point).register_forward_hook(
            lambda module, args, out: out * 1.25
        )
        found: list[Attrs] = [
            router_logit_attrs(lm, prompts()[0], receiver=2, by=by),
            logit_attrs(lm, prompts()[0], 7, by=by),
        ]
        for attrs in found:
            if dtype == torch.float32:
                assert attrs.completeness_error > 1e-3
            else:
                assert attrs.completeness_error <= 1e-5
                assert attrs.rounding_ratio is not None
                assert attrs.rounding_ratio > 1


def test_values_that_are_not_finite(checkpoint: Callable[[str], Path]) -> None:
    """They raise at real positions, and there alone: padding means nothing."""
    lm: Any = traced_model(checkpoint("mixtral"))
    tokens, mask = prompts("right")
    spoilt = torch.zeros(2, 9, dtype=torch.bool)
    # Of the last layer, so that no other position attends to what is spoilt.
    lm._module.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, args, out: out.masked_fill(spoilt[..., None], torch.nan)
    )
    spoilt[1, -1] = True
    padded = router_logit_attrs(lm, tokens, receiver=1, attention_mask=mask)
    assert padded.logits[1, -1].isnan().all()
    assert padded.completeness_error <= 1e-5
    assert padded.model_logit_difference <= 1e-5
    of_logits = logit_attrs(lm, tokens, 7, attention_mask=mask, positions=[-1, 0])
    assert of_logits.logits.isnan().tolist() == [[False, False], [True, False]]
    assert of_logits.completeness_error <= 1e-5
    spoilt[0, 2] = True
    with pytest.raises(ValueError, match="the scores at layer 1 hold values that are not finite"):
        router_logit_attrs(lm, tokens, receiver=1, attention_mask=mask)
    with pytest.raises(ValueError, match="the scores hold values that are not finite"):
        logit_attrs(lm, tokens, 7, attention_mask=mask)
    assert logit_attrs(lm, tokens, 7, attention_mask=mask, positions=0).values.isfinite().all()


def test_refusals(traced: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that names the thing, before the model runs."""
    lm, (tokens, mask) = traced("deepseek_v2"), prompts("right")
    monkeypatch.setattr(
        type(lm._module), "forward", lambda *args, **kwargs: pytest.fail("the model ran before the error")
    )
    for receiver in (0, 3, True):
        with pytest.raises(ValueError, match=rf"receiver {receiver} is no MoE layer.* MoE layers 1, 2"):
            router_logit_attrs(lm, tokens, receiver=receiver)
    with pytest.raises(ValueError, match="by='layers' is no granularity"):
        router_logit_attrs(lm, tokens, receiver=1, by="layers")
    with pytest.raises(ValueError, match="by='layers' is no granularity"):
        logit_attrs(lm, tokens, 7, by="layers")
    with pytest.raises(ValueError, match="must be False, True, 'local' or the URL"):
        logit_attrs(lm, tokens, 7, remote="here")
    with pytest.raises(ValueError, match="tokens hold 128, which lies outside the vocabulary"):
        logit_attrs(lm, tokens, VOCABULARY)
    with pytest.raises(ValueError, match=r"incorrect_tokens of shape \(4,\) do not fit 2 texts"):
        logit_attrs(lm, tokens, 7, [1, 2, 3, 4])
    with pytest.raises(TypeError, match="positions must be integers"):
        logit_attrs(lm, tokens, 7, positions=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no position 9"):
        logit_attrs(lm, tokens, 7, positions=[0, 9])
    assert not mask[:, -1].any()
    with pytest.raises(ValueError, match=r"positions \[-1\] hold nothing but padding"):
        logit_attrs(lm, tokens, 7, positions=[-1], attention_mask=mask)
    # 1 embedding, 3 attention layers, 96 neurons of a dense layer, 8 x 32 and 2 x 32 of an MoE layer.
    n_router, n_logit = 18 * (1 + 3 + 96 + 320) * 8, 18 * (1 + 3 + 96 + 2 * 320)
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_router - 1)
    with pytest.raises(ValueError, match=f"makes {n_router:,} scores .*routing_contributions"):
        router_logit_attrs(lm, tokens, receiver=2, by="neuron")
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_logit - 1)
    with pytest.raises(ValueError, match=f"makes {n_logit:,} scores .*fewer positions="):
        logit_attrs(lm, tokens, 7, by="neuron")


# ---- plans and traffic ----


@pytest.mark.parametrize("by", GRANULARITIES)
def test_plan_counts_what_comes_back(
    traced: Load, traced_half: Load, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score, logit and error, exactly; what is sent has a header besides for each of the few tensors."""
    monkeypatch.setattr(nnsight.CONFIG.API, "COMPRESS", False)
    tokens, mask = prompts("left")
    asked: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (router_logit_attrs, {"receiver": 2}),
        (logit_attrs, {"tokens": 7, "incorrect_tokens": 9, "positions": [-1, -2]}),
    ]
    for lm in (traced("qwen2_moe"), traced_half("qwen2_moe")):
        for function, settings in asked:
            settings = {**settings, "by": by, "attention_mask": mask, "remote": "local"}
            planned = plan(function, lm, tokens, **settings)
            with traffic() as counted:
                attrs = function(lm, tokens, **settings)
            places = attrs.values[0].numel() if function is logit_attrs else attrs.values[0, ..., 0].numel()
            errors = places * (1 if attrs.rounding_ratio is None else 2)
            assert planned.bytes_down == 4 * (attrs.values.numel() + attrs.logits.numel() + errors)
            assert planned.bytes_down < counted.bytes_down < planned.bytes_down + 4096
            assert counted.bytes_up == planned.bytes_up
            assert (planned.analysis, planned.jobs, planned.passes) == (function.__name__, 1, 1)
            assert counted.jobs == 1


# ---- on a server ----


@pytest.mark.parametrize("variant", FAMILIES)
def test_on_a_server(
    nnsight_server: Server, checkpoint: Callable[[str], Path], model_of: Load, variant: str
) -> None:
    """Each analysis is one job of a client without weights, and only scores come down."""
    model, lm, batch = model_of(variant), client(checkpoint(variant)), prompts("left", length=6)
    real, receiver, jobs = batch[1].bool(), model.cfg.moe_layers[-1], len(nnsight_server.jobs())
    for by in GRANULARITIES:
        with traffic() as counted:
            ours = router_logit_attrs(
                lm, batch[0], receiver=receiver, by=by, attention_mask=batch[1], remote=True
            )
            of_logits = logit_attrs(lm, batch[0], 7, 9, by=by, attention_mask=batch[1], remote=True)
        cache = cached_run(model, batch, by)
        assert_same_attrs(ours, on_caches.router_logit_attrs(model, cache, receiver=receiver, by=by), real)
        expected = on_caches.logit_attrs(model, final_run(model, batch, by), 7, 9, by=by)
        assert_same_attrs(of_logits, expected, real)
        assert counted.jobs == 2
        assert 0 < counted.bytes_down < 4 * (ours.values.numel() + of_logits.values.numel()) + 8192
    assert len(nnsight_server.jobs()) == jobs + 2 * len(GRANULARITIES)
    assert next(iter(lm._module.parameters())).is_meta


@pytest.mark.parametrize("variant", FAMILIES)
def test_on_a_server_without_weights_at_hand(
    nnsight_server: Server, checkpoint: Callable[[str], Path], model_of: Load, variant: str
) -> None:
    """A key that is not trusted reaches modules, not weights: the same scores, and an error for neurons."""
    model, lm, batch = model_of(variant), client(checkpoint(variant)), prompts("left", length=6)
    real, receiver = batch[1].bool(), model.cfg.moe_layers[-1]
    with nnsight_server.limits(trusted=False):
        for by in ("layer", "head", "source", "expert"):
            cache = cached_run(model, batch, by)
            ours = router_logit_attrs(
                lm, batch[0], receiver=receiver, by=by, attention_mask=batch[1], remote=True
            )
            expected = on_caches.router_logit_attrs(model, cache, receiver=receiver, by=by)
            assert_same_attrs(ours, expected, real)
            of_logits = logit_attrs(lm, batch[0], 7, 9, by=by, attention_mask=batch[1], remote=True)
            expected = on_caches.logit_attrs(model, final_run(model, batch, by), 7, 9, by=by)
            assert_same_attrs(of_logits, expected, real)
        with pytest.raises(RemoteError, match="this key reaches none"):
            logit_attrs(lm, batch[0], 7, by="neuron", remote=True)


def test_on_a_server_in_half_precision(nnsight_server: Server, checkpoint: Callable[[str], Path]) -> None:
    """Which runs it under autocast."""
    nnsight_server.add("olmoe_bf16", checkpoint("olmoe_bf16"), torch.bfloat16)
    lm, (tokens, _) = client(checkpoint("olmoe_bf16")), prompts()
    for by in GRANULARITIES:
        found: list[Attrs] = [
            router_logit_attrs(lm, tokens, receiver=2, by=by, remote=True),
            logit_attrs(lm, tokens, 7, by=by, remote=True),
        ]
        for attrs in found:
            assert attrs.senders[-1] == ROUNDING
            assert attrs.completeness_error <= 1e-5
            assert attrs.rounding_ratio is not None
            assert 0 < attrs.rounding_ratio <= 1

"""What must hold of direct logit attributions whatever the tokens: as properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.logit_attribution import LogitAttrs, logit_attrs
from moe_lens.routing.senders import GRANULARITIES
from tests.families import prompts
from tests.routing_cases import final_run, targets

Load = Callable[[str], Any]

SEEDS = st.integers(0, 10_000)
SIDES = st.sampled_from(["left", "right", "none"])


@pytest.fixture(scope="module")
def models(hooked: Load) -> list[HookedMoE]:
    """Kinds enough: a dense layer with a gated shared expert, latent attention with output biases, grouped queries."""
    return [hooked(v) for v in ("qwen2_moe_no_bias", "deepseek_v2_bias", "qwen3_moe")]


def assert_close(one: Tensor, other: Tensor, size: Tensor | float) -> None:
    torch.testing.assert_close(one, other, atol=1e-5 * float(size), rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 8), side=SIDES)
def test_sums_close_and_differences_are_differences(
    models: list[HookedMoE], seed: int, batch: int, length: int, side: str
) -> None:
    """The attribution of a difference is the difference of two, and turns its sign with the tokens."""
    places = prompts(side if length > 3 else "none", seed=seed, batch=batch, length=length)
    correct, incorrect = targets(places, seed)
    for model in models:
        for by in GRANULARITIES:
            cache = final_run(model, places, by)
            one, other, difference, turned = (
                logit_attrs(model, cache, *tokens, by=by)
                for tokens in ((correct,), (incorrect,), (correct, incorrect), (incorrect, correct))
            )
            for attrs in (one, other, difference, turned):
                assert attrs.completeness_error <= 1e-5
            size = max(float(attrs.values.abs().max()) for attrs in (one, other))
            assert_close(one.values - other.values, difference.values, size)
            assert torch.equal(turned.values, -difference.values)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, side=SIDES)
def test_one_token_for_all_is_that_token_everywhere(models: list[HookedMoE], seed: int, side: str) -> None:
    """And a place's scores know nothing of what is asked for elsewhere."""
    batch = prompts(side, seed=seed, length=6)
    tokens, _ = targets(batch, seed)
    row, column = seed % 2, seed % 6
    token = int(tokens[row, column])
    for model in models:
        for by in GRANULARITIES:
            cache = final_run(model, batch, by)
            each, same = (logit_attrs(model, cache, t, by=by).values for t in (tokens, token))
            alone = logit_attrs(model, cache, token, by=by, positions=column).values
            assert_close(each[:, row, column], same[:, row, column], each.abs().max())
            assert_close(alone[:, row, 0], same[:, row, column], each.abs().max())


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, side=SIDES)
def test_parts_sum_to_wholes(models: list[HookedMoE], seed: int, side: str) -> None:
    """Source pairs to heads, heads and bias to attention layers, neurons to experts, experts and shared to layers."""
    batch = prompts(side, seed=seed, length=6)
    tokens = targets(batch, seed)
    for model in models:
        at: dict[str, LogitAttrs] = {
            by: logit_attrs(model, final_run(model, batch, by), *tokens, by=by) for by in GRANULARITIES
        }
        names = {by: list(attrs.senders) for by, attrs in at.items()}
        size = at["layer"].values.abs().max()

        def whole(by: str, name: str) -> Tensor:
            return at[by].values[at[by].senders.index(name)]  # noqa: B023

        def parts(by: str, *prefixes: str) -> Tensor:
            rows = [i for i, name in enumerate(names[by]) if name.startswith(prefixes)]  # noqa: B023
            assert rows
            return at[by].values[rows].sum(dim=0)  # noqa: B023

        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                assert_close(parts("source", f"A{layer}H{head}<-"), whole("head", f"A{layer}H{head}"), size)
            assert_close(parts("head", f"A{layer}H", f"A{layer}bias"), whole("layer", f"A{layer}"), size)
            assert_close(parts("neuron", f"M{layer}"), whole("layer", f"M{layer}"), size)
            assert_close(parts("expert", f"M{layer}"), whole("layer", f"M{layer}"), size)
            if layer in model.cfg.moe_layers:
                experts = [f"M{layer}E{e}" for e in range(8)] + [f"M{layer}S"] * bool(model.cfg.shared)
                for name in experts:
                    assert_close(parts("neuron", f"{name}N"), whole("expert", name), size)

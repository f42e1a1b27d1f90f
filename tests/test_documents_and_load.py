"""Means over documents as a stream, which tokens count as what, and the load of every expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.routing.documents import Moments, position_classes
from moe_lens.routing.load import LoadCounter
from tests.families import prompts
from tests.routing_cases import (
    corpus,
)

Load = Callable[[str], Any]


# ---- documents ----


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40),
    present=st.lists(st.booleans(), min_size=40, max_size=40),
    cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_moments_are_numpy_s(values: list[float], present: list[bool], cuts: tuple[int, int]) -> None:
    """Two senders, one of which is not in every document; in three lots, one of them merged from elsewhere."""
    whole, there = np.array(values) + 1e8, np.array(present[: len(values)])
    moments, elsewhere = Moments(1, 1, 2), Moments(1, 1, 2)
    first, second = sorted(cuts)
    for lot, to in (
        (slice(0, first), moments),
        (slice(first, second), elsewhere),
        (slice(second, 99), moments),
    ):
        some = torch.tensor(whole[lot])
        if len(some):
            where = torch.stack((torch.ones(len(some), dtype=torch.bool), torch.tensor(there[lot])), dim=1)
            to.add((some[:, None] * where)[None, None], where)
            to.counted(where.sum(dim=0).double())
    moments.merge(elsewhere.count, elsewhere.mean, elsewhere.squares)
    moments.counted(elsewhere.count)
    for sender, rows in enumerate((whole, whole[there])):
        assert moments.count[sender] == len(rows)
        if len(rows):
            np.testing.assert_allclose(moments.mean[0, 0, sender], rows.mean(), rtol=1e-12)
        error = float(moments.standard_error(0)[0, sender])
        if len(rows) < 2:
            assert np.isnan(error)
        else:
            np.testing.assert_allclose(error, rows.std(ddof=1) / np.sqrt(len(rows)), rtol=1e-6, atol=1e-6)


def test_position_classes() -> None:
    tokens = torch.tensor([[0, 1, 5, 6], [1, 7, 8, 0], [9, 1, 4, 4], [1, 0, 0, 0]])
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    plain = position_classes(tokens, real)
    assert plain["lead"].int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert plain["rest"].int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    without = position_classes(tokens, real, left_out=1)
    assert without["lead"].int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert without["rest"].int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


# ---- load ----


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe_dense_bias", "mixtral"])
def test_load_counts_real_tokens(model_of: Load, variant: str) -> None:
    model = model_of(variant)
    counter = LoadCounter(model)
    counts = np.zeros((len(model.cfg.moe_layers), model.cfg.n_experts))
    for tokens, mask in corpus("right"):
        with counter.listening(tokens, mask):
            model(tokens, attention_mask=mask, return_type=None)
        table = model.routing(tokens, attention_mask=mask)
        for layer, expert in zip(table["layer"], table["expert"], strict=True):
            counts[model.cfg.moe_layers.index(layer), expert] += 1
    load_ = counter.result()
    np.testing.assert_allclose(load_.shares, counts / load_.n_tokens)
    np.testing.assert_allclose(load_.shares.sum(axis=1), model.cfg.top_k)
    assert load_.uniform == model.cfg.top_k / model.cfg.n_experts
    frame = load_.to_frame()
    total = model.cfg.top_k * len(model.cfg.moe_layers)
    assert float(frame["share"].to_numpy().sum()) == pytest.approx(total)


def test_load_clear_errors(model_of: Load) -> None:
    model = model_of("mixtral")
    with pytest.raises(ValueError, match="no tokens were counted"):
        LoadCounter(model).result()
    with (
        pytest.raises(RuntimeError, match="whole forward pass"),
        LoadCounter(model).listening(prompts()[0], None),
    ):
        pass

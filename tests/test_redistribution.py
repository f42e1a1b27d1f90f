"""Redistribution: against the layer run again without each expert, planted orders, and draws taken one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.audit import frame_file, redistribution_correlations
from moe_lens.audit.census import census
from moe_lens.audit.census_table import Census
from moe_lens.audit.metrics import expert_metrics
from moe_lens.audit.redistribution import Redistribution, redistribution
from moe_lens.audit.redistribution_correlations import (
    COLUMNS,
    PAIRS,
    PerDocument,
    correlations_of,
    document_draws,
    expert_draws,
    p_value,
    spearman,
)
from moe_lens.audit.redistribution_sums import compensation_of
from tests.families import FAMILIES, PAD, hf_model, prompts
from tests.reference_redistribution import (
    QUANTITIES,
    Uses,
    drawn,
    means_of,
    rho_of,
    uses_of,
)
from tests.routing_cases import corpus

Load = Callable[[str], Any]

VARIANTS = (*FAMILIES, "olmoe_gqa_clip", "qwen2_moe_no_bias", "deepseek_v2_groups")
WITHOUT_CENSUS = tuple(pair for pair in PAIRS if "delta_loss" not in pair)


@cache
def uses(hf: Load, variant: str, padding: str) -> Uses:
    return uses_of(hf(variant), corpus(padding))


def same_experts(found: Redistribution, expected: Uses, tolerance: float) -> None:
    """To a tolerance relative to the largest of a column in a layer, NaN at the same places."""
    table = means_of(expected)
    assert [*zip(found.experts["layer"], found.experts["expert"], strict=True)] == [*expected]
    for name, column in table.items():
        for layer, of in found.experts.groupby("layer"):
            there = np.array([column[layer, expert] for expert in of["expert"]])  # type: ignore[index]
            if name.startswith("n_"):
                assert of[name].tolist() == there.tolist(), f"{name} of layer {layer}"
                continue
            np.testing.assert_array_equal(np.isnan(of[name]), np.isnan(there), f"{name} of layer {layer}")
            size = np.nanmax(np.abs(there), initial=1e-3)
            np.testing.assert_allclose(
                of[name], there, rtol=0, atol=tolerance * size, err_msg=f"{name} of layer {layer}"
            )


def same(one: Redistribution, other: Redistribution, tolerance: float) -> None:
    for name in one.experts.columns:
        np.testing.assert_allclose(
            one.experts[name], other.experts[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


def column(found: Redistribution, layer: int, name: str) -> np.ndarray:
    return found.experts.loc[found.experts["layer"] == layer, name].to_numpy()


# ---- against the reference ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_expert_is_the_reference_s(hf: Load, model_of: Load, variant: str, padding: str) -> None:
    """Five documents in two batches, one of a single token; the layer of transformers run again for every expert."""
    found = redistribution(model_of(variant), corpus(padding), n_bootstrap=0)
    same_experts(found, uses(hf, variant, padding), 2e-5)
    assert found.provenance["layers"] == list(model_of(variant).cfg.moe_layers)
    assert found.provenance["n_documents"] == 5
    assert found.provenance["n_tokens"] == sum(int(mask.sum()) for _, mask in corpus(padding))
    n_tokens = found.experts.groupby("layer")["n_tokens"].sum()
    assert (n_tokens == model_of(variant).cfg.top_k * found.provenance["n_tokens"]).all()


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2_groups", "qwen3_moe", "mixtral"])
def test_bfloat16(checkpoint: Load, variant: str) -> None:
    """At the first layer, before roundings make for other choices: transformers' in bfloat16, run again in
    float64. And every number that the model has goes into float64: those of its own cache."""
    batches = corpus("right")
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, verbose=False, device="cpu")
    layer = model.cfg.moe_layers[0]
    found = redistribution(model, batches, layers=layer, n_bootstrap=0)
    assert found.provenance["dtype"] == "bfloat16"
    theirs = means_of(uses_of(hf_model(checkpoint(variant), torch.bfloat16), batches))
    for name in (*QUANTITIES, "n_tokens"):
        expected = np.array([theirs[name][layer, expert] for expert in range(model.cfg.n_experts)])
        # Cosines near 0 are small differences of products, of which the roundings are a larger part.
        atol = (0.1 if name in ("cosine", "relative_compensation") else 0.02) * np.nanmax(np.abs(expected))
        np.testing.assert_allclose(found.experts[name], expected, rtol=0, atol=atol, err_msg=name)

    sums: dict[str, np.ndarray] = {name: np.zeros(model.cfg.n_experts) for name in QUANTITIES}
    for tokens, mask in batches:
        with torch.no_grad():
            _, cached = model.run_with_cache(
                tokens,
                attention_mask=mask,
                names_filter=lambda name: ".mlp.hook_" in name or name.endswith("hook_mlp_out"),
                return_cache_object=False,
            )
        at = {name.rsplit(".", 1)[-1]: value for name, value in cached.items() if f"blocks.{layer}." in name}
        for row, pos in mask.nonzero().tolist():
            for slot, expert in enumerate(at["hook_expert_indices"][row, pos].tolist()):
                gap = at["hook_expert_contrib"][row, pos, slot].double().numpy()
                rest = at["hook_mlp_out"][row, pos].double().numpy() - gap
                cosine = gap @ rest / np.linalg.norm(gap) / np.linalg.norm(rest)
                sums["routing_weight"][expert] += float(at["hook_routing_weights"][row, pos, slot])
                sums["gap_norm"][expert] += np.linalg.norm(gap)
                sums["cosine"][expert] += cosine
                sums["relative_compensation"][expert] += max(gap @ rest, 0) / (gap @ gap)
    for name, of in sums.items():
        total = found.experts[name].fillna(0) * found.experts["n_tokens"]
        np.testing.assert_allclose(total, of, rtol=1e-9, atol=1e-12, err_msg=name)


def test_neither_batch_size_nor_padding_matters(model_of: Load) -> None:
    """The same documents with padding on either side, one at a time, and over 60% padding."""
    model = model_of("qwen2_moe")
    tokens, mask = prompts("right", batch=5, length=16)
    left_mask = prompts("left", batch=5, length=16)[1]
    left, wide = torch.full_like(tokens, PAD), torch.full((5, 48), PAD)
    for row in range(5):
        left[row, left_mask[row].bool()] = tokens[row, mask[row].bool()]
    wide[:, :16], wide_mask = tokens, torch.zeros_like(wide)
    wide_mask[:, :16] = mask
    whole = redistribution(model, tokens, attention_mask=mask, n_bootstrap=0)
    alone = [row[real.bool()][None] for row, real in zip(tokens, mask, strict=True)]
    for other in (
        redistribution(model, tokens, attention_mask=mask, n_bootstrap=0, batch_size=2),
        redistribution(model, left, attention_mask=left_mask, n_bootstrap=0),
        redistribution(model, wide, attention_mask=wide_mask, n_bootstrap=0),
        redistribution(model, alone, n_bootstrap=0),
    ):
        same(whole, other, 1e-5)
        assert other.provenance["tokens"] == whole.provenance["tokens"]
        np.testing.assert_allclose(other.correlations["rho"], whole.correlations["rho"])


def test_weights_and_gap_norms_are_those_of_the_metrics(model_of: Load) -> None:
    """Two implementations of the same means and the same clustered errors."""
    model, (tokens, mask) = model_of("deepseek_v2_groups"), prompts("right", batch=4, length=12)
    found = redistribution(model, tokens, attention_mask=mask, layers="M1", n_bootstrap=0)
    table = expert_metrics(model, tokens, attention_mask=mask, layers=1)
    assert (found.experts["layer"] == 1).all()
    np.testing.assert_array_equal(found.experts["n_tokens"], table.counts[0])
    for mine, theirs in (
        ("routing_weight", "mean_routing_weight"),
        ("gap_norm", "router_weighted_activation_norm"),
    ):
        np.testing.assert_allclose(found.experts[mine], table.values[theirs][0], rtol=1e-5)
        np.testing.assert_allclose(
            found.experts[f"{mine}_standard_error"], table.standard_errors[theirs][0], rtol=1e-4, atol=1e-9
        )


# ---- the identity, and what must hold whatever the vectors ----

VECTORS = st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6)


@settings(deadline=None, max_examples=200)
@given(VECTORS, VECTORS, st.floats(1e-3, 1e3), st.booleans())
def test_the_identity_and_scales(one: list[float], other: list[float], scale: float, turned: bool) -> None:
    """||r|| max(cos, 0) / ||c|| = max(<c, r>, 0) / ||c||^2, which a common factor, whatever its sign, leaves alone."""
    c, r = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    size, rest_size = float(c.norm()), float(r.norm())
    if min(size, rest_size) < 1e-3:
        return
    gap, cosine, compensation = (v.item() for v in compensation_of(c[None, None], (c + r)[None]))
    assert gap == pytest.approx(size)
    assert compensation == pytest.approx(
        max(float(c @ r), 0) / size**2, rel=1e-6, abs=1e-9 * rest_size / size
    )
    assert cosine == pytest.approx(float(c @ r) / size / rest_size, abs=1e-9)
    factor = -scale if turned else scale
    again = [v.item() for v in compensation_of(factor * c[None, None], factor * (c + r)[None])]
    np.testing.assert_allclose(
        again, [scale * gap, cosine, compensation], rtol=1e-6, atol=1e-9 * rest_size / size
    )
    # All the rest twice as large: as much again is made up for.
    twice = [v.item() for v in compensation_of(c[None, None], (c + 2 * r)[None])]
    np.testing.assert_allclose(
        twice, [gap, cosine, 2 * compensation], rtol=1e-6, atol=1e-9 * rest_size / size
    )


@pytest.mark.parametrize(
    ("contribution", "remaining", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], (5.0, 1.0, 1.0)),
        ([3.0, 4.0], [6.0, 8.0], (5.0, 1.0, 2.0)),
        ([3.0, 4.0], [-6.0, -8.0], (5.0, -1.0, 0.0)),
        ([3.0, 4.0], [4.0, -3.0], (5.0, 0.0, 0.0)),
        ([3.0, 4.0], [0.0, 0.0], (5.0, None, 0.0)),
        ([0.0, 0.0], [3.0, 4.0], (0.0, None, None)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, None, None)),
        ([1e-40, 0.0], [1e-40, 0.0], (1e-40, 1.0, 1.0)),
    ],
)
def test_what_is_undefined(
    contribution: list[float], remaining: list[float], expected: tuple[float | None, ...]
) -> None:
    c, r = (torch.tensor(v, dtype=torch.float64) for v in (contribution, remaining))
    found = [v.item() for v in compensation_of(c[None, None], (c + r)[None])]
    np.testing.assert_allclose(found, [np.nan if e is None else e for e in expected], atol=1e-300)


def test_undefined_tokens_are_counted_and_left_out_of_two_means(hf: Load, hooked: Load) -> None:
    """An expert that writes nothing has no cosine; it has a routing weight, and a gap norm of 0."""
    model, theirs = copy.deepcopy(hooked("qwen3_moe")), copy.deepcopy(hf("qwen3_moe"))
    expert, layer = 2, 1
    with torch.no_grad():
        model.blocks[layer].mlp.experts.W_down[expert] = 0
        theirs.model.layers[layer].mlp.experts.down_proj[expert] = 0
    found = redistribution(model, corpus(), n_bootstrap=20)
    same_experts(found, uses_of(theirs, corpus()), 2e-5)
    line = found.experts[(found.experts["layer"] == layer) & (found.experts["expert"] == expert)].iloc[0]
    assert line["n_tokens"] == line["n_undefined"] == line["n_zero_gap"] > 1
    assert (line["gap_norm"], line["gap_norm_standard_error"]) == (0, 0)
    assert line[["cosine", "relative_compensation"]].isna().all()
    assert found.experts["n_undefined"].sum() == line["n_undefined"]
    n_experts = found.correlations[found.correlations["layer"] == layer]["n_experts"].tolist()
    assert n_experts == [8, 7, 7, 7]


def test_where_nothing_remains(hooked: Load) -> None:
    """All experts but one write nothing: where that one is active its cosine is undefined, and nothing makes up."""
    model = copy.deepcopy(hooked("mixtral"))
    with torch.no_grad():
        model.blocks[0].mlp.experts.W_down[1:] = 0
    found = redistribution(model, corpus(), layers=0, n_bootstrap=20)
    line = found.experts.iloc[0]
    assert line["n_tokens"] == line["n_undefined"] > 1
    assert (line["n_zero_gap"], line["relative_compensation"]) == (0, 0)
    assert np.isnan(line["cosine"])
    assert found.correlations.loc[1:, "n_experts"].tolist() == [1, 1, 1]
    assert found.correlations.loc[1:, "rho"].isna().all()


# ---- correlations ----


def table(rng: np.random.Generator, n: int, ties: bool) -> list[np.ndarray]:
    found = rng.normal(size=(3, n))
    found[1] += found[0]
    found[2] += 0.5 * found[0]
    return list(np.round(found) if ties else found)


@pytest.mark.parametrize("n", [4, 5, 8, 60])
@pytest.mark.parametrize("ties", [False, True])
def test_rho_and_p_are_scipy_s_and_the_partial_one_that_of_residuals(n: int, ties: bool) -> None:
    for seed in range(20):
        x, y, z = table(np.random.default_rng(seed), n, ties)
        if n > 5:
            x[0], y[1], z[2] = np.nan, np.nan, np.nan
        rho, count = (found[0] for found in spearman(x[None], y[None]))
        np.testing.assert_allclose(rho, rho_of(x, y), atol=1e-12)
        assert count == (n if n <= 5 else n - 2)
        if not np.isnan(rho):
            there = ~np.isnan(x) & ~np.isnan(y)
            expected = np.asarray(stats.spearmanr(x[there], y[there]))[1]
            np.testing.assert_allclose(p_value(rho, count), expected, rtol=1e-9, atol=1e-15)
        partial, count = (found[0] for found in spearman(x[None], y[None], z[None]))
        expected = rho_of(x, y, z)
        np.testing.assert_allclose(partial, expected, atol=1e-7)
        if not np.isnan(partial) and abs(partial) < 1 - 1e-9:
            df = count - 3
            t = partial * np.sqrt(df / (1 - partial**2))
            np.testing.assert_allclose(p_value(partial, count, 1), 2 * stats.t.sf(abs(t), df), rtol=1e-9)


def test_rows_are_correlated_each_for_itself() -> None:
    """Many draws at once, experts missing in some of them, are what each is alone."""
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 50, 12))
    x[rng.random(x.shape) < 0.3] = np.nan
    y[:10, 3:] = np.nan
    rho, n = spearman(x, y, z)
    for draw in range(50):
        np.testing.assert_allclose(rho[draw], rho_of(x[draw], y[draw], z[draw]), atol=1e-9)
    assert np.isnan(rho[:10]).all()
    assert (n[:10] <= 3).all()


def planted(rows: dict[str, list[float]], n_documents: int = 3) -> dict[int, dict[str, PerDocument]]:
    """One layer whose experts have the same values at one token of every document; NaN at none."""
    of = {name: np.tile(np.array(values, dtype=float), (n_documents, 1)) for name, values in rows.items()}
    return {0: {name: PerDocument(np.nan_to_num(v), (~np.isnan(v)).astype(float)) for name, v in of.items()}}


def test_planted_orders() -> None:
    """Gap norms rise with weights, compensations fall with them: 1 and -1 exactly, certain in every draw of documents,
    and no partial correlation, because nothing is left when the gap norm is given."""
    rising, falling = [1, 2, 3, 5, 8, 13], [9, 7, 6, 4, 2, 1]
    found = correlations_of(
        planted(
            {
                "routing_weight": rising,
                "gap_norm": [v**2 for v in rising],
                "cosine": rising,
                "relative_compensation": falling,
                "delta_loss": rising,
            }
        ),
        200,
        0.95,
        0,
    )
    assert [*zip(found["x"], found["y"], found["given"], strict=True)] == [*PAIRS]
    assert found["rho"].tolist()[:3] == [1, -1, -1]
    assert found["p"].tolist()[:3] == [0, 0, 0]
    assert found["low"].tolist()[:3] == found["high"].tolist()[:3] == [1, -1, -1]
    assert found["n_draws"].tolist() == [200, 200, 200, 0, 200, 200]
    assert found.loc[3, ["rho", "p", "low", "high", "low_experts", "high_experts"]].isna().all()
    assert found["rho"].tolist()[4:] == [1, 1]
    assert (found["n_experts"] == 6).all()
    assert np.allclose(found["mean_gap_norm"], np.mean([v**2 for v in rising]))


def test_the_partial_one_finds_what_the_plain_one_hides() -> None:
    """Compensation is the weight less the gap norm: given the gap norm it rises with the weight."""
    rng = np.random.default_rng(1)
    weight = rng.normal(size=400)
    gap = weight + 0.1 * rng.normal(size=400)
    compensation = weight - gap
    plain = spearman(weight[None], compensation[None])[0][0]
    partial = spearman(weight[None], compensation[None], gap[None])[0][0]
    assert abs(plain) < 0.15
    assert partial > 0.8


@pytest.mark.parametrize(
    "rows",
    [
        {"routing_weight": [1, 2, 3], "gap_norm": [1, 2, 3], "relative_compensation": [3, 1, 2]},
        {"routing_weight": [1] * 6, "gap_norm": [1] * 6, "relative_compensation": [0] * 6},
        {name: [np.nan] * 6 for name in ("routing_weight", "gap_norm", "relative_compensation")},
    ],
)
def test_what_has_no_correlation(rows: dict[str, list[float]]) -> None:
    """Three experts, no variation, no expert active: NaN and their number, without a warning."""
    found = correlations_of(planted(rows), 30, 0.95, 0)
    assert len(found) == 4
    assert found[["rho", "p", "low", "high", "low_experts", "high_experts"]].isna().all(axis=None)
    assert (found["n_experts"] == np.isfinite(rows["gap_norm"]).sum()).all()
    assert (found[["n_draws", "n_draws_experts"]] == 0).all(axis=None)
    assert found["mean_gap_norm"].isna().all() == np.isnan(rows["gap_norm"]).all()


# ---- draws ----


def interval(rho: float, draws: list[float]) -> tuple[float, float]:
    if np.isnan(rho):
        return np.nan, np.nan
    low = np.percentile([-1 if np.isnan(d) else d for d in draws], 5)
    high = np.percentile([1 if np.isnan(d) else d for d in draws], 95)
    return float(low), float(high)


def test_intervals_are_those_of_draws_gone_through_one_by_one(
    hf: Load, model_of: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole documents are laid side by side anew, and averaged token by token; experts are taken one after another."""
    # Several chunks, which must draw as one does.
    monkeypatch.setattr(redistribution_correlations, "_DRAWS", 7)
    n, seed = 25, 4
    found = redistribution(model_of("olmoe"), corpus(), n_bootstrap=n, seed=seed, confidence=0.9)
    times = np.concatenate([*document_draws(5, n, seed)])
    assert times.shape == (n, 5)
    assert (times.sum(axis=1) == 5).all()
    assert len(np.unique(times, axis=0)) > n // 2
    of_draws = [
        means_of(drawn(uses(hf, "olmoe", "right"), np.repeat(range(5), counts.astype(int)).tolist()))
        for counts in times
    ]
    whole = means_of(uses(hf, "olmoe", "right"))
    lines = found.correlations
    assert len(lines) == 3 * len(WITHOUT_CENSUS)
    for _, line in lines.iterrows():
        names = [name for name in (line["x"], line["y"], line["given"]) if name]

        def values(means: dict, layer: int = line["layer"], names: list[str] = names) -> np.ndarray:
            return np.array([[means[name][layer, expert] for expert in range(8)] for name in names])

        np.testing.assert_allclose(line["rho"], rho_of(*values(whole)), atol=1e-6)
        df = line["n_experts"] - len(names)
        t = line["rho"] * np.sqrt(df / (1 - line["rho"] ** 2))
        np.testing.assert_allclose(line["p"], 2 * stats.t.sf(abs(t), df), rtol=1e-9)
        rhos = [rho_of(*values(means)) for means in of_draws]
        np.testing.assert_allclose(
            line[["low", "high"]].astype(float), interval(line["rho"], rhos), atol=1e-6
        )
        assert line["n_draws"] == sum(not np.isnan(rho) for rho in rhos)

        there = values(whole)[:, ~np.isnan(values(whole)).any(axis=0)]
        draws = np.concatenate([*expert_draws(there.shape[1], n, seed)])
        rhos = [rho_of(*there[:, experts]) for experts in draws]
        np.testing.assert_allclose(
            line[["low_experts", "high_experts"]].astype(float), interval(line["rho"], rhos), atol=1e-6
        )
        assert line["n_draws_experts"] == sum(not np.isnan(rho) for rho in rhos)


def test_draws_do_not_depend_on_chunks_or_on_the_layers_asked_for(
    model_of: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("olmoe")
    whole = redistribution(model, corpus(), n_bootstrap=40, seed=3)
    one = redistribution(model, corpus(), n_bootstrap=40, seed=3, layers=1)
    pd.testing.assert_frame_equal(
        whole.correlations[whole.correlations["layer"] == 1].reset_index(drop=True), one.correlations
    )
    monkeypatch.setattr(redistribution_correlations, "_CHUNK", 16)
    again = redistribution(model, corpus(), n_bootstrap=40, seed=3)
    pd.testing.assert_frame_equal(whole.correlations, again.correlations)
    other = redistribution(model, corpus(), n_bootstrap=40, seed=5)
    assert not other.correlations["low"].equals(whole.correlations["low"])


def test_draws_without_a_rho_count_as_anything() -> None:
    """Ten draws of a hundred have none: both ends are open at 95%, and at 80% the others decide."""
    draws = np.concatenate([np.linspace(0.2, 0.4, 90), np.full(10, np.nan)])
    assert redistribution_correlations._interval(0.3, draws, 0.95) == (-1, 1)
    low, high = redistribution_correlations._interval(0.3, draws, 0.7)
    assert 0.2 < low < 0.25
    assert 0.35 < high < 0.4
    assert np.isnan(redistribution_correlations._interval(np.nan, draws, 0.95)).all()


def test_one_document_has_no_interval_over_documents(model_of: Load) -> None:
    found = redistribution(model_of("olmoe"), prompts(length=16)[0][:1], n_bootstrap=30)
    plain = found.correlations[found.correlations["given"] == ""]
    assert plain["rho"].notna().all()
    assert plain[["low", "high"]].isna().all(axis=None)
    assert plain[["low_experts", "high_experts"]].notna().all(axis=None)
    errors = [name for name in found.experts if name.endswith("_standard_error")]
    assert len(errors) == 4
    assert found.experts[errors].isna().all(axis=None)


# ---- with a census ----


@pytest.fixture(scope="module")
def rows(hooked: Load) -> tuple[Tensor, Tensor, Census, Census]:
    """Tokens, mask, a census with the shared experts, and one of a sample."""
    model, (tokens, mask) = hooked("qwen2_moe"), prompts("left", batch=4, length=10)
    given = {"attention_mask": mask, "layers": (0, 2)}
    return tokens, mask, census(model, tokens, shared=True, **given), census(model, tokens, n=9, **given)


@pytest.mark.parametrize("sampled", [False, True])
def test_delta_loss_is_the_census_s(hf: Load, model_of: Load, rows: Any, sampled: bool) -> None:
    """Means and errors of its rows; intervals of documents laid side by side anew, with all their rows and tokens."""
    tokens, mask = rows[:2]
    of, theirs = rows[3 if sampled else 2], uses_of(hf("qwen2_moe"), [(tokens, mask)])
    found = redistribution(
        model_of("qwen2_moe"),
        tokens,
        attention_mask=mask,
        layers=(0, 2),
        census=of,
        n_bootstrap=30,
        confidence=0.9,
    )
    frame = of.to_pandas()
    routed = frame[frame["expert"] >= 0].astype({"delta_loss": np.float64})
    groups = routed.groupby(["layer", "expert"])["delta_loss"]
    experts = found.experts.set_index(["layer", "expert"])
    assert experts["n_rows"].sum() == len(routed)
    np.testing.assert_array_equal(groups.size().reindex(experts.index, fill_value=0), experts["n_rows"])
    np.testing.assert_allclose(groups.mean().reindex(experts.index), experts["delta_loss"], rtol=1e-12)
    # The error, by the definition.
    for (layer, expert), line in experts.iterrows():  # type: ignore[misc]
        mine = routed[(routed["layer"] == layer) & (routed["expert"] == expert)]
        by_document = (mine["delta_loss"] - mine["delta_loss"].mean()).groupby(mine["document"]).sum()
        g = len(by_document)
        if g < 2:
            assert np.isnan(line["delta_loss_standard_error"])
            continue
        error = np.sqrt(g / (g - 1) * (by_document**2).sum()) / len(mine)
        np.testing.assert_allclose(line["delta_loss_standard_error"], error, rtol=1e-9, atol=1e-12)

    lines = found.correlations
    assert [*zip(lines["x"], lines["y"], lines["given"], strict=True)] == [*PAIRS] * 2
    times = np.concatenate([*document_draws(4, 30, 0)])
    for _, line in lines[lines["y"] == "delta_loss"].iterrows():
        x, y = column(found, line["layer"], line["x"]), column(found, line["layer"], "delta_loss")
        np.testing.assert_allclose(line["rho"], rho_of(x, y), atol=1e-12)
        assert line["n_experts"] == np.isfinite(x + y).sum()
        rhos = []
        for counts in times:
            again = np.repeat(range(4), counts.astype(int)).tolist()
            mine = routed[routed["layer"] == line["layer"]]
            deltas = pd.concat([mine[mine["document"] == document] for document in again])
            y = deltas.groupby("expert")["delta_loss"].mean().reindex(range(8)).to_numpy()
            means = means_of(drawn(theirs, again))[line["x"]]
            rhos.append(rho_of([means[line["layer"], expert] for expert in range(8)], y))
        np.testing.assert_allclose(
            line[["low", "high"]].astype(float), interval(line["rho"], rhos), atol=1e-6
        )
        assert line["n_draws"] == sum(not np.isnan(rho) for rho in rhos)
    assert found.provenance["census"] == of.provenance
    assert "with delta_loss" in repr(found)


def test_a_census_of_something_else(model_of: Load, hooked: Load, rows: Any) -> None:
    """Said before the model runs."""
    tokens, mask, of, _ = rows
    model = model_of("qwen2_moe")
    given = {"attention_mask": mask, "layers": 0, "n_bootstrap": 0}

    def ran(*_: Any) -> None:
        pytest.fail("the model ran")

    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[2].mlp.router.weight[0, 0] += 1
    changed.run_blocks = ran
    with pytest.raises(ValueError, match="of other weights"):
        redistribution(changed, tokens, census=of, **given)
    other = tokens.clone()
    other[0, -1] = 9
    with pytest.raises(ValueError, match="of other documents"):
        redistribution(model, other, census=of, **given)
    with pytest.raises(ValueError, match="of other documents"):
        redistribution(model, tokens.flip(0), census=of, **{**given, "attention_mask": mask.flip(0)})
    with pytest.raises(ValueError, match="the census has no layer 1; it has 0, 2: give these as layers"):
        redistribution(model, tokens, census=of, attention_mask=mask)
    for settings_, match in (
        ({"scope": "sequence"}, "must be of scope='token', and it is of scope='sequence'"),
        ({"how": "renormalize"}, "must be of how='zero', and it is of how='renormalize'"),
    ):
        wrong = census(model, tokens, attention_mask=mask, layers=0, **settings_)
        with pytest.raises(ValueError, match=match):
            redistribution(model, tokens, census=wrong, **given)
    unfinished = Census(of.identity, of.facts, of._shards, finished=False)
    with pytest.raises(ValueError, match="not finished"):
        redistribution(model, tokens, census=unfinished, **given)


# ---- errors ----


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"layers": 0}, "layer 0"),
        ({"confidence": 1.0}, "confidence=1.0 must be between 0 and 1"),
        ({"n_bootstrap": -1}, "n_bootstrap"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_makes_no_sense(model_of: Load, given: dict[str, Any], match: str) -> None:
    """Layer 0 of this model has no experts."""
    with pytest.raises(ValueError, match=match):
        redistribution(model_of("deepseek_v2"), prompts()[0], **given)
    with pytest.raises(ValueError, match="no documents"):
        redistribution(model_of("deepseek_v2"), [])


def test_a_model_with_hooks(model_of: Load) -> None:
    model = model_of("olmoe")
    with (
        model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value)]),
        pytest.raises(ValueError, match="without hooks"),
    ):
        redistribution(model, prompts()[0])


def test_what_is_not_finite(hooked: Load) -> None:
    """The document is named as in its corpus, with the first real position. What is not read may hold anything."""
    model, (tokens, mask) = copy.deepcopy(hooked("mixtral")), prompts("left", batch=5, length=9)
    with torch.no_grad():
        _, cached = model.run_with_cache(tokens, attention_mask=mask)
        indices = cached["blocks.1.mlp.hook_expert_indices"]
        uses_at = {e: ((indices == e).any(dim=2) & mask.bool()).nonzero().tolist() for e in range(8)}
        (document, position), expert = max((places[0], e) for e, places in uses_at.items())
        assert document > 0
        model.blocks[1].mlp.experts.W_down[expert, 3] = torch.nan
    match = f"document {document}: hook_expert_contrib of layer 1 holds .*, at position {position}$"
    for batch_size in (1, 2, 8):
        with pytest.raises(FloatingPointError, match=match):
            redistribution(model, tokens, attention_mask=mask, batch_size=batch_size)
    redistribution(model, tokens, attention_mask=mask, layers=0, n_bootstrap=0)
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[:] = torch.inf
    with pytest.raises(FloatingPointError, match=r"document 0 \(text 0\): hook_routing_weights of layer 0"):
        redistribution(model, ["A text.", "Another."])


def test_what_is_not_finite_at_padding_does_not_matter(hooked: Load) -> None:
    model, (tokens, mask) = copy.deepcopy(hooked("mixtral")), prompts("left", batch=5, length=9)
    real = mask.bool()
    with torch.no_grad():
        _, cached = model.run_with_cache(tokens, attention_mask=mask)
        indices = cached["blocks.1.mlp.hook_expert_indices"]
        expert = int(indices[~real][0, 0])
        rows = ~((indices == expert).any(dim=2) & real).any(dim=1)
        assert rows.any()
        before = redistribution(model, tokens[rows], attention_mask=mask[rows], n_bootstrap=0)
        model.blocks[1].mlp.experts.W_down[expert] = torch.nan
        _, cached = model.run_with_cache(tokens[rows], attention_mask=mask[rows])
        assert cached["blocks.1.hook_mlp_out"].isnan().any()
    same(before, redistribution(model, tokens[rows], attention_mask=mask[rows], n_bootstrap=0), 1e-6)


# ---- saving ----


def test_saved_and_loaded_is_the_same(model_of: Load, rows: Any, tmp_path: Path) -> None:
    """To the last bit, NaN as NaN, types too."""
    tokens, mask, of, _ = rows
    for name, found in (
        (
            "whole",
            redistribution(model_of("qwen2_moe"), tokens, attention_mask=mask, layers=(0, 2), census=of),
        ),
        ("short", redistribution(model_of("mixtral"), torch.tensor([[5, 9]]), n_bootstrap=3)),
    ):
        path = found.save(tmp_path / f"{name}.parquet")
        loaded = Redistribution.load(path)
        for ours, theirs in ((found.experts, loaded.experts), (found.correlations, loaded.correlations)):
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
        assert loaded.provenance == found.provenance
        assert repr(loaded) == repr(found)
    assert found.correlations["rho"].isna().all()
    assert found.experts["gap_norm"].isna().any()
    assert list(found.to_frame()) == list(COLUMNS)
    frame = found.to_frame()
    frame["rho"] = 0.0
    assert found.correlations["rho"].isna().all()
    assert repr(found).startswith("<Redistribution of ")
    frame_file.write_frame(tmp_path / "other.parquet", found.experts, "audit", {})
    with pytest.raises(ValueError, match="redistribution"):
        Redistribution.load(tmp_path / "other.parquet")
    with pytest.raises(FileNotFoundError):
        Redistribution.load(tmp_path / "none.parquet")

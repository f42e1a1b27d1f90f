"""Progressive ablation against full passes of transformers' models without the experts, one set at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE, audit
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import expert_reference
from tests.families import FAMILIES, prompts
from tests.reference_census import cumulative_rows, expert_means

Load = Callable[[str], Any]
KEY = ["document", "layer", "position", "removed"]


def assert_equal_rows(rows: pd.DataFrame, expected: list[dict[str, Any]]) -> None:
    table = pd.DataFrame(expected).sort_values(KEY).reset_index(drop=True)
    pd.testing.assert_frame_equal(rows[KEY], table[KEY], check_dtype=False)
    for name in ("loss", "delta_loss", "gap_norm"):
        np.testing.assert_allclose(rows[name], table[name], rtol=2e-4, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("variant", [*FAMILIES, "deepseek_v2_groups"])
def test_it_is_the_slow_removal(hf: Load, model_of: Load, variant: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts("left", length=5)
    layers = model.cfg.moe_layers[-2:]
    table = progressive(model, tokens, attention_mask=mask, layers=layers)
    assert_equal_rows(table.rows, cumulative_rows(hf(variant), tokens, mask, layers=layers))
    assert table.rows["delta_loss"].abs().max() > 1e-3


@pytest.mark.parametrize("how", ["renormalize", "reroute", "mean"])
def test_ways_of_removing(hf: Load, model_of: Load, how: Any) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("right", length=5)
    reference = expert_reference(model, [(tokens, mask)]) if how == "mean" else None
    means = expert_means(hf("olmoe"), tokens, mask, [1]) if how == "mean" else None
    table = progressive(model, tokens, attention_mask=mask, layers=1, how=how, reference=reference)
    assert_equal_rows(
        table.rows, cumulative_rows(hf("olmoe"), tokens, mask, layers=[1], how=how, means=means)
    )
    assert table.provenance["how"] == how
    assert ("reference" in table.provenance) == (how == "mean")


def test_the_first_removed_is_the_censuss_heaviest(model_of: Load) -> None:
    model, (tokens, mask) = model_of("qwen3_moe"), prompts("left", batch=3)
    alone = audit.census(model, tokens, attention_mask=mask).to_pandas()
    alone = alone[alone["rank"] == 1].reset_index(drop=True)
    first = progressive(model, tokens, attention_mask=mask, max_removed=1)
    names = ["document", "position", "layer", "gap_norm", "loss", "delta_loss"]
    pd.testing.assert_frame_equal(first.rows[names], alone[names], atol=1e-5, rtol=1e-4)
    assert set(first.rows["removed"]) == {1}
    assert first.provenance["removed"] == [1]


# ---- what is summed up ----


def test_summary_is_over_rows_with_errors_over_documents(model_of: Load) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("right", batch=4, length=8)
    table = progressive(model, tokens, attention_mask=mask)
    frame = table.to_frame()
    k = model.cfg.top_k
    assert list(zip(frame["layer"], frame["removed"], strict=True)) == [
        (layer, removed) for layer in model.cfg.moe_layers for removed in range(1, k)
    ]
    for _, line in frame.iterrows():
        chosen = (table.rows["layer"] == line["layer"]) & (table.rows["removed"] == line["removed"])
        cell = table.rows[chosen]
        assert line["n_rows"] == len(cell) == int(mask.sum()) - 4
        assert line["n_documents"] == 4
        for name in ("delta_loss", "gap_norm"):
            values = cell[name].astype(float)
            assert line[name] == pytest.approx(values.mean())
            sums = [(values - values.mean())[cell["document"] == document].sum() for document in range(4)]
            error = math.sqrt(4 / 3 * sum(part**2 for part in sums)) / len(cell)
            assert line[f"{name}_standard_error"] == pytest.approx(error)
        assert line["delta_loss_median"] == pytest.approx(np.percentile(cell["delta_loss"], 50))
        assert line["delta_loss_p95"] == pytest.approx(np.percentile(cell["delta_loss"], 95))


def test_one_document_has_no_standard_error(model_of: Load) -> None:
    frame = progressive(model_of("olmoe"), prompts(batch=1)[0], layers=0).to_frame()
    assert frame["delta_loss_standard_error"].isna().all()
    assert frame["delta_loss"].notna().all()


def test_a_sample_is_some_of_the_rows(model_of: Load) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("left", batch=3)
    every = progressive(model, tokens, attention_mask=mask).rows
    some = progressive(model, tokens, attention_mask=mask, n=5, seed=1)
    rows = some.rows
    # The same positions at every layer and depth.
    assert rows.groupby(["layer", "removed"]).size().eq(5).all()
    both = every.merge(rows, on=KEY, suffixes=("", "_sample"))
    assert len(both) == len(rows)
    for name in ("loss", "delta_loss", "gap_norm"):
        np.testing.assert_allclose(both[name], both[f"{name}_sample"], atol=1e-5)
    assert some.provenance["sample"] == {"n": 5, "seed": 1}
    other = progressive(model, tokens, attention_mask=mask, n=5, seed=2).rows
    assert not other[["document", "position"]].equals(rows[["document", "position"]])


def test_memory_and_batches_change_no_number(model_of: Load) -> None:
    model, (tokens, mask) = model_of("deepseek_v2"), prompts("left", batch=3)
    large = progressive(model, tokens, attention_mask=mask).rows
    small = progressive(model, tokens, attention_mask=mask, memory_budget=1, batch_size=1).rows
    pd.testing.assert_frame_equal(large, small, atol=1e-5, rtol=1e-4)


def test_types_and_provenance(model_of: Load, capsys: Any) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("right", batch=3)
    table = progressive(model, tokens, attention_mask=mask, verbose=True)
    types = ["int32", "int32", "int16", "int16", "float32", "float32", "float32"]
    assert list(map(str, table.rows.dtypes)) == types
    of = table.provenance
    assert (of["kind"], of["scope"], of["how"], of["sample"]) == ("progressive", "token", "zero", None)
    assert of["layers"] == list(model.cfg.moe_layers)
    assert of["removed"] == list(range(1, model.cfg.top_k))
    assert of["corpus"] == "3 rows of tokens given by the caller"
    printed = capsys.readouterr()
    assert f"{len(table.rows):,} ablations" in printed.out
    assert "100%" in printed.err
    assert repr(table).startswith("<Progressive of ")
    other = progressive(model, tokens.flip(0), attention_mask=mask.flip(0))
    assert other.provenance["tokens"] != of["tokens"]


def test_half_precision_counts_from_a_null_branch(checkpoint: Any) -> None:
    tokens = prompts()[0]
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16, device="cpu", verbose=False)
    rows = progressive(model, tokens, layers=1).rows
    assert rows["null_delta_loss"].dtype == np.float32
    exact = progressive(
        HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.float32, device="cpu", verbose=False),
        tokens,
        layers=1,
    ).rows
    assert "null_delta_loss" not in exact
    np.testing.assert_allclose(rows["delta_loss"], exact["delta_loss"], atol=0.1)


# ---- what makes no sense ----


def test_errors_come_before_any_run(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("olmoe"), prompts()[0]

    def no_run(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a document was run")

    monkeypatch.setattr(CleanRun, "of", no_run)
    k = model.cfg.top_k
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_removed": k}, f"max_removed={k} must leave one of the {k} experts"),
        ({"max_removed": 0}, "max_removed=0 must be positive"),
        ({"how": "nonsense"}, "how='nonsense' must be one of"),
        ({"how": "mean"}, "needs reference="),
        ({"layers": 99}, "99"),
        ({"n": 10_000}, "n=10000 positions are wanted"),
        ({"memory_budget": 0}, "memory_budget=0 must be positive"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            progressive(model, tokens, **arguments)
    with pytest.raises(ValueError, match="no position has a next token"):
        progressive(model, tokens[:, :1])
    with model.hooks([("hook_embed", lambda value, hook: value)]), pytest.raises(ValueError, match="hook"):
        progressive(model, tokens)


def test_routers_that_choose_one_or_all(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("mixtral"), prompts()[0]
    cfg = model.cfg
    with monkeypatch.context() as patch:
        patch.setattr(model, "cfg", replace(cfg, router=replace(cfg.router, top_k=1)))
        with pytest.raises(ValueError, match="this model's routers choose one"):
            progressive(model, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(model, "cfg", replace(cfg, router=replace(cfg.router, top_k=cfg.n_experts - 1)))
        with pytest.raises(ValueError, match="give max_removed=1 or another how"):
            progressive(model, tokens, how="reroute")


def test_a_broken_number_names_its_place(hooked: Load) -> None:
    model, tokens = hooked("olmoe"), prompts(batch=2)[0]
    weight = model.blocks[2].mlp.experts.W_down
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.inf)
        with pytest.raises(FloatingPointError, match="document 0: "):
            progressive(model, tokens)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_it_is_exported() -> None:
    assert audit.progressive is progressive
    assert audit.Progressive is Progressive

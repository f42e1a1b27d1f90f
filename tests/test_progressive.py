"""Progressive ablation against full passes of transformers' models without the experts, one set at a time."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE, audit
from moe_lens.audit.census_plan import Documents
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.routing.contributions import corpus_of
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


def uneven(model: Any) -> tuple[Documents, torch.Tensor, torch.Tensor]:
    """Documents with 8, 2, 4 and 0 positions that have a next token, padded on either side."""
    tokens, mask = prompts(batch=4, length=9)[0], torch.zeros(4, 9, dtype=torch.long)
    mask[0, :], mask[1, :3], mask[2, 4:], mask[3, 8:] = 1, 1, 1, 1
    return Documents.of(model, corpus_of(model, tokens, mask, 8)), tokens, mask


def eligible_by_hand(mask: torch.Tensor, min_context: int) -> list[list[int]]:
    """Of each document the places whose next token is predicted from at least so many, counted one by one."""
    return [
        [place for place in range(int(row.sum()) - 1) if len(range(place + 1)) >= min_context] for row in mask
    ]


@pytest.mark.parametrize("min_context", [0, 1, 2, 4, 5, 8])
def test_context_is_what_the_prediction_sees(model_of: Load, min_context: int) -> None:
    documents, tokens, mask = uneven(model_of("mixtral"))
    chosen = documents.sampled(None, 0, min_context=min_context)
    assert [places.tolist() for places in chosen] == eligible_by_hand(mask, min_context)
    found = progressive(model_of("mixtral"), tokens, attention_mask=mask, layers=0, min_context=min_context)
    # Real tokens up to and with the position itself.
    seen = mask.cumsum(dim=1)
    rows = found.rows[found.rows["removed"] == 1]
    assert sorted(zip(rows["document"], rows["position"], strict=True)) == [
        (row, column)
        for row, column in itertools.product(range(4), range(8))
        if mask[row, column] and mask[row, column + 1] and seen[row, column] >= min_context
    ]


@pytest.mark.parametrize(("per_document", "min_context"), [(1, 0), (1, 3), (3, 0), (2, 2), (100, 0)])
def test_a_draw_within_documents_is_as_stated(model_of: Load, per_document: int, min_context: int) -> None:
    """Every possible draw is listed with its probability, and simulated."""
    documents, _, mask = uneven(model_of("mixtral"))
    eligible = eligible_by_hand(mask, min_context)
    n, n_draws = 2, 4000
    expected: Counter[Any] = Counter()
    options = [list(itertools.combinations(places, min(per_document, len(places)))) for places in eligible]
    for given in itertools.product(*options):
        left = [(document, place) for document, places in enumerate(given) for place in places]
        draws = list(itertools.combinations(left, n))
        for draw in draws:
            expected[draw] += 1 / math.prod(map(len, options)) / len(draws)
    assert sum(expected.values()) == pytest.approx(1)
    drawn: Counter[Any] = Counter()
    for seed in range(n_draws):
        chosen = documents.sampled(n, seed, per_document=per_document, min_context=min_context)
        assert all(len(places) <= per_document for places in chosen)
        drawn[tuple((d, place) for d, places in enumerate(chosen) for place in places.tolist())] += 1
    assert set(drawn) <= set(expected)
    for draw, probability in expected.items():
        deviation = math.sqrt(n_draws * probability * (1 - probability))
        assert abs(drawn[draw] - n_draws * probability) < 5 * deviation, draw
    again = documents.sampled(n, 7, per_document=per_document, min_context=min_context)
    for one, other in zip(
        again, documents.sampled(n, 7, per_document=per_document, min_context=min_context), strict=True
    ):
        assert torch.equal(one, other)


def test_one_of_each_document(model_of: Load) -> None:
    documents, tokens, mask = uneven(model_of("mixtral"))
    for seed in range(5):
        assert list(map(len, documents.sampled(None, seed, per_document=1))) == [1, 1, 1, 0]
        assert list(map(len, documents.sampled(None, seed, per_document=3, min_context=3))) == [3, 0, 2, 0]
        # No limit draws as before there was one.
        for one, other in zip(
            documents.sampled(5, seed), documents.sampled(5, seed, min_context=1), strict=True
        ):
            assert torch.equal(one, other)
    found = progressive(model_of("mixtral"), tokens, attention_mask=mask, n=2, per_document=1, seed=3)
    assert found.rows.groupby("document")["position"].nunique().tolist() == [1, 1]
    every = progressive(model_of("mixtral"), tokens, attention_mask=mask)
    both = every.rows.merge(found.rows, on=KEY, suffixes=("", "_sample"))
    assert len(both) == len(found.rows) > 0
    np.testing.assert_allclose(both["delta_loss"], both["delta_loss_sample"], atol=1e-5)


def test_what_was_asked_of_a_sample_is_in_provenance(model_of: Load) -> None:
    _, tokens, mask = uneven(model_of("mixtral"))
    cases: list[tuple[dict[str, Any], Any]] = [
        ({}, None),
        ({"min_context": 0}, None),
        ({"n": np.int64(2), "seed": 4}, {"n": 2, "seed": 4}),
        ({"per_document": 1}, {"n": None, "seed": 0, "per_document": 1}),
        ({"min_context": 3}, {"n": None, "seed": 0, "min_context": 3}),
        (
            {"n": 2, "per_document": np.int32(1), "min_context": np.int64(2)},
            {"n": 2, "seed": 0, "per_document": 1, "min_context": 2},
        ),
    ]
    for arguments, sample in cases:
        of = progressive(model_of("mixtral"), tokens, attention_mask=mask, layers=0, **arguments).provenance
        assert of["sample"] == sample
        assert json.loads(json.dumps(of["sample"])) == sample


def test_too_few_positions_are_counted(model_of: Load) -> None:
    documents, _, _ = uneven(model_of("mixtral"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "n=20 positions are wanted, and the corpus has 14 with a next token$"),
        (
            {"min_context": 3},
            "the corpus has 14 with a next token, 8 of them after min_context=3 tokens$",
        ),
        (
            {"per_document": 3},
            "has 14 with a next token, and per_document=3 leaves 8, of 3 documents$",
        ),
        (
            {"per_document": 1, "min_context": 3},
            "has 14 with a next token, 8 of them after min_context=3 tokens, and per_document=1 leaves 2, of 2 "
            "documents$",
        ),
        (
            {"min_context": 9},
            "min_context=9 tokens are wanted before the one that is predicted, and no position of the corpus has so "
            "many: its longest document has 9$",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            documents.sampled(20, 0, **arguments)


# ---- files ----


@pytest.mark.parametrize("how", ["zero", "resample"])
def test_a_file_gives_back_everything(model_of: Load, tmp_path: Path, how: Any) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("right", batch=3)
    reference = expert_reference(model, [(tokens, mask)]) if how == "resample" else None
    made = progressive(
        model, tokens, attention_mask=mask, how=how, reference=reference, seed=2, n=4, per_document=2
    )
    path = tmp_path / "progressive.parquet"
    assert made.save(path) == path
    loaded = Progressive.load(path)
    pd.testing.assert_frame_equal(loaded.rows, made.rows, check_exact=True)
    assert loaded.provenance == made.provenance
    assert repr(loaded) == repr(made)
    pd.testing.assert_frame_equal(loaded.to_frame(), made.to_frame(), check_exact=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["progressive.parquet"]


def test_files_that_are_none(model_of: Load, tmp_path: Path) -> None:
    made = progressive(model_of("olmoe"), prompts()[0], layers=0)
    with pytest.raises(FileNotFoundError, match="absent"):
        made.save(tmp_path / "absent" / "progressive.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.parquet"):
        Progressive.load(tmp_path / "absent.parquet")
    path = tmp_path / "some.parquet"
    made.rows.to_parquet(path)
    with pytest.raises(ValueError, match=r"some.parquet is no file of a progressive"):
        Progressive.load(path)
    audit.Audit(made.rows, {}).save(path)
    with pytest.raises(ValueError, match=r"some.parquet is no file of a progressive"):
        Progressive.load(path)
    path.write_text("no table")
    with pytest.raises(ValueError, match=r"some.parquet is no file of a progressive"):
        Progressive.load(path)


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
    assert "; layers 0 to 2; " in repr(table)
    assert "; layers 0, 2; " in repr(replace(table, provenance={**of, "layers": [0, 2]}))
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
        ({"per_document": 0}, "per_document=0 must be positive"),
        ({"min_context": -1}, "min_context=-1 must be 0 or more"),
        ({"min_context": 100}, "min_context=100 tokens are wanted"),
        ({"per_document": 1, "n": 3}, "per_document=1 leaves 2, of 2 documents"),
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

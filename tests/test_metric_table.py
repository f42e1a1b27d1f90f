"""The table of metrics: frame, file, arrays of one's own; and the released definitions beside the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.metrics import PAPER_METRICS, RELEASED, expert_metrics
from moe_lens.audit.released_metrics import AboveLowestThreshold
from moe_lens.routing.storage import write_atomically
from tests.families import EOS, PAD, UNKNOWN, prompts
from tests.reference_metrics import Batch, released_metrics
from tests.routing_cases import corpus

Load = Callable[[str], Any]


@pytest.fixture
def table(model_of: Load) -> MetricTable:
    return expert_metrics(model_of("olmoe"), corpus())


# ---- the table ----


def test_the_frame_has_a_row_for_each_expert(table: MetricTable) -> None:
    frame = table.to_frame()
    assert len(frame) == 3 * 8
    assert list(frame.columns[:5]) == [
        "layer",
        "expert",
        "count",
        "utilization_rate",
        "utilization_rate_standard_error",
    ]
    row = frame[(frame["layer"] == 2) & (frame["expert"] == 5)].iloc[0]
    for name in table.metrics:
        np.testing.assert_equal(row[name], table.values[name][2, 5])
        np.testing.assert_equal(row[f"{name}_standard_error"], table.standard_errors[name][2, 5])
    assert row["count"] == table.counts[2, 5]


def test_a_table_is_what_was_saved(table: MetricTable, tmp_path: Path) -> None:
    table = table.with_array("mine", np.arange(24.0).reshape(3, 8))
    loaded = MetricTable.load(table.save(tmp_path / "metrics.safetensors"))
    assert loaded.metrics == table.metrics
    assert loaded.layers == table.layers
    assert loaded.provenance == table.provenance
    assert (loaded.n_tokens, loaded.n_documents) == (table.n_tokens, table.n_documents)
    assert np.array_equal(loaded.counts, table.counts)
    for name in table.metrics:
        np.testing.assert_array_equal(loaded.values[name], table.values[name])
        np.testing.assert_array_equal(loaded.standard_errors[name], table.standard_errors[name])
        assert loaded.values[name].dtype == np.float64


def test_other_files_are_refused(table: MetricTable, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        MetricTable.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"):
        table.save(tmp_path / "none" / "metrics.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is no file of a table of expert metrics"):
        MetricTable.load(tmp_path / "text")
    write_atomically(tmp_path / "other", {"counts": torch.zeros(1)}, {"format": "another 1"})
    with pytest.raises(ValueError, match="other is no table of expert metrics: 'another 1'"):
        MetricTable.load(tmp_path / "other")


def test_what_a_metric_claims(table: MetricTable, tmp_path: Path) -> None:
    low = {"output_similarity", "gate_entropy"}
    assert {name for name in table.metrics if not table.higher_is_more_important(name)} == low
    assert set(table.provenance["higher_is_more_important"]) == set(table.metrics)
    for name in table.metrics:
        sign = -1 if name in low else 1
        np.testing.assert_array_equal(table.importance(name), sign * table.values[name])
    values = np.arange(24.0).reshape(3, 8)
    mine = table.with_array("mine", values, higher_is_more_important=False).with_array("more", values)
    loaded = MetricTable.load(mine.save(tmp_path / "metrics.safetensors"))
    for name in loaded.metrics:
        assert loaded.higher_is_more_important(name) is (name not in {*low, "mine"})
    np.testing.assert_array_equal(loaded.importance("mine"), -values)
    # The values themselves are what they are.
    assert loaded.to_frame()["mine"].tolist() == list(range(24))
    # A table of before this was said.
    old = {name: of for name, of in table.provenance.items() if name != "higher_is_more_important"}
    older = dataclasses.replace(table, provenance=old)
    assert all(older.higher_is_more_important(name) for name in older.metrics)
    assert older.with_array("mine", values).higher_is_more_important("gate_entropy")


def test_provenance_says_what_it_is_of(table: MetricTable) -> None:
    assert set(table.provenance["definitions"]) == set(table.metrics)
    for text in table.provenance["definitions"].values():
        assert "Source: " in text
        assert "no description" not in text
    assert table.provenance["as_released"] is None
    assert table.provenance["n_padding_counted"] == 0
    assert table.provenance["padding"] is None
    assert table.provenance["dtype"] == "float32"
    assert table.provenance["seed"] == 0


def test_arrays_of_one_s_own(table: MetricTable) -> None:
    values = np.arange(24).reshape(3, 8)
    with_it = table.with_array("mine", values, definition="counted by hand")
    assert with_it.metrics == (*table.metrics, "mine")
    assert "mine" not in table.metrics
    assert np.array_equal(with_it.values["mine"], values)
    assert with_it.values["mine"].dtype == np.float64
    assert np.isnan(with_it.standard_errors["mine"]).all()
    assert with_it.provenance["definitions"]["mine"] == "counted by hand"
    # It is a copy.
    values[0, 0] = 99
    assert with_it.values["mine"][0, 0] == 0
    of_torch = table.with_array(
        "mine", torch.ones(3, 8, requires_grad=True), standard_errors=torch.zeros(3, 8)
    )
    assert (of_torch.values["mine"] == 1).all()
    assert (of_torch.standard_errors["mine"] == 0).all()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "mine",
            np.zeros((8, 3)),
            r"the array 'mine' has shape \[8, 3\], and it must be \[layer, expert\] = \[3, 8\]",
        ),
        ("mine", np.full((3, 8), np.inf), "is inf for M0E0"),
        ("mine", np.where(np.arange(8) == 5, np.nan, np.ones((3, 8))), "is nan for M0E5, which is active at"),
        ("mine", [["a"] * 8] * 3, "no array of numbers"),
        ("activation_norm", np.zeros((3, 8)), "has a metric 'activation_norm' already"),
        ("of mine", np.zeros((3, 8)), "identifier"),
        ("expert", np.zeros((3, 8)), "another column"),
    ],
)
def test_arrays_that_are_wrong_raise(table: MetricTable, name: str, values: Any, message: str) -> None:
    assert (table.counts[:, 5] > 0).all()
    with pytest.raises(ValueError, match=message):
        table.with_array(name, values)


def test_an_unknown_layer_is_named(table: MetricTable) -> None:
    assert table.layer_index(2) == 2
    with pytest.raises(ValueError, match="the table has no layer 7; it is of layers 0, 1, 2"):
        table.layer_index(7)


# ---- as released ----


LENGTHS = (3, 6, 9, 5, 4, 6, 15, 5)


def documents() -> list[Tensor]:
    return [prompts(seed=i, batch=1, length=length)[0][0] for i, length in enumerate(LENGTHS)]


def in_batches(rows: list[Tensor], size: int, *, pad: int = UNKNOWN, side: str = "right") -> list[Batch]:
    """Each batch padded to the longest of its own, with a token that no tokenizer would take."""
    batches = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        width = max(map(len, some)) + 1
        tokens, mask = torch.full((len(some), width), pad), torch.zeros(len(some), width, dtype=torch.long)
        for row, text in enumerate(some):
            place = slice(width - len(text), None) if side == "left" else slice(len(text))
            tokens[row, place], mask[row, place] = text, 1
        batches.append((tokens, mask))
    return batches


def padded() -> list[Batch]:
    """Eight documents; filled up to the longest, over half is padding."""
    return in_batches(documents(), 4)


# Qwen's script chooses again, without groups; here the experts are those that the model chose.
RELEASED_CASES = [
    (variant, whose)
    for variant in ("olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v2_groups", "qwen3_moe")
    for whose in RELEASED
    if (variant, whose) != ("deepseek_v2_groups", "qwen2_moe")
]


@pytest.mark.parametrize(("variant", "whose"), RELEASED_CASES)
def test_released_definitions_are_the_scripts_(hf: Load, model_of: Load, variant: str, whose: str) -> None:
    """On transformers' own modules, with its own padded positions."""
    if (variant, whose) == ("deepseek_v2_groups", "qwen2_moe"):
        pytest.skip(
            "Qwen's script chooses again, without groups; here the experts are those that the model chose"
        )
    batches = padded()
    table = expert_metrics(model_of(variant), batches, as_released=whose)
    expected = released_metrics(hf(variant), batches, whose, PAD)
    assert table.metrics == PAPER_METRICS == tuple(expected)
    for name in table.metrics:
        for place, layer in enumerate(table.layers):
            there = np.array([expected[name][layer, expert] for expert in range(table.n_experts)])
            np.testing.assert_allclose(
                table.values[name][place], there, rtol=2e-4, atol=2e-5, err_msg=f"{name} of layer {layer}"
            )
        assert np.isnan(table.standard_errors[name]).all()


def test_released_tables_say_what_they_count(model_of: Load) -> None:
    batches, model = padded(), model_of("qwen2_moe")
    n_real = sum(LENGTHS)
    for whose, n_tokens, n_padding, padding in (
        ("olmoe", 120, 120 - n_real, {"token": PAD, "width": 15, "side": "right"}),
        ("deepseek_v2", 120, 120 - n_real, {"token": PAD, "width": 15, "side": "left"}),
        ("qwen2_moe", n_real - 3, 0, None),  # one document has three tokens, and these do not count
    ):
        table = expert_metrics(model, batches, as_released=whose)
        assert table.n_tokens == n_tokens
        assert table.provenance["n_padding_counted"] == n_padding
        assert table.provenance["padding"] == padding
        assert table.provenance["as_released"] == whose
        assert table.provenance["definitions"] == RELEASED[whose].definitions
        assert table.provenance["higher_is_more_important"] == dict.fromkeys(PAPER_METRICS, True)
        assert (table.counts.sum(axis=1) == n_tokens * model.cfg.top_k).all()
    assert expert_metrics(model, batches, as_released=True).provenance["as_released"] == "qwen2_moe"
    some = expert_metrics(model, batches, as_released="olmoe", metrics="activation_std", layers=1)
    assert some.metrics == ("activation_std",)
    assert some.layers == (1,)


def test_released_definitions_differ_from_the_paper_s(model_of: Load) -> None:
    """What the tests of the plain metrics rule out is what these do."""
    model, batches = model_of("olmoe"), padded()
    plain = expert_metrics(model, batches)
    olmoe, deepseek, qwen = (expert_metrics(model, batches, as_released=whose) for whose in RELEASED)
    # Raw logits are no rates; shares of activations sum to 1; padding moves the share of selections.
    assert (olmoe.values["utilization_rate"] < 0).any()
    np.testing.assert_allclose(deepseek.values["utilization_rate"].sum(axis=1), model.cfg.top_k)
    np.testing.assert_allclose(qwen.values["utilization_rate"].sum(axis=1), 1)
    assert np.abs(deepseek.values["utilization_rate"] - plain.values["utilization_rate"]).max() > 0.1
    assert np.abs(qwen.values["activation_std"] / plain.values["activation_std"] - 1).min() > 0.1
    # Without padding, DeepSeek's are the paper's.
    tokens = prompts(batch=4, length=16)[0]
    unpadded, paper = expert_metrics(model, tokens, as_released="deepseek_v2"), expert_metrics(model, tokens)
    for name in PAPER_METRICS:
        np.testing.assert_allclose(unpadded.values[name], paper.values[name], rtol=1e-6)


def test_qwen_s_norms_are_of_the_first_thirty_texts(hf: Load, model_of: Load) -> None:
    model = model_of("qwen2_moe")
    tokens = torch.cat([prompts(seed=seed, batch=1, length=4)[0] for seed in range(36)])
    mask = torch.ones_like(tokens)
    mask[2, 3] = 0  # three tokens: left out, but it is one of the thirty
    whole = expert_metrics(model, tokens, attention_mask=mask, as_released=True, batch_size=7)
    expected = released_metrics(hf("qwen2_moe"), [(tokens, mask)], "qwen2_moe", PAD)
    for name in PAPER_METRICS:
        there = np.array([[expected[name][layer, e] for e in range(8)] for layer in whole.layers])
        np.testing.assert_allclose(whole.values[name], there, rtol=2e-4, atol=2e-5, err_msg=name)
    first = expert_metrics(model, tokens[:30], attention_mask=mask[:30], as_released=True)
    for name, alike in (("activation_norm", True), ("activation_std", True), ("mean_routing_weight", False)):
        assert np.allclose(first.values[name], whole.values[name], rtol=1e-5) is alike


def test_released_metrics_of_an_expert_that_is_never_active_are_zero(model_of: Load) -> None:
    for whose in RELEASED:
        table = expert_metrics(model_of("mixtral"), torch.tensor([[5, 9, 7, 6]]), as_released=whose)
        never = table.counts == 0
        assert never.any()
        for name in ("activation_norm", "activation_std"):
            assert (table.values[name][never] == 0).all()


@pytest.mark.parametrize("whose", ["olmoe", "deepseek_v2"])
def test_released_padding_is_not_that_of_the_batches(model_of: Load, whose: str) -> None:
    model, rows = model_of("olmoe"), documents()
    one = expert_metrics(model, in_batches(rows, 4), as_released=whose)
    again = [
        in_batches(rows, 3),
        in_batches(rows, 1),
        in_batches(rows, 8, side="left"),
        in_batches(rows, 4, pad=EOS + 20),
        iter(in_batches(rows, 5)),
        [row[None] for row in rows],
    ]
    tables = [expert_metrics(model, batches, as_released=whose) for batches in again]
    tables.append(expert_metrics(model, in_batches(rows, 4), as_released=whose, batch_size=3))
    for table in tables:
        assert np.array_equal(table.counts, one.counts)
        for name in PAPER_METRICS:
            np.testing.assert_allclose(table.values[name], one.values[name], rtol=1e-5, atol=1e-6)
        for name in ("padding", "n_padding_counted", "fingerprint"):
            assert table.provenance[name] == one.provenance[name]


@pytest.mark.parametrize("whose", ["olmoe", "deepseek_v2"])
def test_the_padding_s_token_matters(
    hf: Load, model_of: Load, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    model, batches = model_of("deepseek_v2"), padded()
    table = expert_metrics(model, batches, as_released=whose)
    other = expert_metrics(model, batches, as_released=whose, pad_token=40)
    assert other.provenance["padding"]["token"] == 40
    assert np.abs(other.values["utilization_rate"] - table.values["utilization_rate"]).max() > 0.05
    expected = released_metrics(hf("deepseek_v2"), batches, whose, 40)
    there = np.array([[expected["activation_norm"][layer, e] for e in range(8)] for layer in other.layers])
    np.testing.assert_allclose(other.values["activation_norm"], there, rtol=2e-4, atol=2e-5)
    # Without a pad token it is the EOS; without either, or a tokenizer, it must be named.
    monkeypatch.setattr(model, "tokenizer", SimpleNamespace(pad_token_id=None, eos_token_id=EOS))
    assert expert_metrics(model, batches, as_released=whose).provenance["padding"]["token"] == EOS
    monkeypatch.setattr(model, "tokenizer", SimpleNamespace(pad_token_id=None, eos_token_id=None))
    with pytest.raises(ValueError, match=r"has no tokenizer with either; name the token by pad_token="):
        expert_metrics(model, batches, as_released=whose)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match=r"has no tokenizer with either"):
        expert_metrics(model, batches, as_released=whose)
    named = expert_metrics(model, batches, as_released=whose, pad_token=PAD)
    assert np.array_equal(named.values["activation_norm"], table.values["activation_norm"])
    assert expert_metrics(model, batches, as_released="qwen2_moe").provenance["padding"] is None
    with pytest.raises(ValueError, match=r"token 100000 is no token of .*; name one by pad_token="):
        expert_metrics(model, batches, as_released=whose, pad_token=100_000)


@pytest.mark.parametrize("whose", ["olmoe", "deepseek_v2"])
def test_padded_queries_change_no_real_token(model_of: Load, whose: str) -> None:
    """The run with transformers' padding gives real tokens what every run gives them."""
    model, rows = model_of("deepseek_v2"), documents()
    seen: list[Tensor] = []
    with model.hooks([("blocks.2.hook_resid_post", lambda value, hook: seen.append(value.detach().clone()))]):
        expert_metrics(model, padded(), as_released=whose)
        with torch.no_grad():
            for row in rows:
                model(row[None])
    padding = []
    for i, row in enumerate(rows):
        place = slice(15 - len(row), None) if whose == "deepseek_v2" else slice(len(row))
        torch.testing.assert_close(seen[0][i, place], seen[1 + i][0])
        rest = torch.ones(15, dtype=torch.bool)
        rest[place] = False
        padding.append(seen[0][i, rest])
    # On the left all padded positions of a text are the same: each sees the whole row.
    same = torch.allclose(padding[0], padding[0][:1].expand_as(padding[0]), atol=1e-5)
    assert same is (whose == "deepseek_v2")
    assert not torch.allclose(padding[0][0], padding[1][0], atol=1e-3)
    assert torch.is_grad_enabled()


def test_logits_that_wait_for_a_lower_threshold() -> None:
    """Whatever the order of the batches, the lowest of all thresholds decides."""
    logits = torch.randn(40, 6)
    logits[33] -= 2.0
    lowest = logits.topk(2, dim=1).values[:, -1].min()
    reaches = logits >= lowest
    expected = (logits * reaches).double().sum(0) / reaches.sum(0).clamp(min=1)
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        kept = AboveLowestThreshold(6)
        for some in logits[order].split(7):
            kept.add(some, 2)
        torch.testing.assert_close(kept.means, expected)
        assert torch.equal(kept.count, reaches.sum(0).double())
    assert not reaches.all()


def test_released_errors(model_of: Load) -> None:
    tokens = torch.tensor([[5, 9, 7]])
    with pytest.raises(
        ValueError, match=r"as_released='gpt': .* 'olmoe', 'deepseek_v2', 'qwen2_moe', and none for 'gpt'"
    ):
        expert_metrics(model_of("olmoe"), tokens, as_released="gpt")
    with pytest.raises(ValueError, match="none for 'mixtral'"):
        expert_metrics(model_of("mixtral"), tokens, as_released=True)
    with pytest.raises(
        ValueError, match="released code has no metric 'random'; as_released has utilization_rate"
    ):
        expert_metrics(model_of("olmoe"), tokens, as_released=True, metrics=["random"])
    for whose in (None, "qwen2_moe"):
        with pytest.raises(ValueError, match="pad_token is of padding that is counted"):
            expert_metrics(model_of("olmoe"), tokens, as_released=whose, pad_token=3)
    with pytest.raises(ValueError, match="no batches"):
        expert_metrics(model_of("olmoe"), [], as_released=True)
    with pytest.raises(ValueError, match="texts of 4 tokens or more"):
        expert_metrics(model_of("qwen2_moe"), tokens, as_released=True)

"""What `routing_contributions` takes and refuses, and reading its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens.corpus import Document, bos_by_default, token_batches
from moe_lens.routing.contributions import contributions_of, routing_contributions
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.senders import GRANULARITIES
from moe_lens.routing.streaming import ContributionAccumulator
from tests.conftest import leftover_hooks
from tests.families import BOS, prompts
from tests.routing_cases import (
    assert_same_results,
    corpus,
)

Load = Callable[[str], Any]


# ---- inputs ----


def test_every_way_to_give_tokens(model_of: Load) -> None:
    model = model_of("olmoe")
    texts = ["When Mary and John went", "the store", "Each expert writes what it knows"]
    documents = [Document(f"d{i}", "", text) for i, text in enumerate(texts)]
    batches = token_batches(model, documents, batch_size=8, prepend_bos=bos_by_default(model))
    as_batches = routing_contributions(model, batches, by="head")
    [batch] = list(batches)
    same = [
        routing_contributions(model, texts, by="head"),
        routing_contributions(model, tuple(texts), by="head"),
        routing_contributions(model, batch.tokens, attention_mask=batch.mask, by="head"),
        routing_contributions(model, batch.tokens, attention_mask=batch.mask.long(), by="head"),
        routing_contributions(model, [(batch.tokens, batch.mask)], by="head"),
        routing_contributions(model, [(batch.tokens, batch.mask, "whatever")], by="head"),
        routing_contributions(model, iter([(batch.tokens, batch.mask)]), by="head"),
        routing_contributions(model, ((t, m) for t, m, _ in batches), by="head"),
        routing_contributions(model, [batch], by="head"),
    ]
    for result in same:
        assert_same_results(result, as_batches)
    assert as_batches.provenance["corpus"] == [batches.description]
    assert as_batches.provenance["fingerprints"] == [batches.fingerprint]
    assert same[0].provenance["fingerprints"] == [batches.fingerprint]
    assert "3 texts" in same[0].provenance["corpus"][0]
    assert same[2].provenance["corpus"] == ["3 rows of tokens given by the caller"]

    one = routing_contributions(model, texts[0])
    assert one.n_documents["lead"] == 1
    row = batch.tokens[:1, : int(batch.mask[0].sum())]
    for what in (row, [row], [(row,)], [(row, None)], [[row, None]], [texts[0]]):
        assert_same_results(routing_contributions(model, what), one)


def test_provenance(model_of: Load) -> None:
    model = model_of("olmoe")
    results = routing_contributions(model, corpus(), by=["layer", "source"], source_axis="offset")
    for result in results.values():
        assert result.provenance["model"] == model.cfg.model_name
        assert result.provenance["dtype"] == "float32"
        assert result.provenance["experts"] == "all"
        assert result.provenance["source_axis"] == "offset"
        assert set(result.provenance) == {
            "model", "revision", "dtype", "weights", "edited", "corpus", "fingerprints", "experts", "lead_token",
            "source_axis", "moe_lens",
        }  # fmt: skip
    assert routing_contributions(model, corpus()).provenance["source_axis"] is None


def test_clear_errors(model_of: Load) -> None:
    model, (tokens, mask) = model_of("deepseek_v2"), prompts("right")

    def bad(message: str, given: Any = tokens, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            routing_contributions(model, given, **settings)

    bad("receiver 0 is no MoE layer", receivers=[0, 1])
    bad("receivers must be layers in rising order, each once", receivers=[2, 1])
    bad("receivers must be layers in rising order, each once", receivers=[1, 1])
    bad("receivers must be layers in rising order, each once", receivers=[])
    bad(r"by='heads' is no granularity; available: 'layer'", by="heads")
    bad(r"by='heads' is no granularity; available: 'layer'", by=["layer", "heads"])
    bad(r"must name granularities, each once", by=["layer", "head", "layer"])
    bad(r"must name granularities, each once", by=[])
    bad("source_axis='distance' must be one of", by="source", source_axis="distance")
    bad("source_axis='distance' must be one of", source_axis="distance")
    for experts in ("some", [], [1, 1]):
        bad("must be 'all', 'selected', or a list of experts, each once", experts=experts)
    for experts in ([8], [-1], [0, True], [0.5]):
        bad("there is no expert", experts=experts)
    bad("ranks are among all experts", experts=[0, 1], rank_shift=True)

    bad("there were no batches", [])
    bad("there were no batches", iter([]))
    bad("there were no batches", [], by="source")
    bad("one document a row", [tokens[0]])
    bad("one document a row", tokens[0])
    bad(r"the mask \(2, 8\) must have the tokens' shape \(2, 9\)", [(tokens, mask[:, 1:])])
    bad(r"the mask \(2, 8\) must have the tokens' shape \(2, 9\)", tokens, attention_mask=mask[:, 1:])
    bad("row 1 of a batch has no real token", [(tokens, torch.tensor([[1], [0]]).expand_as(tokens))])
    bad("texts, tokens or batches of tokens are wanted, not int", 3)
    bad("texts, tokens or batches of tokens are wanted, not NoneType", None)
    for what in ("a text", ["a text"], [tokens]):
        bad("attention_mask goes with tokens given as one tensor", what, attention_mask=mask)

    bad("a document of 9 tokens is longer than max_positions=8", by="source", max_positions=8)
    bad("needs max_positions, the length of the longest document", iter([tokens]), by="source")
    bad("needs max_positions", (t for t in [tokens]), by=["layer", "source"])
    holes = mask.clone()
    holes[:, 2] = 0
    bad("real tokens in one run", [(tokens, holes)], by="source")
    routing_contributions(model, iter([tokens]), by="source", max_positions=9)
    assert leftover_hooks(model) == []


def test_what_are_no_tokens_is_named(model_of: Load) -> None:
    """Batches that hold something else raise the error that all bad inputs raise."""
    model = model_of("olmoe")
    for what in ([[5, 6, 7]], [3], (text for text in ["a text"]), [None], [([5, 6], None)]):
        with pytest.raises(ValueError, match="a batch is tokens, or a tuple that begins with them"):
            routing_contributions(model, what)


def test_max_positions_must_be_positive(model_of: Load) -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_positions"):
            routing_contributions(model_of("olmoe"), prompts()[0], by="source", max_positions=wrong)


def test_documents_of_nothing_but_bos_leave_nothing_to_average(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens = torch.full((2, 1), BOS)
    assert routing_contributions(model, tokens).n_documents == {"lead": 2, "rest": 0}
    with pytest.raises(ValueError, match="nothing to average over"):
        routing_contributions(model, tokens, bos_is_lead=False)


def test_bos_needs_a_tokenizer_with_one(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("olmoe")
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="bos_is_lead=False needs a BOS token"):
        routing_contributions(model, prompts()[0], bos_is_lead=False)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_what_is_not_finite_raises_and_is_not_added(model_of: Load, by: str) -> None:
    model, (tokens, _) = model_of("qwen2_moe"), prompts(length=30)
    accumulator = ContributionAccumulator(model, by=by, max_positions=30)
    with torch.no_grad():
        with accumulator.listening(tokens, None):
            model(tokens)
        before = contributions_of(accumulator)[by]
        for bad in (torch.nan, torch.inf):

            def spoil(value: Tensor, hook: Any, bad: float = bad) -> Tensor:
                value = value.clone()
                value[1, 17] = bad
                return value

            for point in ("blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.0.mlp.hook_expert_post"):
                with (
                    pytest.raises(ValueError, match="not finite; nothing of it was added"),
                    model.hooks([(point, spoil)]),
                    accumulator.listening(tokens, None),
                ):
                    model(tokens)
    assert_same_results(contributions_of(accumulator)[by], before)


def test_exactly_one_whole_forward_pass(model_of: Load) -> None:
    model, (tokens, _) = model_of("mixtral"), prompts()
    accumulator = ContributionAccumulator(model)
    with pytest.raises(ValueError, match="there were no batches"):
        contributions_of(accumulator)
    with pytest.raises(RuntimeError, match="one whole forward pass"), accumulator.listening(tokens, None):
        pass

    def forward(**how: Any) -> None:
        with torch.no_grad(), accumulator.listening(tokens, None):
            model(tokens, **how)
            if not how:
                model(tokens)

    for how in ({}, {"stop_at_layer": 1}):
        with pytest.raises(RuntimeError, match="one whole forward pass"):
            forward(**how)
    with pytest.raises(ValueError, match="by='source' needs max_positions"):
        ContributionAccumulator(model, by="source")
    with pytest.raises(ValueError, match="there were no batches"):
        contributions_of(accumulator)


# ---- the result ----


@pytest.fixture(scope="module")
def result(hooked: Load) -> Any:
    return routing_contributions(hooked("deepseek_v2"), corpus(), by="expert", rank_shift=True)


def test_measures_by_name_and_as_attributes(result: Any) -> None:
    for name in (*MEASURES, *RANK_MEASURES):
        values, named = result.measure(name), getattr(result, name)
        assert list(values) == ["lead", "rest"]
        for position in values:
            assert values[position].shape == (len(result.senders), len(result.receivers))
            np.testing.assert_array_equal(values[position], named[position])
    plain = [result.measure, result.when_active, result.standard_error, lambda m: result.top("M2", m)]
    for read in plain:
        with pytest.raises(
            ValueError, match=r"no measure 'median' here; the measures are variance, aps, ans"
        ):
            read("median")


def test_rank_measures_must_be_asked_for(model_of: Load) -> None:
    got = routing_contributions(model_of("olmoe"), prompts()[0])
    for name in RANK_MEASURES:
        with pytest.raises(
            ValueError, match=rf"no measure '{name}' here \(rank_shift=True measures it\); the"
        ):
            got.measure(name)
        with pytest.raises(ValueError, match="rank_shift=True measures it"):
            getattr(got, name)


def test_frame_holds_every_cell_that_has_a_value(result: Any) -> None:
    frame = result.to_frame()
    columns = [c for m in result.measures for c in (m, f"{m}_standard_error")]
    assert list(frame.columns) == ["position", "sender", "receiver", *columns]
    assert len(frame) == sum(int((~np.isnan(v)).sum()) for v in result.variance.values())
    assert not frame[list(result.measures)].isna().to_numpy().any()
    row = frame.query("position == 'rest' and sender == 'M1E3' and receiver == 'M2'")
    sender, receiver = result.senders.index("M1E3"), result.receivers.index("M2")
    for measure in result.measures:
        assert row[measure].tolist() == [result.measure(measure)["rest"][sender, receiver]]
        expected = result.standard_error(measure)["rest"][sender, receiver]
        assert row[f"{measure}_standard_error"].tolist() == [expected]


def test_sel(result: Any) -> None:
    frame = result.to_frame()
    for sender, receiver in [
        ("A0", None),
        (["A0", "M1S"], "M2"),
        (None, ["M2"]),
        (None, None),
        ("M1E0", "M1"),
    ]:
        got = result.sel(sender=sender, receiver=receiver)
        keep = frame
        if sender is not None:
            keep = keep[keep["sender"].isin([sender] if isinstance(sender, str) else sender)]
        if receiver is not None:
            keep = keep[keep["receiver"].isin([receiver] if isinstance(receiver, str) else receiver)]
        assert got.to_dict("records") == keep.to_dict("records")
    assert len(result.sel(sender="M1E0", receiver="M1")) == 0  # it comes after the receiver
    with pytest.raises(ValueError, match=r"there is no sender 'M1E8'; there are embed, A0"):
        result.sel(sender="M1E8")
    with pytest.raises(ValueError, match=r"there is no receiver 'M0'; there are M1, M2"):
        result.sel(receiver="M0")


@pytest.mark.parametrize("when_active", [False, True])
@pytest.mark.parametrize("position", ["lead", "rest"])
def test_top(result: Any, position: str, when_active: bool) -> None:
    for measure in result.measures:
        read = result.when_active if when_active else result.measure
        values = read(measure)[position][:, 1]
        size = 1 - values if measure == "overlap" else np.abs(values)
        best = sorted(np.flatnonzero(~np.isnan(size)), key=lambda i: -size[i])
        frame = result.top("M2", measure, n=7, position=position, when_active=when_active)
        assert list(frame.columns) == ["sender", measure, "standard_error", "documents"]
        assert frame["sender"].tolist() == [result.senders[i] for i in best[:7]]
        np.testing.assert_array_equal(frame[measure], values[best[:7]])
        errors = result.standard_error(measure, when_active=when_active)[position][:, 1]
        np.testing.assert_array_equal(frame["standard_error"], errors[best[:7]])
        documents = result.documents_with(position, when_active=when_active)
        assert frame["documents"].tolist() == documents[best[:7]].tolist()
        every = result.top(2, measure, n=1000, position=position, when_active=when_active)
        assert len(every) == len(best)
    for n in (0, -1):
        with pytest.raises(ValueError, match="must be positive"):
            result.top("M2", n=n)
    with pytest.raises(ValueError, match="position must be one of lead, rest, not 'middle'"):
        result.top("M2", position="middle")
    with pytest.raises(ValueError, match="position must be one of lead, rest, not 'middle'"):
        result.documents_with("middle")


def test_receiver_index(result: Any) -> None:
    assert result.receivers == ("M1", "M2")
    assert [result.receiver_index(r) for r in ("M1", 1, "M2", 2)] == [0, 0, 1, 1]
    for wrong in (0, "M0", "A1", 3, ""):
        with pytest.raises(ValueError, match="there are M1, M2"):
            result.receiver_index(wrong)


def test_one_document_has_no_standard_error(model_of: Load) -> None:
    got = routing_contributions(model_of("mixtral"), prompts(batch=1)[0])
    assert np.isfinite(got.variance["rest"][0]).all()
    for measure in MEASURES:
        for values in got.standard_error(measure).values():
            assert np.isnan(values).all()

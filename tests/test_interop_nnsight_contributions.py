"""`routing_contributions` of a model in nnsight against HookedMoE's on the same batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import CONFIG
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.corpus import Document, token_batches
from moe_lens.interop.nnsight import jobs, plan, routing_contributions, traffic
from moe_lens.interop.nnsight.contributions import GRANULARITIES, contributions_analysis
from moe_lens.interop.nnsight.shipped.moments import merge_results
from moe_lens.routing import contributions as counterpart
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import ROUNDING
from tests.families import FAMILIES, prompts, write_checkpoint, write_tokenizer
from tests.nnsight_cases import lazy_model, traced_model
from tests.nnsight_server import client
from tests.routing_cases import VARIANTS, assert_close_results, assert_same_results, corpus

Load = Callable[[str], Any]
Results = dict[str, RoutingContributions]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of forward passes of each job that is run."""
    ran: list[int] = []
    session = jobs._session

    def counted(lm: Any, job: Any, backend: Any) -> Any:
        ran.append(len(job.steps))
        return session(lm, job, backend)

    monkeypatch.setattr(jobs, "_session", counted)
    return ran


def module_of(lm: Any) -> Any:
    """The model of transformers."""
    return lm._module


def four_batches() -> list[tuple[Tensor, Tensor]]:
    """Of unlike lengths, padded on either side; an expert may be chosen in some only."""
    return [
        prompts(("left", "right")[seed % 2], seed=seed, batch=1 + seed % 3, length=4 + seed)
        for seed in range(4)
    ]


def assert_equal(ours: Results, expected: Results) -> None:
    """Everything but provenance: float32 sums differ by their order."""
    assert ours.keys() == expected.keys()
    for by, wanted in expected.items():
        got = ours[by]
        assert_close_results(got, wanted, rtol=1e-5, atol=1e-5)
        assert (got.by, got.measures, got.firsts) == (wanted.by, wanted.measures, wanted.firsts)
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is None
        assert got.closes
        assert got.model_logit_difference == pytest.approx(wanted.model_logit_difference, abs=1e-5)


def assert_bitwise(ours: Results, expected: Results) -> None:
    for by, wanted in expected.items():
        assert_same_results(ours[by], wanted)
        assert ours[by].provenance == wanted.provenance


# ---- against HookedMoE ----


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_hooked_moe(traced: Load, model_of: Load, variant: str, padding: str) -> None:
    """Padded on either side; one document is a single token, and has no rest."""
    batches = corpus(padding)
    expected = counterpart.routing_contributions(model_of(variant), batches, by=GRANULARITIES)
    ours = routing_contributions(traced(variant), batches, by=GRANULARITIES)
    assert ours["layer"].n_documents == {"lead": 5, "rest": 4}
    assert_equal(ours, expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "selected": dict(experts="selected"),
    "listed": dict(experts=[5, 0, 3]),
    "the last receiver": dict(receivers=[2]),
    "a receiver before": dict(receivers=[1]),
    "receivers, selected": dict(receivers=[1, 2], experts="selected"),
    "without BOS": dict(bos_is_lead=False),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bias", "olmoe_bias_odd_width"])
def test_settings_equal_hooked_moe(
    traced: Load, model_of: Load, variant: str, settings: dict[str, Any]
) -> None:
    batches = corpus("left", bos_in_first=True)
    expected = counterpart.routing_contributions(model_of(variant), batches, by=GRANULARITIES, **settings)
    ours = routing_contributions(traced(variant), batches, by=GRANULARITIES, **settings)
    assert_equal(ours, expected)
    for by in GRANULARITIES:
        assert ours[by].provenance["experts"] == expected[by].provenance["experts"]
        assert ours[by].provenance["lead_token"] == expected[by].provenance["lead_token"]


@pytest.mark.parametrize("variant", FAMILIES)
def test_what_would_be_sent_gives_the_same(traced: Load, variant: str) -> None:
    """`remote="local"` runs the serialized functions, with this package hidden; to the bit."""
    batches = corpus("left")
    here = routing_contributions(traced(variant), batches, by=GRANULARITIES, batches_per_job=1)
    sent = routing_contributions(
        traced(variant), batches, by=GRANULARITIES, batches_per_job=1, remote="local"
    )
    assert_bitwise(sent, here)


def test_selected_experts_would_be_sent_too(traced: Load) -> None:
    here, sent = (
        routing_contributions(traced("olmoe"), corpus(), by="head", experts="selected", remote=remote)
        for remote in (False, "local")
    )
    assert_same_results(sent, here)


def test_in_several_jobs_as_in_one(traced: Load, runs: list[int]) -> None:
    in_one = routing_contributions(traced("qwen2_moe"), four_batches(), by=GRANULARITIES)
    assert runs == [4]
    in_three = routing_contributions(
        traced("qwen2_moe"), iter(four_batches()), by=GRANULARITIES, batches_per_job=3
    )
    assert runs == [4, 3, 1]
    for by in GRANULARITIES:
        assert_close_results(in_three[by], in_one[by], rtol=1e-9, atol=1e-9)
        assert in_three[by].completeness_error == in_one[by].completeness_error
        assert in_three[by].model_logit_difference == in_one[by].model_logit_difference


def test_results_of_jobs_are_not_held_together(traced: Load) -> None:
    analysis = contributions_analysis(traced("olmoe"), four_batches(), batches_per_job=1)
    given: list[list[Any]] = []

    def keep(number: int, results: list[Any]) -> None:
        assert analysis.keep is not None
        analysis.keep(number, results)
        given.append(results)

    result = jobs.run(traced("olmoe"), replace(analysis, keep=keep))
    assert isinstance(result, RoutingContributions)
    assert result.n_documents["lead"] == sum(len(tokens) for tokens, _ in four_batches())
    assert given == [[]] * 4


TEXTS = ["The router sends every token", "to a few experts.", "Which ones?"]


def test_texts_tokens_and_batches(traced: Load, model_of: Load) -> None:
    """As HookedMoE takes them."""
    lm, model = traced("olmoe"), model_of("olmoe")
    batches = token_batches(model, [Document(str(i), "", text) for i, text in enumerate(TEXTS)], batch_size=2)
    tokens, mask = prompts("left")
    ways: list[tuple[Any, dict[str, Any]]] = [
        (TEXTS, dict(batch_size=2)),
        (TEXTS[0], {}),
        (batches, {}),
        (tokens, dict(attention_mask=mask, batch_size=1)),
        ([tokens, (tokens.flip(1), None)], {}),
    ]
    for given, settings in ways:
        expected = counterpart.routing_contributions(model, given, **settings)
        ours = routing_contributions(lm, given, **settings)
        assert_equal({"layer": ours}, {"layer": expected})
        for name in ("corpus", "fingerprints", "dtype", "experts", "lead_token", "source_axis", "edited"):
            assert ours.provenance[name] == expected.provenance[name], name


def test_what_padding_holds_is_not_read(checkpoint: Callable[[str], Path]) -> None:
    """Its readout overflows, and so does its scale: their quotient is no number."""
    lm = traced_model(checkpoint("qwen2_moe"))
    batches = corpus("right")
    expected = routing_contributions(lm, batches, by=GRANULARITIES, bos_is_lead=False)
    unused = next(i for i in range(4, 128) if not any(bool((t == i).any()) for t, _ in batches))
    with torch.no_grad():
        module_of(lm).get_input_embeddings().weight[unused] = 3e38
    padded = [(tokens.masked_fill(~mask.bool(), unused), mask) for tokens, mask in batches]
    ours = routing_contributions(lm, padded, by=GRANULARITIES, bos_is_lead=False)
    for by in GRANULARITIES:
        assert_close_results(ours[by], expected[by], rtol=1e-6, atol=1e-6)


# ---- half precision ----


def far(ours: RoutingContributions, expected: RoutingContributions, measure: str) -> float:
    """The largest difference of means, of the largest mean."""
    mine, its = ours.measure(measure)["rest"], expected.measure(measure)["rest"]
    return float(np.nanmax(np.abs(mine - its)) / np.nanmax(np.abs(its)))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("variant", [*FAMILIES, "deepseek_v2_bias"])
def test_bfloat16(checkpoint: Callable[[str], Path], variant: str, autocast: bool) -> None:
    """It closes, by the counterpart's rule; numbers agree to some roundings of 2**-9 (4e-3 was measured), where another
    choice of experts would be seen."""
    batches = corpus("left")
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    expected = counterpart.routing_contributions(model, batches, by=GRANULARITIES)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = routing_contributions(
            traced_model(checkpoint(variant), torch.bfloat16), batches, by=GRANULARITIES
        )
    for by, wanted in expected.items():
        got = ours[by]
        assert got.senders == wanted.senders
        assert got.senders[-1] == ROUNDING
        assert got.closes
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is not None
        assert wanted.rounding_ratio is not None
        # Loosely: which addition rounds worst is another where one number is.
        assert 0.5 < got.rounding_ratio / wanted.rounding_ratio < 2
        assert 0.25 < got.model_logit_difference / wanted.model_logit_difference < 4
        for measure in got.measures:
            assert far(got, wanted, measure) < 0.03, (by, measure)
        # As large, though it is another at each number.
        for measure, times in (("variance", 2.0), ("norm", 1.2)):
            mine, its = (result.measure(measure)["rest"][-1] for result in (got, wanted))
            assert np.all((mine < times * its) & (its < times * mine)), measure


@pytest.mark.parametrize("variant", FAMILIES)
def test_float32_under_autocast(traced: Load, model_of: Load, variant: str) -> None:
    """Components are written in half precision: by layer the stream loses nothing; heads need `rounding`."""
    batches = corpus("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = routing_contributions(traced(variant), batches, by=GRANULARITIES)
        sent = routing_contributions(traced(variant), batches, by=GRANULARITIES, remote="local")
    expected = counterpart.routing_contributions(model_of(variant), batches, by=GRANULARITIES)
    assert_bitwise(sent, ours)
    for by, wanted in expected.items():
        got = ours[by]
        assert list(got.senders) == [*wanted.senders, ROUNDING]
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is not None
        assert got.rounding_ratio <= {"layer": 1e-3, "head": 1, "expert": 16}[by]
    assert far_without_rounding(ours["layer"], expected["layer"]) < 0.1
    assert (ours["head"].variance["rest"][-1] > 0).all()


def far_without_rounding(ours: RoutingContributions, expected: RoutingContributions) -> float:
    mine, its = ours.norm["rest"][:-1], expected.norm["rest"]
    return float(np.nanmax(np.abs(mine - its)) / np.nanmax(its))


def test_some_in_half_precision_cannot_be_averaged_with_others() -> None:
    whole = {"moments": {"A0/heads/lead/all": {}}}
    with pytest.raises(ValueError, match="half precision"):
        merge_results([whole, {"moments": {**whole["moments"], "rounding/head/lead/all": {}}}])


def test_the_worst_of_several_batches() -> None:
    """Whatever their order; of those that are broken the first says at which layer."""
    sizes = dict(documents={"lead": 2, "rest": 1}, tokens={"lead": 2, "rest": 5}, moments={})
    one = {**sizes, "errors": {"head": 0.2}, "ratios": {"head": 0.5}, "difference": 3.0, "broken": -1}
    one["dtype"] = "float32"
    other = {**sizes, "errors": {"head": 0.1}, "ratios": {"head": 2.5}, "difference": 4.0, "broken": 7}
    other["dtype"] = "float32"
    worst = {
        "documents": {"lead": 4, "rest": 2},
        "tokens": {"lead": 4, "rest": 10},
        "moments": {},
        "errors": {"head": 0.2},
        "ratios": {"head": 2.5},
        "difference": 4.0,
        "broken": 7,
        "dtype": "float32",
    }
    assert merge_results([one, other]) == merge_results([other, one]) == [worst]
    assert merge_results([other, one, {**one, "broken": 1}])[0]["broken"] == 7
    assert merge_results([one]) == [one]
    with pytest.raises(ValueError, match="some batches ran in float32 and others in bfloat16"):
        merge_results([one, {**other, "dtype": "bfloat16"}])


# ---- guards ----


@pytest.mark.parametrize("by", GRANULARITIES)
def test_senders_that_do_not_sum_to_the_logits(checkpoint: Callable[[str], Path], by: str) -> None:
    lm = traced_model(checkpoint("olmoe"))
    layer = module_of(lm).model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(
        ValueError, match=f"the senders by {by} are not what the routers read: their scores miss"
    ):
        routing_contributions(lm, corpus(), by=by)
    result = routing_contributions(lm, corpus(), by=by, allow_incomplete=True)
    assert result.completeness_error > 1e-3
    assert not result.closes


@pytest.mark.parametrize("by", GRANULARITIES)
def test_rounding_that_is_none(checkpoint: Callable[[str], Path], by: str) -> None:
    lm = traced_model(checkpoint("olmoe"), torch.bfloat16)
    module_of(lm).model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match=r"what is left over is \d+ times as large as rounding can be"):
        routing_contributions(lm, corpus(), by=by)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_scores_that_are_not_finite(checkpoint: Callable[[str], Path], tmp_path: Path, by: str) -> None:
    """Whatever is allowed: and nothing of it is kept."""
    lm = traced_model(checkpoint("mixtral_head_dim_odd_width"))
    with torch.no_grad():
        module_of(lm).model.layers[1].self_attn.o_proj.weight[0] = torch.inf
    for allow in (False, True):
        with pytest.raises(ValueError, match="scores at layer 1 hold values that are not finite"):
            routing_contributions(
                lm, corpus(), by=by, allow_incomplete=allow, state=tmp_path / "kept", batches_per_job=1
            )
    assert not (tmp_path / "kept").exists()
    assert np.isfinite(routing_contributions(lm, corpus(), by=by, receivers=[0]).variance["rest"]).any()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "source": (dict(by="source"), "by='source' is not served in nnsight.*of a HookedMoE"),
    "neuron": (dict(by=["layer", "neuron"]), "by='neuron' is not served in nnsight.*of a HookedMoE"),
    "unknown granularity": (dict(by="layers"), "is no granularity"),
    "none": (dict(by=[]), "must name granularities"),
    "twice": (dict(by=["head", "head"]), "each once"),
    "rank shift": (dict(rank_shift=True), r"rank_shift is not served in nnsight; moe_lens\.routing"),
    "source axis": (dict(source_axis="offset"), "source_axis is not served"),
    "receiver": (dict(receivers=[0]), "receiver 0 is no MoE layer"),
    "order": (dict(receivers=[2, 1]), "rising order"),
    "expert": (dict(experts=[8]), "there is no expert 8"),
    "experts": (dict(experts="chosen"), "must be 'all', 'selected'"),
    "mask": (dict(attention_mask=torch.ones(1, 2)), "attention_mask goes with tokens"),
    "batch size": (dict(batch_size=0), "batch_size=0 must be positive"),
    "job size": (dict(batches_per_job=0), "batches_per_job=0 must be positive"),
    "nothing": (dict(batches_or_texts=[]), "nothing to average over"),
    "empty row": (
        dict(batches_or_texts=[(torch.ones(2, 2).long(), torch.tensor([[1, 1], [0, 0]]))]),
        "row 1 of attention_mask has no real token",
    ),
    "vocabulary": (dict(batches_or_texts=torch.full((1, 3), 128)), "beyond the vocabulary"),
    "folder": (dict(state="nowhere/state"), "there is no folder"),
    "remote": (dict(remote="everywhere"), "remote='everywhere' must be"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_errors_before_anything_runs(
    checkpoint: Callable[[str], Path], runs: list[int], settings: dict[str, Any], message: str
) -> None:
    lm = lazy_model(checkpoint("deepseek_v2"))
    settings = {"batches_or_texts": ["A text"], **settings}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        routing_contributions(lm, **settings)
    assert runs == []


def test_a_setting_that_nothing_has(traced: Load) -> None:
    with pytest.raises(TypeError, match="no setting 'receiver'"):
        routing_contributions(traced("olmoe"), "A text", receiver=1)


def test_settings_of_the_counterpart_are_served_or_refused() -> None:
    """A setting that it gets is one or the other: none is taken and does nothing."""
    ours = set(inspect.signature(routing_contributions).parameters)
    its = set(inspect.signature(counterpart.routing_contributions).parameters)
    refused = {"rank_shift", "source_axis", "max_positions", "memory_budget", "save_every", "shards"}
    assert its - ours == {"model", *refused}
    assert ours - its == {"lm", "batches_per_job", "remote", "others"}


# ---- states, sums and bytes ----


class Killed(KeyboardInterrupt):
    """Somebody pressed Ctrl-C."""


@pytest.mark.parametrize(
    ("remote", "dtype"), [(False, torch.float32), (False, torch.bfloat16), ("local", torch.float32)]
)
def test_killed_and_resumed(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    runs: list[int],
    monkeypatch: pytest.MonkeyPatch,
    remote: Any,
    dtype: torch.dtype,
) -> None:
    """At any job, as if it had not been: to the bit."""
    lm = traced_model(checkpoint("qwen2_moe"), dtype)
    how: dict[str, Any] = dict(by=GRANULARITIES, batches_per_job=1, remote=remote)
    expected = routing_contributions(lm, four_batches(), **how)
    counted = jobs._session
    for dies_at in (1, 2, 3):
        state = tmp_path / f"{dies_at}"
        runs.clear()

        def dies(lm: Any, job: Any, backend: Any, n: int = dies_at) -> Any:
            if len(runs) == n:
                raise Killed
            return counted(lm, job, backend)

        with monkeypatch.context() as patched:
            patched.setattr(jobs, "_session", dies)
            with pytest.raises(Killed):
                routing_contributions(lm, four_batches(), state=state, **how)
        assert len(runs) == dies_at
        settings = {name: value for name, value in how.items() if name != "remote"}
        left = plan(routing_contributions, lm, four_batches(), state=state, **settings, remote="local")
        assert left.jobs == 4 - dies_at
        runs.clear()
        assert_bitwise(routing_contributions(lm, four_batches(), state=state, **how), expected)
        assert len(runs) == 4 - dies_at
        # A run that is through is not run again.
        runs.clear()
        assert_bitwise(routing_contributions(lm, four_batches(), state=state, **how), expected)
        assert runs == []


def test_a_state_of_another_run(checkpoint: Callable[[str], Path], tmp_path: Path, runs: list[int]) -> None:
    lm, state = traced_model(checkpoint("olmoe")), tmp_path / "state"
    batches = four_batches()
    routing_contributions(lm, batches, by="head", state=state)
    before = state.read_bytes()
    runs.clear()
    for given, settings, problem in (
        (batches, dict(by="layer"), "by was"),
        (batches, dict(receivers=[1]), "receivers was"),
        (batches, dict(experts="selected"), "experts was 'all' and is 'selected'"),
        (batches, dict(bos_is_lead=False), "lead_token was"),
        (batches, dict(batches_per_job=2), "batches_per_job was 8 and is 2"),
        (batches[:3], {}, "its batches were others"),
        ([batches[0], *batches], {}, "its batches were others"),
    ):
        with pytest.raises(ValueError, match=f"is of another run: {problem}"):
            routing_contributions(lm, given, **{"by": "head", "state": state, **settings})
    with torch.no_grad():
        module_of(lm).model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="is of another run: weights was"):
        routing_contributions(lm, batches, by="head", state=state)
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ValueError, match="is no file of routing contributions"):
        routing_contributions(lm, batches, by="head", state=tmp_path / "other")
    assert runs == []
    assert state.read_bytes() == before


def test_results_add_up_and_are_kept(traced: Load, model_of: Load, tmp_path: Path) -> None:
    lm, batches = traced("deepseek_v2"), four_batches()
    one = routing_contributions(lm, batches[:2], by="expert")
    other = routing_contributions(lm, batches[2:], by="expert")
    both = routing_contributions(lm, batches, by="expert")
    assert_close_results(one + other, both, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="same tokens"):
        _ = one + one
    theirs = counterpart.routing_contributions(model_of("deepseek_v2"), batches[2:], by="expert")
    with pytest.raises(ValueError, match="weights is"):
        _ = one + theirs
    loaded = RoutingContributions.load(both.save(tmp_path / "both"))
    assert_same_results(loaded, both)
    assert loaded.provenance == both.provenance
    assert set(both.to_frame().columns) == set(theirs.to_frame().columns)
    assert both.top("M2", n=3).shape == (3, 4)


def test_provenance_says_what_is_known(checkpoint: Callable[[str], Path]) -> None:
    """A fingerprint of weights that are here; of others, how they were asked for."""
    loaded, lazy = traced_model(checkpoint("olmoe")), lazy_model(checkpoint("olmoe"))
    here = [routing_contributions(lm, TEXTS) for lm in (loaded, lazy, lazy)]
    assert len({result.provenance["weights"] for result in here}) == 1
    assert all(result.provenance["ran"] == "in nnsight, in this process" for result in here)
    assert len(here[0].provenance["weights"]) == 64
    elsewhere = lazy_model(checkpoint("olmoe"))
    analysis = contributions_analysis(elsewhere, TEXTS, ran="in nnsight, at http://somewhere")
    assert not elsewhere.dispatched
    result = jobs.run(loaded, analysis)
    assert isinstance(result, RoutingContributions)
    assert result.provenance["ran"] == "in nnsight, at http://somewhere"
    assert result.provenance["weights"] == (f"not read: those of {checkpoint('olmoe')}, revision not given")


def test_batches_of_another_shape_are_others(traced: Load, tmp_path: Path, runs: list[int]) -> None:
    """Though they hold the same tokens in the same order."""
    lm, (tokens, _) = traced("olmoe"), prompts(batch=2, length=8)
    routing_contributions(lm, tokens, state=tmp_path / "state")
    with pytest.raises(ValueError, match="its batches were others"):
        routing_contributions(lm, tokens.reshape(4, 4), state=tmp_path / "state")
    assert runs == [1]


def edited_by(lm: Any, factor: float) -> Any:
    """A copy of the model whose first MoE layer writes so many times what it did."""
    with lm.edit() as (_, edited):
        edited.model.layers[0].mlp.output = edited.model.layers[0].mlp.output * factor
    return edited


def test_provenance_names_edits(traced: Load, tmp_path: Path) -> None:
    """So that numbers of an edited model are not added to those of another, nor go on with their state."""
    lm, state = traced("olmoe"), tmp_path / "state"
    plain = routing_contributions(lm, TEXTS, state=state)
    doubled, again, tripled = (edited_by(lm, factor) for factor in (2.0, 2.0, 3.0))
    results = [routing_contributions(model, TEXTS) for model in (doubled, again, tripled)]
    edits = [result.provenance["edited"] for result in results]
    assert plain.provenance["edited"] == []
    assert len(edits[0]) == 1
    assert "mlp.output * factor" in edits[0][0]
    assert edits[0] == edits[1] != edits[2]
    with pytest.raises(ValueError, match="of another run: edited was"):
        routing_contributions(doubled, TEXTS, state=state)
    with pytest.raises(ValueError, match="edited is"):
        _ = plain + routing_contributions(doubled, ["other text of the same model"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FAMILIES)
def test_a_result_does_not_grow_with_its_corpus(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    """10 documents and 100 come back as the same number of bytes, which was planned."""
    monkeypatch.setattr(CONFIG.API, "COMPRESS", False)
    lm, sizes = traced_model(checkpoint(variant), dtype), []
    for n in (10, 100):
        tokens, _ = prompts(batch=n, length=5)
        settings: dict[str, Any] = dict(by=GRANULARITIES, batch_size=10)
        planned = plan(routing_contributions, lm, tokens, **settings, remote="local", batches_per_job=10)
        with traffic() as sent:
            routing_contributions(lm, tokens, **settings, remote="local", batches_per_job=10)
        assert sent.jobs == planned.jobs == 1
        sizes.append(sent.bytes_down)
        assert planned.bytes_down == pytest.approx(sent.bytes_down, rel=0.03)
    assert sizes[1] <= sizes[0] + 64


# ---- on a server ----


@pytest.mark.parametrize("variant", FAMILIES)
def test_for_a_key_that_reaches_no_weights(nnsight_server: Any, checkpoint: Any, variant: str) -> None:
    """Readouts and heads' output weights are what modules make there."""
    expected = routing_contributions(traced_model(checkpoint(variant)), corpus("left"), by=GRANULARITIES)
    lm = client(checkpoint(variant))
    with nnsight_server.limits(trusted=False):
        got = routing_contributions(lm, corpus("left"), by=GRANULARITIES, remote=nnsight_server.url)
    for by, wanted in expected.items():
        assert_close_results(got[by], wanted, rtol=1e-5, atol=1e-5)
        assert got[by].completeness_error <= 1e-5


@pytest.mark.parametrize("variant", FAMILIES)
def test_on_a_server(
    nnsight_server: Any, checkpoint: Callable[[str], Path], traced: Load, tmp_path: Path, variant: str
) -> None:
    """From a client without weights, in two jobs, one killed before: as in this process."""
    lm, batches, url = client(checkpoint(variant)), four_batches(), nnsight_server.url
    how: dict[str, Any] = dict(by=GRANULARITIES, batches_per_job=2)
    planned = plan(routing_contributions, lm, batches, **how, remote=url)
    assert (planned.jobs, planned.passes, planned.served) == (2, 4, True)
    expected = routing_contributions(traced(variant), batches, **how)
    with traffic() as sent:
        got = routing_contributions(lm, batches, **how, state=tmp_path / "state", remote=url)
    assert sent.jobs == 2
    assert not lm.dispatched
    for by, wanted in expected.items():
        assert_close_results(got[by], wanted, rtol=1e-5, atol=1e-6)
        assert got[by].completeness_error <= 1e-5
        assert got[by].provenance["ran"] == f"in nnsight, at {url}"
        assert got[by].provenance["weights"].startswith("not read: those of")
    with traffic() as sent:
        again = routing_contributions(lm, batches, **how, state=tmp_path / "state", remote=url)
    assert sent.jobs == 0
    assert_bitwise(again, got)
    with pytest.raises(ValueError, match="is of another run: weights was"):
        routing_contributions(traced(variant), batches, **how, state=tmp_path / "state")
    with pytest.raises(ValueError, match="weights is"):
        _ = got["head"] + routing_contributions(traced(variant), [prompts(seed=9)], by="head")


def test_half_precision_on_a_server(nnsight_server: Any, tmp_path: Path) -> None:
    """Which runs it under autocast."""
    directory = write_checkpoint("qwen2_moe", tmp_path / "half", dtype=torch.bfloat16)
    write_tokenizer(directory)
    nnsight_server.add("half", directory, torch.bfloat16)
    # Whatever precision the client believes it to be in.
    lm = client(directory, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = routing_contributions(traced_model(directory, torch.bfloat16), corpus(), by=GRANULARITIES)
    got = routing_contributions(lm, corpus(), by=GRANULARITIES, remote=nnsight_server.url)
    for by, wanted in expected.items():
        assert got[by].senders[-1] == ROUNDING
        assert got[by].provenance["dtype"] == wanted.provenance["dtype"] == "bfloat16"
        assert got[by].closes
        assert far(got[by], wanted, "norm") < 0.03

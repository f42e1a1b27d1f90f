"""`ablate` refuses what HookedMoE refuses, in its words, and does any other specs as it does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens.interop.nnsight import ablate
from moe_lens.interop.nnsight.shipped import ablations as shipped
from moe_lens.interventions import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    LogitDifference,
    RouterOnly,
    SwapRanks,
    TopK,
    UnfiredIntervention,
    expert_reference,
)
from moe_lens.interventions.branches import HOWS
from tests.families import prompts
from tests.intervention_cases import reference_of
from tests.nnsight_ablations import (
    active_at,
    assert_as_hooked_moe,
    assert_same_refusal,
    changes_of,
    expected_loss,
)
from tests.nnsight_cases import traced_model
from tests.nnsight_server import client

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def reference(hooked: Load) -> Load:
    return once(lambda variant: reference_of(hooked(variant)))


# --- before anything runs ---


NONSENSE: list[Any] = [
    Ablate("M9E1"),
    Ablate("M1E8"),
    Ablate("M1S"),
    Ablate(ranks=5, layers=1),
    Ablate(ranks=1, pos=0),
    Ablate(ranks=1, pos=9),
    Ablate(ranks=1, pos=(1, 2, 3)),
    Ablate(ranks=1, pos=[[True] * 8] * 2),
    Ablate(ranks=(1, 2, 3, 4), layers=1, how="renormalize"),
    TopK(9),
    SwapRanks(5, 6),
    SwapRanks(1, 2),
    ForceExperts((0, 1, 2, 3, 4), layers=1),
    ForbidExperts((0, 1, 2, 3, 4), layers=1, inactive="allow"),
    [Ablate("M1E2"), Ablate("M1E2", pos=4)],
    [ForceExperts("M1E2"), ForbidExperts("M1E2")],
    [TopK(2), SwapRanks(1, 5)],
    [TopK(2), TopK(3)],
    [TopK(2, pos=4), Ablate(ranks=3, pos=4)],
    [],
    ["M1E2"],
]


@pytest.mark.parametrize("item", NONSENSE, ids=str)
def test_nonsense_raises_before_anything_runs(
    traced: Load, model_of: Load, monkeypatch: pytest.MonkeyPatch, item: Any
) -> None:
    lm, model = traced("olmoe"), model_of("olmoe")
    fail = lambda *args, **kwargs: pytest.fail("the model ran before the error")  # noqa: E731
    monkeypatch.setattr(type(lm._module), "forward", fail)
    monkeypatch.setattr(model.blocks[0], "forward", fail)
    assert_same_refusal(lm, model, *prompts("left"), item)


def test_a_change_that_nothing_measured_could_show(traced: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's last token has no loss, and a logit is not changed by what comes after it."""
    lm, (tokens, mask) = traced("olmoe"), prompts("right")
    lengths = mask.sum(dim=1)
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[torch.arange(len(mask)), lengths - 1] = True
    both = last.clone()
    both[0, 0] = True
    # Not at every token that has a loss: where one row shows the change, the ablation is measured.
    ablate(lm, tokens, [Ablate(ranks=1, pos=both)], attention_mask=mask)
    ablate(
        lm, tokens, [Ablate(ranks=1, pos=last)], attention_mask=mask, measure="logits", positions=lengths - 1
    )
    ablate(lm, tokens, [Ablate(ranks=1, pos=2)], attention_mask=mask, measure="logits", positions=2)
    fail = lambda *args, **kwargs: pytest.fail("the model ran before the error")  # noqa: E731
    monkeypatch.setattr(type(lm._module), "forward", fail)
    with pytest.raises(ValueError, match="a row's last token has no loss") as raised:
        ablate(lm, tokens, [Ablate(ranks=1), Ablate(ranks=1, pos=last)], attention_mask=mask)
    assert "ablation 1: " in str(raised.value.__notes__)
    with pytest.raises(ValueError, match="acts only at tokens after all that is measured"):
        ablate(lm, tokens, [Ablate(ranks=1, pos=3)], attention_mask=mask, measure="logits", positions=2)


def test_values_that_are_not_finite_raise(checkpoint: Callable[[str], Path]) -> None:
    """NaN stands for padding alone."""
    lm, (tokens, mask) = traced_model(checkpoint("olmoe")), prompts("right")
    with torch.no_grad():
        lm._module.model.layers[1].mlp.experts.down_proj[3] = torch.nan
    spec = Ablate("M1E3", inactive="allow")
    for measure, positions in (("loss", None), ("logits", 4), (LogitDifference(5, 6), 4)):
        with pytest.raises(ValueError, match="the clean run's values hold values that are not finite"):
            ablate(lm, tokens, [spec], attention_mask=mask, measure=measure, positions=positions)


def test_wrong_arguments(traced: Load, reference: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, (tokens, mask) = traced("olmoe"), prompts("right")
    fail = lambda *args, **kwargs: pytest.fail("the model ran before the error")  # noqa: E731
    monkeypatch.setattr(type(lm._module), "forward", fail)
    one = [Ablate(ranks=1)]
    for wrong, error, message in [
        (Ablate(ranks=1), TypeError, "specs must be a list"),
        ([], ValueError, "there is no ablation"),
        ([RouterOnly("M0")], TypeError, r"RouterOnly\('M0'\) is not carried out in a trace"),
        ([[TopK(2), RouterOnly("M0")]], TypeError, "HookedMoE does it"),
        ([[TopK(2), [TopK(3)]]], TypeError, "are several interventions"),
        ([Ablate(ranks=1, how="mean", reference=reference("mixtral"))], ValueError, "of other weights"),
    ]:
        with pytest.raises(error, match=message):
            ablate(lm, tokens, wrong, attention_mask=mask)
    for arguments, message in [
        (dict(measure="kl"), "measure='kl' must be 'loss', 'logits' or a LogitDifference"),
        (dict(measure=LogitDifference(3, 128), positions=3), "token 128 is not in the vocabulary"),
        (dict(positions=3), "positions= goes with logits"),
        (dict(measure="logits", positions=8), "position 8 is padding"),
        (dict(measure="logits"), "position -1 is padding"),
        (dict(measure="logits", positions=(3, 4, 5)), "3 positions positions for 2 rows"),
        (dict(remote="there"), "must be False, True, 'local' or the URL"),
    ]:
        with pytest.raises(ValueError, match=message):
            ablate(lm, tokens, one, attention_mask=mask, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no position has a next token"):
        ablate(lm, tokens[:, :1], one)


def test_what_only_the_run_shows_raises_as_on_hooked_moe(
    traced: Load, model_of: Load, reference: Load
) -> None:
    """Experts that are not active, slots that two remove, too few experts, none that stays: the same words."""
    tokens, mask = prompts("left")
    model, lm = model_of("olmoe"), traced("olmoe")
    there = active_at(model, tokens, mask, 1, (0, 4))
    absent = next(expert for expert in range(8) if expert not in there)
    chosen_alone = TopK(1, layers=1)
    heaviest = {
        active_at(model, tokens, mask, 1, (row, column))[0] for row, column in mask.nonzero().tolist()
    }
    nowhere = sorted(set(range(8)) - heaviest)
    for item in [
        Ablate(absent, layers=1, pos=4),
        Ablate(absent, layers=1, pos=4, how="reroute"),
        ForbidExperts(absent, layers=1, pos=4, inactive="raise"),
        Ablate(absent, layers=1, inactive="raise"),
        [chosen_alone, Ablate(there[-1], layers=1, pos=4)],
        *([chosen_alone, kind(expert, layers=1)] for expert in nowhere for kind in (Ablate, ForbidExperts)),
    ]:
        error = assert_same_refusal(lm, model, tokens, mask, item)
        assert isinstance(error, UnfiredIntervention)
        assert "M1E" in str(error)
    assert nowhere
    for item in [
        [Ablate(there[0], layers=1, pos=4, inactive="allow"), Ablate(ranks=(1, 2, 3, 4), layers=1)],
        [Ablate(ranks=1, layers=1), Ablate(there[-1], all_but=True, layers=1)],
        Ablate(tuple(there), layers=1, how="renormalize"),
        [TopK(5), Ablate(absent, layers=1, all_but=True, how="renormalize")],
        [ForceExperts(there[0], layers=1, pos=4), Ablate(ranks=1, layers=1, how="reroute")],
    ]:
        assert isinstance(assert_same_refusal(lm, model, tokens, mask, item), ValueError)
    # Four experts can be chosen under its groups, until one of them is gone.
    grouped = model_of("deepseek_v2_groups"), traced("deepseek_v2_groups")
    item = [TopK(4), Ablate(ranks=1, layers=1, how="reroute")]
    error = assert_same_refusal(grouped[1], grouped[0], tokens, mask, item)
    assert "experts remain to be chosen from, and 4 are wanted" in str(error)


def test_a_poor_reference_raises_as_on_hooked_moe(traced: Load, model_of: Load) -> None:
    """Experts that it never met, or only where the text has the same prefix; shared ones as well."""
    tokens, mask = prompts("right")
    model, lm = model_of("qwen2_moe"), traced("qwen2_moe")
    poor = expert_reference(model, tokens[:1, :1], n_samples=2)
    first = active_at(model, tokens, mask, 1, (0, 0))
    other = next(e for e in range(8) if e not in first)
    for item in [
        Ablate(ranks=(1, 2, 3), layers=1, how="mean", reference=poor),
        Ablate(other, layers=1, how="mean", reference=poor),
        Ablate(ranks=(1, 2, 3), layers=1, how="resample", reference=poor),
        Ablate(first[0], layers=1, how="resample", reference=poor),
        Ablate("M1S", pos=0, how="resample", reference=poor),
    ]:
        assert_same_refusal(lm, model, tokens, mask, item)
    # Where other experts are missing, or at other places, it does.
    items = [
        Ablate(ranks=1, layers=1, how="mean", reference=poor, pos=[[True] + [False] * 8, [False] * 9]),
        Ablate("M1S", pos=1, how="resample", reference=poor),
    ]
    assert_as_hooked_moe(lm, model, tokens, mask, items)


@pytest.mark.parametrize(
    "item",
    [Ablate(ranks=1, layers=1), ForceExperts("M1E3"), TopK(2, layers=1), SwapRanks(1, 5, layers=1)],
    ids=str,
)
def test_what_did_not_fire_raises(traced: Load, monkeypatch: pytest.MonkeyPatch, item: Any) -> None:
    """One change that is lost: the spec and the layer are named."""
    change = shipped.change_layer

    def one_less(*args: Any) -> dict[str, Any]:
        found = change(*args)
        return {
            **found,
            "counts": {spec: (asked, fired - 1) for spec, (asked, fired) in found["counts"].items()},
        }

    monkeypatch.setattr(shipped, "change_layer", one_less)
    with pytest.raises(
        UnfiredIntervention, match=r"at layer 1: \d+ changes were asked for, and \d+ fired"
    ) as raised:
        ablate(traced("olmoe"), prompts()[0], [item])
    assert str(item) in str(raised.value)
    assert raised.value.__notes__ == [f"ablation 0: {item}"]


# --- any specs ----------------------------------------------------------------------------------------------


@st.composite
def specs(draw: Any, model: Any, reference: Any) -> Any:
    """One spec of any kind, at any layer and position; some make no sense."""
    layer = draw(st.sampled_from(model.cfg.moe_layers))
    masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=2, max_size=2).filter(
        # A change at the last token alone is refused here, and HookedMoE runs it.
        lambda rows: any(any(row[:5]) for row in rows)
    )
    where = dict(layers=layer, pos=draw(st.none() | st.integers(2, 6) | masks))
    experts = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True).map(tuple)
    inactive = dict(inactive=draw(st.sampled_from(["allow", "allow", None])))
    kind = draw(st.sampled_from(["experts", "ranks", "all_but", "force", "forbid", "swap", "top_k"]))
    change = changes_of(draw(st.sampled_from(HOWS)), reference)
    if kind == "experts":
        return Ablate(draw(experts), **where, **inactive, **change)
    if kind == "ranks":
        ranks = st.lists(st.integers(1, model.cfg.top_k), min_size=1, max_size=2, unique=True)
        return Ablate(ranks=tuple(draw(ranks)), **where, **change)
    if kind == "all_but":
        return Ablate(draw(experts), all_but=True, **where, **change)
    if kind == "force":
        return ForceExperts(draw(experts), **where)
    if kind == "forbid":
        return ForbidExperts(draw(experts), **where, **inactive)
    if kind == "swap":
        return SwapRanks(
            draw(st.integers(1, 3)),
            draw(st.integers(2, 8)),
            weights=draw(st.sampled_from(["own", "slot"])),
            **where,
        )
    return TopK(draw(st.integers(1, 6)), **where)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_specs(traced: Load, hooked: Load, reference: Load, data: Any) -> None:
    """The same losses and receipts as HookedMoE's, or the same error."""
    variant = data.draw(st.sampled_from(["olmoe", "qwen2_moe_no_bias", "deepseek_v2_groups"]))
    model, lm = hooked(variant), traced(variant)
    tokens, mask = prompts(data.draw(st.sampled_from(["left", "right"])))
    item = data.draw(st.lists(specs(model, reference(variant)), min_size=1, max_size=3))
    try:
        expected_loss(model, tokens, mask, item)
    except (ValueError, UnfiredIntervention):
        assert_same_refusal(lm, model, tokens, mask, item)
    else:
        assert_as_hooked_moe(lm, model, tokens, mask, [item])


def test_refused_through_a_server(
    nnsight_server: Any, checkpoint: Callable[[str], Path], model_of: Load
) -> None:
    """What only the run shows is told in HookedMoE's words there too."""
    lm, model = client(checkpoint("olmoe")), model_of("olmoe")
    tokens, mask = prompts("left")
    there = active_at(model, tokens, mask, 1, (0, 4))
    absent = next(expert for expert in range(8) if expert not in there)
    for item in (
        Ablate(absent, layers=1, pos=4),
        [ForceExperts(there[0], layers=1, pos=4), Ablate(ranks=1, layers=1, how="reroute")],
    ):
        assert_same_refusal(lm, model, tokens, mask, item, remote=nnsight_server.url)

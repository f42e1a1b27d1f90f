"""`ablate` of a model in nnsight against HookedMoE under the same specs: losses, receipts, errors, and what is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.interop.nnsight import ablate, plan, traffic
from moe_lens.interop.nnsight.ablation import ablate_analysis
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
    run_with_interventions,
)
from moe_lens.interventions.branches import HOWS
from tests.families import FAMILIES, prompts
from tests.intervention_cases import MASK, POSITIONS, reference_of
from tests.nnsight_cases import lazy_model, traced_model
from tests.nnsight_server import client
from tests.reference import assert_same

Load = Callable[[str], Any]
VARIANTS = [*FAMILIES, "qwen2_moe_no_bias", "deepseek_v2_groups"]


@pytest.fixture(scope="module")
def traced(checkpoint: Callable[[str], Path]) -> Load:
    return once(lambda variant: traced_model(checkpoint(variant)))


@pytest.fixture(scope="module")
def reference(hooked: Load) -> Load:
    return once(lambda variant: reference_of(hooked(variant)))


def layers_of(model: Any) -> tuple[int, int]:
    """The first and the last with experts."""
    there = model.cfg.moe_layers
    return there[0], there[-1]


@torch.no_grad()
def active_at(model: Any, tokens: Tensor, mask: Tensor, layer: int, place: tuple[int, int]) -> list[int]:
    """The experts of a place, heaviest first."""
    name = f"blocks.{layer}.mlp.hook_expert_indices"
    return model.run_with_cache(tokens, attention_mask=mask, names_filter=name)[1][name][place].tolist()


@torch.no_grad()
def expected_loss(model: Any, tokens: Tensor, mask: Tensor, item: Any) -> tuple[Tensor, Any]:
    return run_with_interventions(
        model, tokens, item, attention_mask=mask, return_type="loss", loss_per_token=True
    )


def lines_of(receipt: Any) -> dict[Any, Any]:
    return {key: (line.asked, line.fired) for key, line in receipt.lines.items()}


def assert_as_hooked_moe(
    lm: Any, model: Any, tokens: Tensor, mask: Tensor, items: list[Any], remote: Any = False
) -> Any:
    """Every loss to 1e-5 of the largest, NaN at the same places; every receipt to the unit."""
    found = ablate(lm, tokens, items, attention_mask=mask, remote=remote)
    for number, item in enumerate(items):
        loss, receipt = expected_loss(model, tokens, mask, item)
        ours = found.losses[number]
        assert torch.equal(ours.isnan(), loss.isnan())
        assert_same(ours.nan_to_num(), loss.nan_to_num(), str(item), tolerance=1e-5)
        assert lines_of(found.receipts[number]) == lines_of(receipt), item
        assert found.receipts[number].n_runs == 1
    with torch.no_grad():
        clean = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert_same(found.clean.nan_to_num(), clean.nan_to_num(), "clean", tolerance=1e-5)
    assert torch.equal(found.effects.nan_to_num(), (found.losses - found.clean).nan_to_num())
    return found


def changes_of(how: str, reference: Any) -> dict[str, Any]:
    return {"how": how, **({"reference": reference, "seed": 3} if how in ("mean", "resample") else {})}


def ablations(model: Any, tokens: Tensor, mask: Tensor, how: str, reference: Any) -> list[Any]:
    """In one way, what can be ablated: ranks and experts, here and there, alone and with others."""
    change = changes_of(how, reference)
    first, last = layers_of(model)
    k, place = model.cfg.top_k, (1, 4)
    there = active_at(model, tokens, mask, first, place)
    one_place = torch.zeros(2, 9, dtype=torch.bool)
    one_place[place] = True
    items: list[Any] = [Ablate(ranks=1, layers=first, pos=pos, **change) for pos, _ in POSITIONS.values()]
    items += [
        Ablate(ranks=k, **change),
        Ablate(tuple(there[: k - 1]), layers=first, pos=one_place, **change),
        Ablate(there[0], layers=first, **change),
        Ablate(there[0], layers=first, all_but=True, pos=one_place, **change),
        [Ablate(ranks=1, layers=first, **change), Ablate(ranks=2, layers=first, pos=4)],
        [Ablate(ranks=1, layers=first, pos=3, **change), Ablate(ranks=1, layers=last, **change)],
        [TopK(k - 1 if model.cfg.router.n_groups > 1 else k + 1), Ablate(ranks=1, layers=last, **change)],
        [TopK(3, pos=4, layers=first), Ablate(ranks=1, layers=first, pos=4, **change)],
    ]
    if k > 2:
        named = (there[0], there[0] ^ 1)  # of one group, where there are groups
        items.append(Ablate(named, layers=(first, last), inactive="allow", **change))
    if how not in ("renormalize", "reroute"):
        items += [
            Ablate(ranks=tuple(range(1, k + 1)), layers=last, **change),
            Ablate(all_but=True, layers=last, pos=MASK, **change),
        ]
    if how == "reroute":
        # Under groups too few would be left of two of them.
        items += [[Ablate(ranks=1, layers=first, pos=3, **change), ForceExperts(7, layers=first, pos=4)]]
    elif model.cfg.shared is not None:
        shared = [] if how == "renormalize" else [Ablate(-1, layers=(first, last), pos=MASK, **change)]
        items += [*shared, [Ablate(ranks=1, layers=first, **change), Ablate(f"M{first}S", pos=5)]]
    if model.cfg.shared is not None and how not in ("renormalize", "reroute"):
        items += [
            Ablate(f"M{last}S", **change),
            Ablate((f"M{first}S", f"M{first}E{there[0]}"), pos=one_place, **change),
        ]
    return items


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ablations_equal_hooked_moe(
    traced: Load, model_of: Load, reference: Load, variant: str, padding: str
) -> None:
    tokens, mask = prompts(padding)
    model = model_of(variant)
    hows = {"none": HOWS[:2], "left": HOWS, "right": HOWS[2:]}[padding]
    items = [item for how in hows for item in ablations(model, tokens, mask, how, reference(variant))]
    found = assert_as_hooked_moe(traced(variant), model, tokens, mask, items)
    assert (found.effects.nan_to_num().abs().amax(dim=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_equal_hooked_moe(traced: Load, model_of: Load, variant: str, padding: str) -> None:
    """Forced, forbidden and swapped experts, other numbers of them, and several together."""
    tokens, mask = prompts(padding)
    model = model_of(variant)
    first, last = layers_of(model)
    # Under groups four experts can be chosen, and of these three are.
    most, forbidden = (4, 0) if variant.endswith("groups") else (8, (0, 3))
    k = model.cfg.top_k
    items: list[Any] = [
        *(ForceExperts((2, 6), layers=first, pos=pos) for pos, _ in POSITIONS.values()),
        ForceExperts(5, layers=(first, last)),
        *(
            ForbidExperts(forbidden, layers=(first, last), pos=pos, inactive="allow")
            for pos, _ in POSITIONS.values()
        ),
        *(TopK(size) for size in range(1, most + 1)),
        TopK(1, layers=last, pos=MASK),
        TopK(most, layers=first, pos=(5, -6)),
        SwapRanks(1, k + 1),
        SwapRanks(k, -1, layers=first, pos=4),
        SwapRanks(1, 2, layers=last, weights="slot"),
        SwapRanks(2, k + 1, layers=first, weights="slot", pos=MASK),
        [SwapRanks(1, k + 1, layers=first, pos=3), SwapRanks(1, 2, layers=first, pos=5, weights="slot")],
        [SwapRanks(1, k + 1, layers=first), Ablate(ranks=1, layers=first)],
        [
            ForceExperts(5, layers=first),
            ForbidExperts(2, layers=first, inactive="allow"),
            TopK(k - 1, layers=first),
        ],
        [ForceExperts(5, layers=first), Ablate(5, layers=first)],
        [
            TopK(2, layers=first, pos=3),
            TopK(1, layers=last),
            Ablate(ranks=1, layers=first, how="renormalize"),
        ],
    ]
    if k > 2:
        items.append([TopK(2, pos=4, layers=last), ForbidExperts(1, layers=last, inactive="allow")])
    assert_as_hooked_moe(traced(variant), model, tokens, mask, items)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_would_be_sent_gives_the_same(
    traced: Load, model_of: Load, reference: Load, variant: str
) -> None:
    """`remote="local"` runs the serialized functions, with this package hidden; to the bit."""
    tokens, mask = prompts("left")
    model = model_of(variant)
    items = [item for how in HOWS for item in ablations(model, tokens, mask, how, reference(variant))]
    items += [ForceExperts(5, layers=model.cfg.moe_layers[0]), SwapRanks(1, -1), TopK(1)]
    here = ablate(traced(variant), tokens, items, attention_mask=mask)
    sent = ablate(traced(variant), tokens, items, attention_mask=mask, remote="local")
    assert torch.equal(here.losses.nan_to_num(), sent.losses.nan_to_num())
    assert [lines_of(receipt) for receipt in here.receipts] == [
        lines_of(receipt) for receipt in sent.receipts
    ]


def test_lazy_model_and_texts(checkpoint: Callable[[str], Path], model_of: Load) -> None:
    """A model of which only the config is here is loaded where it runs here, with transformers' own kernels."""
    texts = ["The router sends every token", "John gave a drink to Mary, and to"]
    model = model_of("qwen2_moe")
    tokens, mask = model.tokenize(texts)
    lm = lazy_model(checkpoint("qwen2_moe"), dtype=torch.float32)
    items = [Ablate(ranks=1, layers=0, how="reroute"), TopK(5), Ablate("M1S", pos=3)]
    found = ablate(lm, texts, items)
    for number, item in enumerate(items):
        loss, _ = expected_loss(model, tokens, mask, item)
        assert_same(found.losses[number].nan_to_num(), loss.nan_to_num(), tolerance=1e-5)


def test_what_is_not_touched_stays_to_the_bit(traced: Load) -> None:
    """Slots in transformers' own order, unsorted for this family; nothing before the place knows of it."""
    tokens, mask = prompts("right")
    found = ablate(
        traced("deepseek_v2"), tokens, [Ablate(ranks=2, pos=4), Ablate("M1S", pos=4)], attention_mask=mask
    )
    assert (found.effects[:, :, :4] == 0).all()
    assert (found.effects[:, :, 4] != 0).all()


# --- other measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [4, -5, (5, 3), None])
def test_logits(traced: Load, model_of: Load, positions: Any) -> None:
    """Whole, or the difference between two, at a column of each row."""
    tokens, mask = prompts("left")
    model, item = model_of("mixtral"), Ablate(ranks=1, pos=3)
    difference = LogitDifference(17, 90)
    arguments = dict(attention_mask=mask, positions=positions)
    whole = ablate(traced("mixtral"), tokens, [item], measure="logits", **arguments)
    found = ablate(traced("mixtral"), tokens, [item], measure=difference, **arguments)
    columns = {None: [8, 8], 4: [4, 4], -5: [4, 4], (5, 3): [5, 3]}[positions]
    with torch.no_grad():
        logits, _ = run_with_interventions(model, tokens, item, attention_mask=mask)
        clean = model(tokens, attention_mask=mask)
    there, before = logits[[0, 1], columns], clean[[0, 1], columns]
    assert_same(whole.values[0], there, tolerance=1e-5)
    assert_same(whole.clean, before, tolerance=1e-5)
    assert_same(found.values[0], there[:, 17] - there[:, 90], tolerance=1e-4)
    assert_same(found.clean, before[:, 17] - before[:, 90], tolerance=1e-4)
    frame = found.to_frame()
    assert frame["position"].tolist() == columns
    assert frame["row"].tolist() == [0, 1]
    assert frame["effect"].tolist() == found.effects[0].tolist()
    assert "logit_difference under 1 ablation, [1, 2]" in repr(found)
    with pytest.raises(ValueError, match="there are no losses"):
        _ = found.losses
    with pytest.raises(ValueError, match="logits are no table"):
        whole.to_frame()


def test_frame_of_losses(traced: Load) -> None:
    """A row for each ablation and token that has a loss."""
    tokens, mask = prompts("left")
    items = [Ablate(ranks=1, layers=0), [TopK(2), Ablate(ranks=1, layers=1)]]
    found = ablate(traced("olmoe"), tokens, items, attention_mask=mask)
    frame = found.to_frame()
    real = mask.bool()
    assert len(frame) == 2 * int((real[:, :-1] & real[:, 1:]).sum())
    for row in frame.itertuples():
        assert row.ablated == found.losses[row.ablation, row.row, row.position]
        assert row.clean == found.clean[row.row, row.position]
        assert row.effect == found.effects[row.ablation, row.row, row.position]
    assert set(frame["interventions"]) == {"Ablate(ranks=1, layers=0)", "TopK(2), Ablate(ranks=1, layers=1)"}
    assert repr(found) == "<AblationResults: loss under 2 ablations, [2, 2, 8]>"


# --- errors -------------------------------------------------------------------------------------------------


def assert_same_refusal(
    lm: Any, model: Any, tokens: Tensor, mask: Tensor, item: Any, remote: Any = False
) -> Exception:
    with pytest.raises((ValueError, TypeError, UnfiredIntervention)) as theirs:
        expected_loss(model, tokens, mask, item)
    with pytest.raises(type(theirs.value)) as ours:
        ablate(lm, tokens, [Ablate(ranks=1), item], attention_mask=mask, remote=remote)
    assert str(ours.value) == str(theirs.value)
    assert ours.value.__notes__ == [
        f"ablation 1: {', '.join(map(str, item if isinstance(item, list) else [item]))}"
    ]
    return ours.value


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
        lambda rows: any(map(any, rows))
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


# --- what is sent -------------------------------------------------------------------------------------------


def test_a_hundred_ablations_are_one_job(
    traced: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back are losses and counts."""
    tokens, mask = prompts("left")
    items = [
        Ablate(ranks=rank, layers=layer, pos=pos)
        for rank in (1, 2, 3, 4)
        for layer in (0, 1, 2)
        for pos in range(3, 9)
    ]
    items += [Ablate(e, layers=layer, inactive="allow") for e in range(8) for layer in (0, 1, 2)]
    items += [TopK(k) for k in (1, 2, 3, 5)]
    assert len(items) == 100

    def planned() -> Any:
        return plan(ablate, traced("olmoe"), tokens, items, attention_mask=mask, remote="local")

    compressed = planned().bytes_up
    monkeypatch.setattr(nnsight.CONFIG.API, "COMPRESS", False)
    with traffic() as sent:
        found = ablate(traced("olmoe"), tokens, items, attention_mask=mask, remote="local", verbose=True)
    whole = planned()
    assert found.losses.shape == (100, 2, 8)
    assert (whole.jobs, whole.passes, sent.jobs, sent.bytes_up) == (1, 101, 1, whole.bytes_up)
    n_lines = sum(len(receipt.lines) for receipt in found.receipts)
    assert whole.bytes_down == 101 * 2 * 8 * 4 + n_lines * 4 * 8
    # Compressed, most of it is the functions' source: another ablation adds a few dozen bytes.
    assert compressed < 20_000
    assert whole.bytes_up < 60_000 + 1000 * len(items)
    assert sent.bytes_down < 100_000
    assert "ablate: 1 job of 101 forward passes" in capsys.readouterr().out


def test_vectors_travel_once(traced: Load, hooked: Load, reference: Load) -> None:
    """Those that may be needed: of named experts theirs, of ranks all; of the samples, those that are drawn."""
    tokens, _ = prompts()
    of, d_model = reference("qwen2_moe"), hooked("qwen2_moe").cfg.d_model

    def sent(*items: Any) -> dict[int, list[int]]:
        job = ablate_analysis(traced("qwen2_moe"), tokens, list(items)).jobs[0]
        return {layer: list(table.shape) for layer, table in job.arguments["vectors"].items()}

    mean, resample = dict(how="mean", reference=of), dict(how="resample", reference=of)
    named = Ablate(("M1E2", "M1E3"), pos=4, inactive="allow", **mean)
    assert sent(TopK(2)) == {}
    assert sent(named) == {1: [2, d_model]}
    assert sent(named, named, Ablate("M1E3", **mean), Ablate("M1S", **mean)) == {1: [3, d_model]}
    assert sent(named, Ablate(ranks=1, layers=(1, 2), **mean)) == {1: [8, d_model], 2: [8, d_model]}
    assert sent(Ablate(0, all_but=True, layers=1, **mean)) == {1: [7, d_model]}
    assert sent(Ablate("M1E2", pos=4, **resample))[1][0] <= 2
    everywhere = sent(Ablate("M1E2", **resample), Ablate("M1E2", **resample))[1][0]
    assert everywhere == int(of.n_samples[1][2])
    job = ablate_analysis(traced("qwen2_moe"), tokens, [Ablate("M1E2", **resample)]).jobs[0]
    assert job.arguments["vectors"][1].dtype == torch.float32


# --- other precisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2_groups", "mixtral"])
def test_bfloat16(checkpoint: Callable[[str], Path], hooked: Load, variant: str) -> None:
    """As far from float32 as HookedMoE is in bfloat16, or at most twice: the roundings are other ones, and as many.

    In the last layer, so that no choice follows, at a prompt where the choices before it are not nearly tied.
    """
    exact = hooked(variant)
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    lm = traced_model(checkpoint(variant), torch.bfloat16)
    reference, k, last = reference_of(model), exact.cfg.top_k, exact.cfg.moe_layers[-1]

    @torch.no_grad()
    def gap(tokens: Tensor) -> float:
        _, cache = exact.run_with_cache(tokens, names_filter=lambda name: name.endswith("expert_weights"))
        ranked = torch.cat(list(cache.values())).sort(-1, descending=True).values
        return float((ranked[..., : k + 2] / ranked[..., 1 : k + 3]).min())

    tokens = max((prompts(seed=seed, batch=1, length=3)[0] for seed in range(60)), key=gap)
    mask = torch.ones_like(tokens)
    items = [Ablate(ranks=1, layers=last, **changes_of(how, reference)) for how in HOWS] + [
        TopK(k + 1, layers=last),
        SwapRanks(1, 2, weights="slot", layers=last),
    ]
    found = ablate(lm, tokens, items)
    in_bfloat16 = torch.stack([expected_loss(model, tokens, mask, item)[0] for item in items])
    in_float32 = torch.stack(
        [
            expected_loss(exact, tokens, mask, item)[0]
            for item in items
            if item.__dict__.get("reference") is None
        ]
    )
    same = [i for i, item in enumerate(items) if item.__dict__.get("reference") is None]
    assert found.losses.dtype == torch.float32
    theirs = (in_bfloat16[same] - in_float32).abs().max()
    ours = (found.losses[same] - in_float32).abs().max()
    assert ours < 2 * theirs + 2**-8 * in_float32.max(), (float(ours), float(theirs))
    assert (found.losses - in_bfloat16).abs().max() < 3 * theirs + 2**-8 * in_float32.max()


def test_under_autocast(traced: Load, model_of: Load, reference: Load) -> None:
    """As a server runs it: weights keep the dtype in which transformers gives them, and numbers are near."""
    tokens, mask = prompts("left")
    model = model_of("qwen2_moe_no_bias")
    items = [
        Ablate(ranks=1, layers=2, pos=6, **changes_of(how, reference("qwen2_moe_no_bias"))) for how in HOWS
    ]
    items += [Ablate("M2S", pos=4), TopK(5, layers=2)]
    plain = ablate(traced("qwen2_moe_no_bias"), tokens, items, attention_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ablate(traced("qwen2_moe_no_bias"), tokens, items, attention_mask=mask, remote="local")
        assert torch.is_autocast_enabled("cpu")
    assert found.losses.dtype == torch.float32
    assert (found.losses - plain.losses).nan_to_num().abs().median() < 0.05
    assert model.cfg.moe_layers[-1] == 2


# --- through a server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_through_a_server(
    nnsight_server: Any,
    checkpoint: Callable[[str], Path],
    model_of: Load,
    reference: Load,
    variant: str,
    trusted: bool,
) -> None:
    """A process without this package, one job; nothing of it reads a parameter."""
    lm, model = client(checkpoint(variant)), model_of(variant)
    tokens, mask = prompts("left")
    items = [item for how in HOWS for item in ablations(model, tokens, mask, how, reference(variant))]
    items += [ForceExperts(5, layers=model.cfg.moe_layers[0]), SwapRanks(1, -1), TopK(1)]
    before = len(nnsight_server.jobs())
    with nnsight_server.limits(trusted=trusted), traffic() as sent:
        assert_as_hooked_moe(lm, model, tokens, mask, items, remote=nnsight_server.url)
    assert sent.jobs == len(nnsight_server.jobs()) - before == 1
    assert next(iter(lm._module.parameters())).is_meta


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

"""What makes no sense raises before the model runs, and says what it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.interventions import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    RouterOnly,
    SwapRanks,
    TopK,
    UnfiredIntervention,
    as_hooks,
    expert_reference,
    intervene,
    run_with_interventions,
)
from moe_lens.interventions.arguments import ExpertName
from moe_lens.interventions.spec_base import Spec
from tests.families import prompts
from tests.intervention_cases import clean_run, reference_of, run


@pytest.fixture
def idle(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`idle(variant)`: a model whose first block fails the test."""

    def load(variant: str) -> Any:
        model = model_of(variant)
        monkeypatch.setattr(model.blocks[0], "forward", lambda *args: pytest.fail("the model ran"))
        return model

    return load


def refused(model: Any, message: str, *specs: Any, padding: str = "left") -> None:
    """Before the model runs, in each of the three ways to apply them, with nothing left."""
    tokens, mask = prompts(padding)
    with pytest.raises(ValueError, match=message), intervene(model, *specs):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        run_with_interventions(model, tokens, specs, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=as_hooks(model, *specs))
    assert model.run_observers == []


# --- specs that are none, of any model ----------------------------------------------------------------------

NAN = float("nan")
NONSENSE: list[tuple[Any, str]] = [
    (lambda: Ablate(), "say what is ablated"),
    (lambda: Ablate("M1E9", ranks=1), "and not both"),
    (lambda: Ablate(ranks=1, all_but=True, layers=1), "and not both"),
    (lambda: Ablate(all_but=True), "say which layers"),
    (lambda: Ablate("E9"), "'E9' is no expert; name one as 'M1E9'"),
    (lambda: Ablate("M1E9N4"), "'M1E9N4' is no expert"),
    (lambda: Ablate("M1E-1"), "'M1E-1' is no expert"),
    (lambda: Ablate(""), "'' is no expert"),
    (lambda: Ablate(9), "are numbers: say of which layers"),
    (lambda: Ablate("M1E9", layers=1), r"leave layers=\(1,\) away"),
    (lambda: Ablate(("M1E9", "M01E9")), "named twice: M1E9, M1E9"),
    (lambda: Ablate((3, 3), layers=1), "has one twice"),
    (lambda: Ablate(("M1E9", 3), layers=1), "must be an integer"),
    (lambda: Ablate(-2, layers=1), "no expert -2"),
    (lambda: Ablate(NAN, layers=1), "experts=.*nan.* must be an integer"),
    (lambda: Ablate(None, layers=1), "experts=.* must be an integer"),
    (lambda: Ablate(True, layers=1), "experts=.*True.* must be an integer"),
    (lambda: Ablate(3.0, layers=1), "must be an integer"),
    (lambda: Ablate(3, layers=1.5), "layers=1.5 must be an integer"),
    (lambda: Ablate(3, layers=-1), "layer -1 has no experts: layers are counted from 0"),
    (lambda: TopK(4, layers=("M1", "A2")), r"layers=\('M1', 'A2'\) must be an integer or a name as 'M3'"),
    (lambda: TopK(4, layers=("M1", 1)), "has one twice"),
    (lambda: Ablate(3, layers=NAN), "layers=nan must be"),
    (lambda: Ablate(3, layers=()), "layers is empty"),
    (lambda: Ablate(3, layers=(1, 1)), "layers=.* has one twice"),
    (lambda: Ablate(3, layers=True), "layers=True must be"),
    (lambda: Ablate(ranks=NAN), "ranks=nan must be"),
    (lambda: Ablate(ranks=(1, 1)), "ranks=.* has one twice"),
    (lambda: Ablate(ranks=1, how="none"), "how='none' must be one of 'zero', 'renormalize'"),
    (lambda: Ablate(ranks=1, how=NAN), "how=nan must be one of"),
    (lambda: Ablate(ranks=1, how="mean"), "how='mean' needs reference="),
    (lambda: Ablate(ranks=1, how="resample"), "how='resample' needs reference="),
    (lambda: Ablate(ranks=1, how="mean", reference=torch.zeros(3)), "how='mean' needs reference="),
    (lambda: Ablate(ranks=1, how="zero", reference=torch.zeros(3)), "how='zero' reads no reference"),
    (lambda: Ablate(ranks=1, seed=0.5), "seed=0.5 must be an integer"),
    (lambda: Ablate("M1E9", all_but="yes"), "all_but='yes' must be True or False"),
    (lambda: Ablate("M1E9", inactive="ignore"), "inactive='ignore' must be 'raise', 'allow' or None"),
    (lambda: Ablate(ranks=1, inactive="allow"), "says nothing of them"),
    (lambda: Ablate("M1E9", all_but=True, inactive="raise"), "says nothing of them"),
    (lambda: Ablate("M1S", all_but=True), "all_but is about routed experts"),
    (lambda: Ablate("M1S", how="reroute"), "'reroute' is about routed experts' weights; M1S takes 'zero'"),
    (lambda: Ablate(-1, layers=2, how="renormalize"), "'renormalize' is about .*; M2S takes"),
    (lambda: Ablate(layers=1, all_but=True, how="renormalize"), "renormalize needs an expert that stays"),
    (lambda: ForceExperts(), "ForceExperts needs experts"),
    (lambda: ForceExperts("M1S"), "M1S is always active"),
    (lambda: ForceExperts("M1E9", inactive="allow"), "leave inactive= away"),
    (lambda: ForbidExperts(()), "ForbidExperts needs experts"),
    (lambda: ForbidExperts(("M1E9", "M1S")), "M1S is always active"),
    (lambda: SwapRanks((1, 2), 9), r"i=\(1, 2\) must be an integer"),
    (lambda: SwapRanks(1, NAN), "j=nan must be an integer"),
    (lambda: SwapRanks(1, 9, weights="both"), "weights='both' must be 'own' or 'slot'"),
    (lambda: TopK((4, 5)), r"k=\(4, 5\) must be an integer"),
    (lambda: TopK(4.0), "k=4.0 must be an integer"),
    (lambda: TopK(True), "k=True must be an integer"),
    (lambda: TopK(4, pos=1.5), "pos=1.5 must be a column"),
    (lambda: TopK(4, pos=NAN), "pos=nan must be a column"),
    (lambda: TopK(4, pos="last"), "pos='last' must be a column"),
    (lambda: TopK(4, pos=True), "pos=True must be a column"),
    (lambda: TopK(4, pos=()), r"pos=\(\) must be a column"),
    (lambda: TopK(4, pos=[True, False]), "must be a column"),
    (lambda: TopK(4, pos=[[0, 1], [1, 0]]), "must be a column"),
    (lambda: TopK(4, pos=torch.ones(2, 9)), "must be a column"),
    (lambda: TopK(4, pos=[[True], [True, False]]), "must be a column"),
    (lambda: TopK(4, pos=[[True], 3]), "must be a column"),
    (lambda: TopK(4, pos=torch.zeros(2, 9, dtype=torch.bool)), "the mask pos selects no position"),
    (lambda: TopK(4, pos=slice(2)), "must be a column"),
    (lambda: RouterOnly(3), "sender=3 must be a name"),
    (lambda: RouterOnly("M0", layers=2), "acts on receivers="),
    (lambda: RouterOnly("M0", ()), "receivers is empty"),
    (lambda: RouterOnly("M0", "A2"), "receivers='A2' must be an integer or a name as 'M3'"),
    (lambda: RouterOnly("M0", (1, "M1")), "has one twice"),
    (lambda: RouterOnly("M0", 1.5), "receivers=1.5 must be"),
    (lambda: RouterOnly("M0", hold_outputs=1), "hold_outputs=1 must be True or False"),
    (lambda: RouterOnly("M0", inactive="never"), "inactive='never' must be"),
]


@pytest.mark.parametrize(("make", "message"), NONSENSE)
def test_specs_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("spec", [SwapRanks, TopK, RouterOnly])
def test_missing_arguments(spec: Any) -> None:
    with pytest.raises(TypeError, match="missing"):
        spec()


def test_what_may_be_written_in_several_ways() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    for one, other in [
        (Ablate("M1E9"), Ablate(9, layers=1)),
        (Ablate("M1E9"), Ablate(["M1E9"])),
        (Ablate("M1E9"), Ablate(ExpertName(1, 9))),
        (Ablate(("M1E9", "M1E3")), Ablate(np.array([9, 3]), layers=np.int64(1))),
        (Ablate(("M1E9", "M2E9")), Ablate(9, layers=range(1, 3))),
        (Ablate("M1S"), Ablate(-1, layers=1)),
        (Ablate(ranks=1), Ablate(ranks=[1])),
        (TopK(4, pos=mask), TopK(4, pos=mask.tolist())),
        (TopK(4, pos=mask), TopK(4, pos=list(mask.numpy()))),
        (TopK(4, pos=(1, 2)), TopK(4, pos=torch.tensor([1, 2]))),
        (TopK(4, pos=3), TopK(4, pos=torch.tensor(3))),
        (TopK(np.int64(4)), TopK(4)),
        (RouterOnly("M0", 3), RouterOnly("M0", ("M3",))),
        (RouterOnly("M0", (3, 4)), RouterOnly("M0", ["3", "M4"])),
        (RouterOnly("M0", np.int64(3)), RouterOnly("M0", torch.tensor([3]))),
    ]:
        assert one == other
        assert hash(one) == hash(other)
        assert dataclasses.replace(one) == one
        assert str(one) == str(other) == repr(one)
    assert TopK(4, pos=3) != TopK(4, pos=(3,))
    assert str(Ablate("M1E9", pos=-1)) == "Ablate('M1E9', pos=-1)"
    assert str(SwapRanks(8, 9, layers=5)) == "SwapRanks(8, 9, layers=5)"
    assert str(RouterOnly("M1E9", receivers=(5,))) == "RouterOnly('M1E9', 5)"
    assert str(Ablate(ranks=1, layers=(1, 2), pos=(3, 4))) == "Ablate(ranks=1, layers=(1, 2), pos=(3, 4))"


# --- not in this model --------------------------------------------------------------------------------------

NOT_THERE: list[tuple[str, Any, str]] = [
    ("olmoe", Ablate("M1E8"), r"no expert M1E8; a layer of .* has 0\.\.7"),
    ("olmoe", Ablate("M3E0"), "layer 3 has no experts; MoE layers are 0, 1, 2"),
    ("deepseek_v2", Ablate("M0E0"), "layer 0 has no experts; MoE layers are 1, 2"),
    ("deepseek_v2", TopK(4, layers=(1, 0)), "layer 0 has no experts"),
    ("olmoe", TopK(4, layers=-1), "layer -1 has no experts"),
    ("olmoe", Ablate("M1S"), "no M1S: .* has no shared experts"),
    ("olmoe", ForceExperts("M1E8"), "no expert M1E8"),
    ("olmoe", ForbidExperts("M1E8"), "no expert M1E8"),
    ("olmoe", Ablate(ranks=5), "no active expert of rank 5: ranks go from 1, the heaviest, to 4"),
    ("olmoe", Ablate(ranks=0), "no active expert of rank 0"),
    ("olmoe", Ablate(ranks=(1, -1)), "no active expert of rank -1"),
    ("olmoe", SwapRanks(0, 5), r"rank i=0 is not in the choice: it holds ranks 1\.\.4"),
    ("olmoe", SwapRanks(5, 6), "rank i=5 is not in the choice"),
    ("olmoe", SwapRanks(1, 9), "no rank j=9 among 8 experts"),
    ("olmoe", SwapRanks(1, 0), "no rank j=0 among 8"),
    ("olmoe", SwapRanks(1, -9), "no rank j=-9 among 8"),
    ("olmoe", SwapRanks(2, 2), "rank 2 cannot be swapped with itself"),
    ("olmoe", SwapRanks(2, -7), "rank 2 cannot be swapped with itself"),
    ("olmoe", SwapRanks(1, 2), "both in the choice"),
    ("olmoe", TopK(9), r"k=9 must lie in 1\.\.8: a layer has 8 experts"),
    ("olmoe", TopK(0), "k=0 must lie in"),
    ("deepseek_v2_groups", TopK(5), r"k=5 must lie in 1\.\.4: .*, and 4 are in eligible groups"),
    ("olmoe", RouterOnly("M2"), "no sender 'M2' before the last router"),
    ("olmoe", RouterOnly("M0E8"), "no sender 'M0E8'"),
    ("olmoe", RouterOnly("A0H4"), "no sender 'A0H4'"),
    ("olmoe", RouterOnly("A0H1<-256"), "no sender 'A0H1<-256'"),
    ("olmoe", RouterOnly("M0S"), "no sender 'M0S'"),
    ("olmoe", RouterOnly("A0bias"), "no sender 'A0bias'"),
    ("olmoe", RouterOnly("rounding"), "no sender 'rounding'"),
    ("olmoe", RouterOnly("M1", 1), "router of layer 1 comes before M1"),
    ("olmoe", RouterOnly("A2", (1, 2)), "router of layer 1 comes before A2"),
    ("deepseek_v2", RouterOnly("embed", 0), "layer 0 has no experts"),
    ("olmoe", ForceExperts([f"M1E{e}" for e in range(5)]), "layer 1: 5 experts are forced into 4 slots"),
    ("olmoe", ForbidExperts([f"M1E{e}" for e in range(5)]), "3 experts remain to be chosen from, and 4"),
    (
        "olmoe",
        Ablate([f"M1E{e}" for e in range(5)], how="reroute", inactive="allow"),
        "layer 1: 3 experts remain to be chosen from, and 4 are wanted",
    ),
    # Groups of two, of which two are eligible: one of each leaves two.
    (
        "deepseek_v2_groups",
        ForbidExperts((0, 2, 4, 6), layers=1),
        "2 experts remain to be chosen from, and 3",
    ),
    (
        "deepseek_v2_groups",
        Ablate((0, 2, 4, 6), layers=1, how="reroute"),
        "layer 1: 2 experts remain to be chosen from, and 3 are wanted",
    ),
    ("olmoe", Ablate(list(range(5)), layers=1, pos=-1), "5 experts are to be removed, and only 4 are active"),
    ("olmoe", Ablate(ranks=(1, 2, 3, 4), how="renormalize"), "all 4 active ones would be removed"),
    ("mixtral", Ablate((0, 1), layers=1, pos=-1, how="renormalize"), "all 2 active ones would be removed"),
    ("mixtral", Ablate(ranks=(1, 2), how="renormalize"), "all 2 active ones would be removed"),
    # Positions.
    ("olmoe", TopK(5, pos=9), "row 0: there is no position 9 among 9"),
    ("olmoe", TopK(5, pos=-10), "row 0: there is no position -10 among 9"),
    ("olmoe", TopK(5, pos=(4, 9)), "row 1: there is no position 9"),
    ("olmoe", TopK(5, pos=(4, 4, 4)), r"pos=\(4, 4, 4\) has 3 columns for 2 rows.* a bool mask"),
    ("olmoe", TopK(5, pos=0), "row 0: the pos position 0 is padding"),
    ("olmoe", TopK(5, pos=2), "row 1: the pos position 2 is padding"),
    ("olmoe", Ablate(ranks=1, pos=torch.ones(2, 9).bool()), "row 0: position 0 of the mask pos is padding"),
    (
        "olmoe",
        Ablate(ranks=1, pos=torch.ones(2, 8).bool()),
        r"mask pos is \[2, 8\], and the tokens are \[2, 9\]",
    ),
    ("olmoe", Ablate(ranks=1, pos=torch.ones(1, 9).bool()), r"mask pos is \[1, 9\]"),
    ("olmoe", RouterOnly("A0H1<-9"), "no source position 9 among 9"),
]


@pytest.mark.parametrize(("variant", "spec", "message"), NOT_THERE)
def test_not_in_this_model(idle: Any, variant: str, spec: Any, message: str) -> None:
    refused(idle(variant), message, spec)


def test_padding_on_the_right(idle: Any) -> None:
    refused(idle("olmoe"), "row 0: the pos position -1 is padding", TopK(5, pos=-1), padding="right")


def test_sources_after_the_query(idle: Any) -> None:
    """And such as are padding: known before the run."""
    tokens, mask = prompts("left")
    for spec, message in (
        (RouterOnly("A0H1<-5", pos=4), "writes nothing at row 0, position 4"),
        (RouterOnly("A0H1<-1", pos=8), "writes nothing at row 1, position 8"),
        (RouterOnly("A0H1<-5", inactive="raise"), "writes nothing at row 0, position 1"),
        (RouterOnly("A0H1<-0"), r"writes at none of the 14 positions"),
    ):
        with pytest.raises(UnfiredIntervention, match=message), intervene(idle("olmoe"), spec):
            idle("olmoe")(tokens, attention_mask=mask)


def test_no_specs(idle: Any) -> None:
    model, (tokens, _) = idle("olmoe"), prompts()
    refused(model, "there is no intervention")
    for wrong in ("M1E9", Ablate, Spec(), None):
        with pytest.raises(TypeError, match="is no intervention; there are Ablate, ForceExperts"):
            as_hooks(model, wrong)
    with pytest.raises(TypeError, match="is no intervention"):
        run_with_interventions(model, tokens, "M1E9")


# --- references ---------------------------------------------------------------------------------------------


def test_references(model_of: Any, checkpoint: Any) -> None:
    """Of other weights, without the layer, without the expert, without another prefix."""
    model, tokens = model_of("olmoe"), prompts()[0]
    reference = reference_of(model)
    with pytest.raises(ValueError, match="how='zero' reads no reference"):
        Ablate(ranks=1, reference=reference)
    other = model_of("qwen3_moe")
    with pytest.raises(ValueError, match="the reference is of other weights"):
        as_hooks(other, Ablate(ranks=1, how="mean", reference=reference))
    twin = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.float32, device="cpu", verbose=False)
    as_hooks(twin, Ablate(ranks=1, how="mean", reference=reference))
    with torch.no_grad():
        twin.blocks[0].mlp.router.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the reference is of other weights"):
        as_hooks(twin, Ablate(ranks=1, how="resample", reference=reference))

    part = reference_of(model, layers=[2])
    with pytest.raises(ValueError, match=r"the reference lacks layers \[1\]; it is of \[2\]"):
        as_hooks(model, Ablate("M1E3", how="mean", reference=part))
    as_hooks(model, Ablate("M2E3", how="mean", reference=part))

    little = expert_reference(model, tokens[:1, :1])
    active = clean_run(model, tokens[:1, :1], None)[1]["blocks.1.mlp.hook_expert_indices"][0, 0].tolist()
    never = next(e for e in range(8) if e not in active)
    with pytest.raises(ValueError, match=f"M1E{never} was never active in the reference"):
        as_hooks(model, Ablate((active[0], never), layers=1, how="mean", reference=little))
    with pytest.raises(ValueError, match="no output in the reference at another prefix"):
        run(model, tokens[:1], None, Ablate(ranks=1, layers=1, pos=0, how="resample", reference=little))


# --- contradictions -----------------------------------------------------------------------------------------

MASK = torch.zeros(2, 9, dtype=torch.bool)
MASK[0, 4] = True
CONTRADICTIONS: list[tuple[str, tuple[Any, ...], str]] = [
    ("olmoe", (TopK(5), TopK(6, layers=1)), "layer 1: .* contradict each other; one TopK a layer"),
    ("olmoe", (TopK(5, pos=3), TopK(6, pos=4)), "layer 0: .* contradict each other"),
    ("olmoe", (SwapRanks(1, 5), TopK(6, layers=2)), "layer 2: .* both change the choice of experts"),
    ("olmoe", (SwapRanks(1, 5), ForceExperts("M1E3")), "layer 1: .* both change the choice"),
    ("olmoe", (ForbidExperts("M1E3"), SwapRanks(1, 5)), "layer 1: .* both change the choice"),
    ("olmoe", (SwapRanks(1, 5), Ablate(ranks=2, how="reroute")), "layer 0: .* both change the choice"),
    ("olmoe", (SwapRanks(1, 5), SwapRanks(2, 6)), "layer 0: .* act at the same position"),
    ("olmoe", (SwapRanks(1, 5, pos=4), SwapRanks(2, 6)), "layer 0: .* act at the same position"),
    ("olmoe", (SwapRanks(1, 5, pos=4), SwapRanks(2, 6, pos=MASK)), "layer 0: .* act at the same position"),
    ("olmoe", (ForceExperts("M1E3"), ForbidExperts("M1E3")), "M1E3 is forced and excluded"),
    ("olmoe", (ForbidExperts("M1E3", pos=4), ForceExperts("M1E3")), "M1E3 is forced and excluded"),
    ("olmoe", (ForbidExperts("M1E3", pos=4), ForceExperts("M1E3", pos=-5)), "M1E3 is forced and excluded"),
    ("olmoe", (Ablate("M1E3", how="reroute"), ForceExperts("M1E3")), "M1E3 is forced and excluded"),
    (
        "olmoe",
        (ForceExperts((0, 1, 2), layers=1), ForceExperts((3, 4), layers=1)),
        "5 experts are forced into 4",
    ),
    (
        "olmoe",
        (ForceExperts((0, 1, 2), layers=1, pos=4), ForceExperts((3, 4), layers=1, pos=(4, 5))),
        "5 experts are forced into 4",
    ),
    ("olmoe", (ForceExperts((0, 1, 2), layers=1), TopK(2)), "3 experts are forced into 2 slots"),
    ("olmoe", (ForceExperts((0, 1, 2), layers=1), TopK(2, pos=4)), "3 experts are forced into 2 slots"),
    (
        "olmoe",
        (ForbidExperts((0, 1), layers=1), TopK(7)),
        "6 experts remain to be chosen from, and 7 are wanted",
    ),
    ("olmoe", (ForbidExperts((0, 1), layers=1), TopK(7, pos=4)), "6 experts remain .* 7 are wanted"),
    (
        "olmoe",
        (ForbidExperts((0, 1, 2), layers=1), ForbidExperts((3, 4), layers=1)),
        "3 experts remain to be chosen from",
    ),
    (
        "olmoe",
        (ForbidExperts((0, 1, 2), layers=1), Ablate((3, 4), layers=1, how="reroute", inactive="allow")),
        "3 experts remain to be chosen from",
    ),
    (
        "olmoe",
        (Ablate(ranks=(1, 2, 3), layers=1, how="reroute"), TopK(6)),
        "5 experts remain .* 6 are wanted",
    ),
    ("olmoe", (Ablate(ranks=4), TopK(3)), "no active expert of rank 4: .* to 3"),
    ("olmoe", (Ablate(ranks=4), TopK(3, pos=4)), "no active expert of rank 4: .* to 3"),
    ("olmoe", (Ablate(ranks=6), TopK(6, pos=4)), "no active expert of rank 6: .* to 4"),
    ("olmoe", (Ablate(ranks=(1, 2), how="renormalize"), TopK(2)), "all 2 active ones would be removed"),
    ("olmoe", (Ablate("M1E3"), Ablate(("M1E3", "M1E4"))), "M1E3 is ablated by two specs"),
    ("olmoe", (Ablate("M1E3", pos=4), Ablate("M1E3", pos=-5)), "M1E3 is ablated by two specs"),
    ("olmoe", (Ablate(ranks=(1, 2)), Ablate(ranks=2, how="renormalize")), "rank 2 is ablated by two specs"),
    ("qwen2_moe", (Ablate("M1S"), Ablate(("M1S", "M2S"))), "M1S is ablated by two specs"),
    ("olmoe", (RouterOnly("M0"), RouterOnly("M0", 2)), "router of layer 2 loses M0 twice"),
    (
        "olmoe",
        (RouterOnly("M0"), RouterOnly("A0", hold_outputs=True)),
        "layer 1: .* contradict .* hold_outputs",
    ),
    (
        "olmoe",
        (RouterOnly("M0", hold_outputs=True), TopK(5, layers=2)),
        "holds the output of layer 2, which TopK",
    ),
    (
        "olmoe",
        (Ablate("M1E3"), RouterOnly("M0", 1, hold_outputs=True)),
        "holds the output of layer 1, which Abl",
    ),
]


@pytest.mark.parametrize(("variant", "specs", "message"), CONTRADICTIONS)
def test_contradictions(idle: Any, variant: str, specs: tuple[Any, ...], message: str) -> None:
    refused(idle(variant), message, *specs)
    refused(idle(variant), message, *specs[::-1])


CERTAIN = [case for case in CONTRADICTIONS if not any(spec.pos is not None for spec in case[1])]


@pytest.mark.parametrize(("variant", "specs", "message"), CERTAIN)
def test_contradictions_without_positions_are_known_at_once(
    idle: Any, variant: str, specs: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message), intervene(idle(variant), *specs):
        pytest.fail("it was let in")


@pytest.mark.parametrize(
    "specs",
    [
        (ForceExperts("M1E3", pos=4), ForbidExperts("M1E3", pos=5, inactive="allow")),
        (SwapRanks(1, 5, pos=4), SwapRanks(2, 6, pos=5)),
        (Ablate(ranks=1, pos=4), Ablate(ranks=1, pos=5, how="renormalize")),
        (Ablate(ranks=6, layers=1, pos=4), TopK(6, layers=1, pos=-5)),
        (Ablate(ranks=6, layers=1, pos=4), TopK(6, layers=1)),
        (ForceExperts((0, 1, 2), layers=1, pos=4), ForceExperts((3, 4), layers=1, pos=5)),
        (ForceExperts((0, 1, 2, 3, 4), layers=1, pos=4), TopK(5, layers=1, pos=(4, 4))),
        (Ablate("M1E3", how="reroute", inactive="allow"), ForbidExperts("M1E3", inactive="allow")),
        (RouterOnly("M0", 1), RouterOnly("M0", 2)),
        (RouterOnly("M0E3"), RouterOnly("A0"), TopK(5)),
    ],
    ids=str,
)
def test_what_goes_together(model_of: Any, specs: tuple[Any, ...]) -> None:
    """It runs, everything fires, and the order in which it is said does not matter."""
    logits, _, receipt = run(model_of("olmoe"), *prompts("left"), *specs)
    reversed_logits, _, reversed_receipt = run(model_of("olmoe"), *prompts("left"), *specs[::-1])
    assert receipt.asked == receipt.fired == reversed_receipt.fired
    assert receipt.fired > 0 or all(getattr(spec, "inactive", None) == "allow" for spec in specs)
    torch.testing.assert_close(logits, reversed_logits)


# --- known on the way ---------------------------------------------------------------------------------------


def test_experts_that_are_not_active(model_of: Any) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("left")
    clean = clean_run(model, tokens, mask)[1]["blocks.1.mlp.hook_expert_indices"]
    idle = next(e for e in range(8) if e not in clean[1, 4] and e in clean[0, 4])
    name = f"M1E{idle}"
    there = str(clean[1, 4].tolist()).replace("[", r"\[").replace("]", r"\]")
    for how in ("zero", "reroute", "renormalize"):
        message = rf"{name} is not active at row 1, position 4, where experts {there} are; inactive='allow'"
        with pytest.raises(UnfiredIntervention, match=message):
            run(model, tokens, mask, Ablate(name, pos=4, how=how))
        receipt = run(model, tokens, mask, Ablate(name, pos=4, how=how, inactive="allow"))[2]
        assert receipt.asked == receipt.fired == 1
        with pytest.raises(UnfiredIntervention, match=f"{name} is not active at row"):
            run(model, tokens, mask, Ablate(name, how=how, inactive="raise"))
        run(model, tokens, mask, Ablate(name, how=how))
    with pytest.raises(UnfiredIntervention, match=f"{name} is not active at row"):
        run(model, tokens, mask, ForbidExperts(name, inactive="raise"))
    assert run(model, tokens, mask, ForbidExperts(name, pos=4))[2].fired == 1
    assert run(model, tokens, mask, ForceExperts(name, pos=4))[2].fired == 2


def test_experts_that_are_active_nowhere(model_of: Any) -> None:
    model, tokens = model_of("olmoe"), prompts(batch=1, length=1)[0]
    idle = next(
        e for e in range(8) if e not in clean_run(model, tokens, None)[1]["blocks.1.mlp.hook_expert_indices"]
    )
    message = rf"M1E{idle} is active at none of the 1 positions of .*M1E{idle}.*; inactive='allow' lets"
    for spec in (Ablate, ForbidExperts):
        with pytest.raises(UnfiredIntervention, match=message):
            run(model, tokens, None, spec(f"M1E{idle}"))
        assert run(model, tokens, None, spec(f"M1E{idle}", inactive="allow"))[2].asked == 0
    idle = next(
        e for e in range(8) if e not in clean_run(model, tokens, None)[1]["blocks.0.mlp.hook_expert_indices"]
    )
    with pytest.raises(UnfiredIntervention, match=f"M0E{idle} writes at none of the 1 positions"):
        run(model, tokens, None, RouterOnly(f"M0E{idle}"))
    with pytest.raises(UnfiredIntervention, match=f"M0E{idle} writes nothing at row 0, position 0"):
        run(model, tokens, None, RouterOnly(f"M0E{idle}", pos=0))
    assert run(model, tokens, None, RouterOnly(f"M0E{idle}", inactive="allow"))[2].asked == 0


def test_contradictions_of_ranks_and_names(model_of: Any) -> None:
    """Which expert has a rank is known on the way only."""
    model, tokens = model_of("olmoe"), prompts(batch=1, length=4)[0]
    expert = int(clean_run(model, tokens, None)[1]["blocks.1.mlp.hook_expert_indices"][0, 2, 1])
    with pytest.raises(ValueError, match=f"M1E{expert} is ablated by two specs at row 0, position 2"):
        run(model, tokens, None, Ablate(expert, layers=1, pos=2), Ablate(ranks=2, layers=1, pos=2))
    with pytest.raises(ValueError, match=f"M1E{expert} is forced and excluded at row 0, position 2"):
        run(
            model,
            tokens,
            None,
            ForceExperts(expert, layers=1),
            Ablate(ranks=2, layers=1, pos=2, how="reroute"),
        )
    others = Ablate([e for e in range(8) if e != expert], layers=1, inactive="allow", how="renormalize")
    with pytest.raises(
        ValueError, match=r"layer 1, row 0, position \d: renormalize needs an expert that stays"
    ):
        run(model, tokens, None, others, SwapRanks(2, -1, layers=1, pos=2))


def test_groups_that_have_too_few_left(model_of: Any) -> None:
    """Whether they do depends on which groups are eligible: the place is named."""
    with pytest.raises(ValueError, match=r"row 1, position 6: 2 experts remain to be chosen from, and 3"):
        run(
            model_of("deepseek_v2_groups"),
            *prompts("left"),
            ForbidExperts((1, 6), layers=1, inactive="allow"),
        )

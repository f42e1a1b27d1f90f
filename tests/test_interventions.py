"""Every intervention against its slow, obvious implementation on transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.interventions import Ablate, ForbidExperts, ForceExperts, RouterOnly, SwapRanks, TopK, intervene
from tests.families import hf_model, prompts
from tests.intervention_cases import (
    MASK,
    PLACES,
    POSITIONS,
    VARIANTS,
    WITH_SHARED,
    assert_like,
    by_expert,
    clean_run,
    reference_of,
    run,
    stand_ins,
)
from tests.reference import assert_same, reference_cache, reference_run
from tests.reference_choice import applied, choose, facts_of
from tests.reference_interventions import (
    SHARED,
    ablated_run,
    ablation_edits,
    choice_edits,
    forbidden_run,
    forced_run,
    real_places,
    router_only_run,
    routers_after,
    swapped_run,
    together,
    top_k_run,
)

HOWS = ("zero", "renormalize", "reroute", "mean", "resample")


def middle_layer(model: Any) -> int:
    return facts_of(model).moe_layers[-2]


def with_reference(model: Any, how: str) -> dict[str, Any]:
    return {"how": how, **({"reference": reference_of(model)} if how in ("mean", "resample") else {})}


def reference_arguments(arguments: dict[str, Any], tokens: Tensor, mask: Tensor, layer: int) -> Any:
    reference = arguments.get("reference")
    return {} if reference is None else stand_ins(reference, tokens, mask, layer, arguments.get("seed", 0))


def changes_something(actual: Any, model: Any, tokens: Tensor, mask: Tensor) -> None:
    clean, _ = clean_run(model, tokens, mask)
    assert (actual[0] - clean)[mask.bool()].abs().max() > 1e-3


# --- ablation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ablate_by_rank(hf: Any, model_of: Any, variant: str, how: str) -> None:
    """The heaviest and, where three are active, the third, at some places of one layer."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    layer, k = middle_layer(theirs), facts_of(theirs).top_k
    ranks = (1, 3) if k > 2 else (1,)
    arguments = with_reference(model, how)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return [chosen[rank - 1] for rank in ranks] if (row, column) in PLACES else []

    actual = run(model, tokens, mask, Ablate(ranks=ranks, layers=layer, pos=MASK, **arguments))
    stand = reference_arguments(arguments, tokens, mask, layer)
    assert_like(actual, ablated_run(theirs, tokens, mask, layer, removed, how, **stand), mask)
    changes_something(actual, model, tokens, mask)
    assert actual[2].asked == actual[2].fired == len(ranks) * len(PLACES)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups"])
def test_positions(hf: Any, model_of: Any, variant: str, how: str, position: str, padding: str) -> None:
    """Every way to say where, with padding on either side."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts(padding)
    layer = middle_layer(theirs)
    pos, places = POSITIONS[position]
    places = set(real_places(tokens, mask)) if places is None else places
    arguments = with_reference(model, how)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return [chosen[1]] if (row, column) in places else []

    actual = run(model, tokens, mask, Ablate(ranks=2, layers=layer, pos=pos, **arguments))
    stand = reference_arguments(arguments, tokens, mask, layer)
    assert_like(actual, ablated_run(theirs, tokens, mask, layer, removed, how, **stand), mask)
    assert actual[2].asked == len(places)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ablate_by_name(hf: Any, model_of: Any, variant: str, how: str) -> None:
    """Two experts wherever they are active; as names, as numbers, and elsewhere let pass."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("right")
    layer, named = middle_layer(theirs), [6, 1]
    arguments = with_reference(model, how)
    if how == "renormalize" and facts_of(theirs).top_k == 2:
        named = [6]
    stand = reference_arguments(arguments, tokens, mask, layer)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        # Of several that are rerouted none takes another's slot.
        gone = [e for e in named if e in chosen]
        return named if gone and how == "reroute" and mask[row, column] else gone if mask[row, column] else []

    expected = ablated_run(theirs, tokens, mask, layer, removed, how, **stand)
    for spec in (
        Ablate([f"M{layer}E{e}" for e in named], **arguments),
        Ablate(torch.tensor(named), layers=layer, **arguments),
    ):
        actual = run(model, tokens, mask, spec)
        assert_like(actual, expected, mask)
    changes_something(actual, model, tokens, mask)

    places = {(0, 4), (1, 4)}
    expected = ablated_run(
        theirs,
        tokens,
        mask,
        layer,
        lambda r, c, chosen: removed(r, c, chosen) if (r, c) in places else [],
        how,
        **stand,
    )
    spec = Ablate([f"M{layer}E{e}" for e in named], pos=4, inactive="allow", **arguments)
    assert_like(run(model, tokens, mask, spec), expected, mask)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_all_but(hf: Any, model_of: Any, variant: str, how: str) -> None:
    """Every active expert except one that is active there."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    layer = middle_layer(theirs)
    clean = reference_cache(theirs, tokens, mask)
    kept = int(clean[f"blocks.{layer}.mlp.hook_expert_indices"][1, 4, 1])
    arguments = with_reference(model, how)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return [e for e in chosen if e != kept] if (row, column) == (1, 4) else []

    place = torch.zeros(2, 9, dtype=torch.bool)
    place[1, 4] = True
    spec = Ablate(f"M{layer}E{kept}", all_but=True, pos=place, **arguments)
    stand = reference_arguments(arguments, tokens, mask, layer)
    actual = run(model, tokens, mask, spec)
    assert_like(actual, ablated_run(theirs, tokens, mask, layer, removed, how, **stand), mask)
    assert actual[2].asked == facts_of(theirs).top_k - 1


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@pytest.mark.parametrize("variant", WITH_SHARED)
def test_shared_experts(hf: Any, model_of: Any, variant: str, how: str) -> None:
    """Alone, and with a routed one."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    layer = middle_layer(theirs)
    arguments = {**with_reference(model, how), **({"seed": 3} if how == "resample" else {})}
    stand = reference_arguments(arguments, tokens, mask, layer)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return [SHARED] if (row, column) in PLACES else []

    actual = run(model, tokens, mask, Ablate(f"M{layer}S", pos=MASK, **arguments))
    assert_like(actual, ablated_run(theirs, tokens, mask, layer, removed, how, **stand), mask)
    assert actual[2].asked == len(PLACES)
    changes_something(actual, model, tokens, mask)

    def and_another(row: int, column: int, chosen: list[int]) -> list[int]:
        return [SHARED, 6] if mask[row, column] else []

    actual = run(model, tokens, mask, Ablate((f"M{layer}E6", f"M{layer}S"), **arguments))
    assert_like(actual, ablated_run(theirs, tokens, mask, layer, and_another, how, **stand), mask)


def test_seeds_of_resample(model_of: Any) -> None:
    """Another seed draws other outputs, the same one the same."""
    model, (tokens, mask) = model_of("olmoe"), prompts()
    spec: dict[str, Any] = dict(ranks=1, layers=1, **with_reference(model, "resample"))
    first, again, other = (run(model, tokens, mask, Ablate(**spec, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# --- another choice -----------------------------------------------------------------------------------------

CHOICES = {
    "forced": lambda k: (ForceExperts, ((6, 1),), forced_run, ([6, 1],)),
    "one forced": lambda k: (ForceExperts, (3,), forced_run, ([3],)),
    # Of one group, where there are groups: of two, too few might remain in those that are eligible.
    "forbidden": lambda k: (ForbidExperts, ((6, 7),), forbidden_run, ([6, 7],)),
    "next swapped": lambda k: (SwapRanks, (k, k + 1), swapped_run, (k, k + 1)),
    "last swapped": lambda k: (SwapRanks, (1, -1), swapped_run, (1, -1)),
    "third from last": lambda k: (SwapRanks, (2, -3), swapped_run, (2, -3)),
    "wider": lambda k: (TopK, (k + 1,), top_k_run, (k + 1,)),
    "narrower": lambda k: (TopK, (k - 1,), top_k_run, (k - 1,)),
}


@pytest.mark.parametrize("where", ["everywhere", "one layer", "places"])
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_choices(hf: Any, model_of: Any, variant: str, kind: str, where: str) -> None:
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    moe_layers, layer = facts_of(theirs).moe_layers, middle_layer(theirs)
    spec, arguments, slow, slow_arguments = CHOICES[kind](facts_of(theirs).top_k)
    layers, pos, places = {
        "everywhere": (moe_layers, None, None),
        "one layer": ((layer,), None, None),
        "places": ((layer,), MASK, PLACES),
    }[where]
    extra = {"inactive": "allow"} if spec is ForbidExperts else {}
    for weights in ("own", "slot") if spec is SwapRanks else (None,):
        own = {} if weights is None else {"weights": weights}
        actual = run(model, tokens, mask, spec(*arguments, layers=layers, pos=pos, **own, **extra))
        expected = slow(theirs, tokens, mask, *slow_arguments, list(layers), places, **own)
        assert_like(actual, expected, mask)
        assert actual[2].asked == actual[2].fired
        if where == "everywhere":
            changes_something(actual, model, tokens, mask)


@pytest.mark.parametrize("variant", ["olmoe", "qwen3_moe", "deepseek_v2_groups"])
def test_ranks_that_exchange_weights(hf: Any, model_of: Any, variant: str) -> None:
    """Both in the choice: the experts stay, and each gets the other's weight."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("right")
    layer, k = middle_layer(theirs), facts_of(theirs).top_k

    def exchanged(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        if (row, column) not in PLACES:
            return None
        weights = applied(probabilities, chosen, facts_of(theirs))
        return [chosen[k - 1], *chosen[1 : k - 1], chosen[0]], weights

    expected = reference_run(theirs, tokens, mask, choice_edits(layer, facts_of(theirs), exchanged))
    actual = run(model, tokens, mask, SwapRanks(1, k, layers=layer, pos=MASK, weights="slot"))
    assert_like(actual, expected, mask)
    back = run(model, tokens, mask, SwapRanks(k, -8, layers=layer, pos=MASK, weights="slot"))
    assert_like(back, expected, mask)  # -8, the last but seven, is the first of eight


def test_slots_to_spare_hold_nobody(hf: Any, model_of: Any) -> None:
    """With more experts at one place than at others, those beyond what a token takes are not active there."""
    model, (tokens, mask) = model_of("olmoe"), prompts()
    wide = TopK(7, layers=1, pos=2)
    _, cache, _ = run(model, tokens, mask, wide)
    assert cache["blocks.1.mlp.hook_expert_indices"].shape[-1] == 7
    weights = cache["blocks.1.mlp.hook_routing_weights"]
    assert (weights[:, 2] > 0).all()
    assert (weights[:, [0, 1, 3, 4, 5, 6, 7, 8]] > 0).sum(-1).unique().tolist() == [4]
    spare = int(cache["blocks.1.mlp.hook_expert_indices"][0, 5, 6])
    clean_cache = clean_run(model, tokens, mask)[1]
    cache_of_four, clean = clean_cache["blocks.1.mlp.hook_routing_weights"], by_expert(clean_cache, 1)

    lighter = Ablate(ranks=1, layers=1, pos=3, how="renormalize")
    renormalized = by_expert(run(model, tokens, mask, wide, lighter)[1], 1)
    assert (renormalized > 0).sum(-1)[0].tolist() == [4, 4, 7, 3, 4, 4, 4, 4, 4]
    swapped = SwapRanks(1, -1, layers=1, pos=2, weights="slot")
    weights = run(model, tokens, mask, swapped, lighter)[1]["blocks.1.mlp.hook_routing_weights"]
    assert torch.equal(weights[:, 2], cache_of_four[:, 2])

    total = run(model, tokens, mask, wide, Ablate(layers=1, all_but=True))[2]
    assert total.lines[1, 1].asked == 2 * (8 * 4 + 7)
    named = run(model, tokens, mask, wide, Ablate(spare, layers=1))[2]
    n_wide = sum(spare in cache["blocks.1.mlp.hook_expert_indices"][row, 2] for row in range(2))
    assert n_wide > 0
    n_active = (clean[:, [0, 1, 3, 4, 5, 6, 7, 8], spare] > 0).sum() + n_wide
    assert named.lines[1, 1].asked == n_active
    seen = run(model, tokens, mask, wide, RouterOnly(f"M1E{spare}"))[2]
    assert seen.lines[1, 2].asked == n_active


# --- what routers see ---------------------------------------------------------------------------------------

SENDERS = [
    (variant, sender)
    for variant in VARIANTS
    for sender in ("embed", "A0", "A1H3", "A0H2<-4", "M0", "M0E3", "M0S", "M0E6N4", "M0SN7", "M0N5")
    if (sender.startswith("M0S") <= (variant in ("qwen2_moe", "qwen2_moe_no_bias", "deepseek_v2_groups")))
    and (sender.startswith("M0E") <= (variant != "deepseek_v2"))  # layer 0 is dense
    and ((sender == "M0N5") == (variant == "deepseek_v2" and sender.startswith("M0N")))
]


@pytest.mark.parametrize(("variant", "sender"), SENDERS)
def test_router_only(hf: Any, model_of: Any, variant: str, sender: str) -> None:
    """All receivers everywhere; one at some places; all, with the outputs of their layers held."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    after = routers_after(theirs, sender)
    clean, _ = clean_run(model, tokens, mask)
    for receivers, pos, places, hold in (
        (None, None, None, False),
        (after[-1:], MASK, PLACES, False),
        (None, MASK, PLACES, True),
    ):
        spec = RouterOnly(sender, receivers, pos=pos, hold_outputs=hold, inactive="allow")
        actual = run(model, tokens, mask, spec)
        expected = router_only_run(theirs, tokens, mask, sender, receivers, places, hold)
        assert_like(actual, expected, mask)
        assert {layer for _, layer in actual[2].lines} == set(receivers or after)
        if hold:
            # Who listens to the pattern has attention computed step by step.
            same_bits = torch.equal(actual[0], clean)
            assert same_bits or "<-" in sender
    if sender in ("embed", "A0"):
        changes_something(run(model, tokens, mask, RouterOnly(sender)), model, tokens, mask)


def test_output_bias_and_named_receivers(hf: Any, model_of: Any) -> None:
    variant = "qwen3_moe_dense_bias"
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    for sender in ("A1bias", "A0bias", "M0N5"):
        receivers = routers_after(theirs, sender)
        named = tuple(f"M{layer}" for layer in receivers)
        _, cache, receipt = run(model, tokens, mask, RouterOnly(sender, named))
        at = f"blocks.{receivers[0]}."
        bias = theirs.model.layers[int(sender[1])].self_attn.o_proj.bias
        if sender.endswith("bias"):
            readout = (
                theirs.model.layers[receivers[0]].mlp.gate.weight
                * theirs.model.layers[receivers[0]].post_attention_layernorm.weight
            )
            clean = reference_cache(theirs, tokens, mask)
            lost = bias @ readout.T / clean[at + "ln2.hook_scale"]
            name = at + "mlp.hook_router_logits"
            assert_same(cache[name][mask.bool()], (clean[name] - lost)[mask.bool()].detach(), tolerance=1e-5)
        assert receipt.asked == len(receivers) * int(mask.sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_held_outputs_leave_the_stream_to_the_bit(model_of: Any, variant: str) -> None:
    """Every value outside the receivers' layers of experts is what it was, bit by bit; their choice is not."""
    model, (tokens, mask) = model_of(variant), prompts("left")
    _, clean = clean_run(model, tokens, mask)
    actual = run(model, tokens, mask, RouterOnly("embed", pos=-1, hold_outputs=True))
    assert torch.equal(actual[0], clean_run(model, tokens, mask)[0])
    changed = set()
    for name, value in clean.items():
        if ".mlp." not in name:
            assert torch.equal(actual[1][name], value), name
        elif actual[1][name].shape != value.shape or not torch.equal(actual[1][name], value):
            changed.add(name.split(".")[-1])
    assert {"hook_router_logits", "hook_expert_weights"} <= changed


def test_a_sender_that_is_ablated_has_no_score(model_of: Any) -> None:
    """What a router loses is what the sender wrote in this run."""
    model, (tokens, mask) = model_of("olmoe"), prompts("left")
    alone = run(model, tokens, mask, Ablate("M0E3"))
    both = run(model, tokens, mask, Ablate("M0E3"), RouterOnly("M0E3"))
    assert_same(both[0], alone[0])
    assert_same(both[1]["blocks.1.mlp.hook_router_logits"], alone[1]["blocks.1.mlp.hook_router_logits"])


# --- several at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_different_layers(hf: Any, model_of: Any, variant: str) -> None:
    """A wider choice at one layer, an ablation at the next, and the order in which they are given."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    first, second = facts_of(theirs).moe_layers[-2:]
    facts = facts_of(theirs)
    k = facts.top_k

    def wider(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        if not mask[row, column]:
            return None
        new = choose(probabilities, facts, k=k + 1)
        return new, applied(probabilities, new, facts)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[:1] if mask[row, column] else []

    expected = reference_run(
        theirs,
        tokens,
        mask,
        together(choice_edits(first, facts, wider), ablation_edits(second, removed, facts, "renormalize")),
    )
    specs = (TopK(k + 1, layers=first), Ablate(ranks=1, layers=second, how="renormalize"))
    forwards, backwards = run(model, tokens, mask, *specs), run(model, tokens, mask, *reversed(specs))
    assert_like(forwards, expected, mask)
    assert torch.equal(forwards[0], backwards[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_layer(hf: Any, model_of: Any, variant: str) -> None:
    """One expert forced, another forbidden; of the new choice one expert is silent at some places."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left")
    layer, facts = middle_layer(theirs), facts_of(theirs)

    def decide(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        if not mask[row, column]:
            return None
        new = choose(probabilities, facts, forced=[3], excluded=[5])
        return new, applied(probabilities, new, facts)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[1:2] if (row, column) in PLACES else []

    expected = reference_run(
        theirs,
        tokens,
        mask,
        together(
            choice_edits(layer, facts, decide),
            ablation_edits(layer, removed, facts, "zero"),
        ),
    )
    specs = (
        Ablate(ranks=2, layers=layer, pos=MASK),
        ForbidExperts(5, layers=layer, inactive="allow"),
        ForceExperts(3, layers=layer),
    )
    forwards, backwards = run(model, tokens, mask, *specs), run(model, tokens, mask, *reversed(specs))
    assert_like(forwards, expected, mask)
    assert torch.equal(forwards[0], backwards[0])


def test_two_rerouted_and_two_sizes(hf: Any, model_of: Any) -> None:
    """A TopK at one place, an expert forbidden, and two reroutes: one choice of the family's rule."""
    model, theirs, (tokens, mask) = model_of("qwen3_moe"), hf("qwen3_moe"), prompts("left")
    facts = facts_of(theirs)

    def decide(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        if not mask[row, column]:
            return None
        k = 2 if column == 4 else 4
        heaviest = choose(probabilities, facts, k=k)[0]
        # What is rerouted by name is kept out even where it was not chosen.
        new = choose(probabilities, facts, k=k, excluded={2, 6, heaviest})
        return new, applied(probabilities, new, facts)

    expected = reference_run(theirs, tokens, mask, choice_edits(1, facts, decide))
    specs = (
        TopK(2, layers=1, pos=4),
        ForbidExperts("M1E2", inactive="allow"),
        Ablate(ranks=1, layers=1, how="reroute"),
        Ablate("M1E6", how="reroute", inactive="allow"),
    )
    assert_like(run(model, tokens, mask, *specs), expected, mask)


def test_forced_into_another_size(hf: Any, model_of: Any) -> None:
    """At the places of a wider and of a narrower choice, and beside them."""
    model, theirs, (tokens, mask) = model_of("olmoe"), hf("olmoe"), prompts("left")
    facts = facts_of(theirs)

    def decide(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        if not mask[row, column]:
            return None
        k = size if (row, column) in PLACES else 4
        new = choose(probabilities, facts, k=k, forced=[3, 5])
        return new, applied(probabilities, new, facts)

    for size in (2, 6):
        expected = reference_run(theirs, tokens, mask, choice_edits(1, facts, decide))
        specs = ForceExperts((3, 5), layers=1), TopK(size, layers=1, pos=MASK)
        assert_like(run(model, tokens, mask, *specs), expected, mask)


def test_renormalize_of_two_specs_is_of_both(model_of: Any) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("left")
    how: Any = dict(layers=1, how="renormalize")
    two = run(model, tokens, mask, Ablate(ranks=1, **how), Ablate(ranks=2, **how))
    one = run(model, tokens, mask, Ablate(ranks=(1, 2), **how))
    assert torch.equal(two[0], one[0])
    with pytest.raises(ValueError, match="removes all"):
        run(model, tokens, mask, Ablate(ranks=(1, 2), **how), Ablate(ranks=(3, 4), **how))


# --- dtypes and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "renormalize", "reroute"])
def test_bfloat16(checkpoint: Any, how: str) -> None:
    """Against float32 on the same weights, at a prompt where no routing is nearly tied."""
    theirs = hf_model(checkpoint("olmoe_bf16"), torch.float32)
    model = HookedMoE.from_pretrained(
        checkpoint("olmoe_bf16"), dtype=torch.bfloat16, device="cpu", verbose=False
    )

    def gap(tokens: Tensor) -> float:
        cache = reference_cache(theirs, tokens)
        probabilities = torch.cat([cache[f"blocks.{i}.mlp.hook_expert_weights"] for i in range(3)])
        ranked = probabilities.sort(-1, descending=True).values
        return float((ranked[..., :5] - ranked[..., 1:6])[..., [0, 3, 4]].log().min())

    tokens = max((prompts(seed=seed, batch=1, length=3)[0] for seed in range(40)), key=gap)

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[:1]

    actual = run(model, tokens, None, Ablate(ranks=1, layers=2, how=how))
    expected = ablated_run(theirs, tokens, None, 2, removed, how)
    assert actual[0].dtype == torch.bfloat16
    weights = actual[1]["blocks.2.mlp.hook_routing_weights"]
    assert weights.dtype == clean_run(model, tokens, None)[1]["blocks.2.mlp.hook_routing_weights"].dtype
    assert_same(
        by_expert({n: v.float() if v.is_floating_point() else v for n, v in actual[1].items()}, 2),
        by_expert(expected[1], 2),
        tolerance=2e-2,
    )
    assert_same(actual[0].float(), expected[0], tolerance=5e-2)


SPECS = [
    Ablate(ranks=1, layers=1),
    Ablate(ranks=(1, 2), layers=1, how="renormalize"),
    Ablate(ranks=1, layers=1, how="reroute", pos=4),
    ForceExperts("M1E3"),
    ForbidExperts("M1E6"),
    SwapRanks(1, -1, layers=1),
    SwapRanks(1, -1, layers=1, weights="slot"),
    TopK(6, layers=1),
    TopK(2, layers=1, pos=4),
    RouterOnly("M0E3"),
    RouterOnly("A0H2<-4", hold_outputs=True, inactive="allow"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_pass(model_of: Any, spec: Any) -> None:
    """Finite, of every parameter that the loss depends on, and none lost on the way to the embedding."""
    model, (tokens, mask) = model_of("qwen3_moe"), prompts("left")
    with intervene(model, spec):
        loss = model(tokens, attention_mask=mask, return_type="loss")
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0 or "blocks.2.mlp.router" in name, name


@pytest.mark.parametrize("how", ["zero", "reroute"])
def test_gradients_are_the_references(hf: Any, model_of: Any, how: str) -> None:
    model, theirs, (tokens, mask) = model_of("olmoe"), hf("olmoe"), prompts("left")

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[:1] if (row, column) in PLACES else []

    edits = ablation_edits(1, removed, facts_of(theirs), how)
    expected_logits, _ = reference_run(theirs, tokens, mask, edits)
    with intervene(model, Ablate(ranks=1, layers=1, pos=MASK, how=how)):
        logits = model(tokens, attention_mask=mask)
    weights = torch.randn_like(logits) * mask[..., None]
    mine = [model.embed.weight, model.blocks[1].mlp.router.weight]
    others = [theirs.model.embed_tokens.weight, theirs.model.layers[1].mlp.gate.weight]
    ours = torch.autograd.grad((weights * logits).sum(), mine)
    known = torch.autograd.grad((weights * expected_logits).sum(), others)
    for actual, expected in zip(ours, known, strict=True):
        assert_same(actual, expected, tolerance=2e-5)

"""What was asked for, what fired, and what is left behind: contexts, hooks, generation, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.interventions import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    RouterOnly,
    SwapRanks,
    TopK,
    UnfiredIntervention,
    as_hooks,
    intervene,
    run_with_interventions,
)
from tests.conftest import leftover_hooks
from tests.families import prompts
from tests.intervention_cases import MASK, assert_like, by_expert, clean_run, reference_of, run
from tests.reference import assert_same, reference_cache, reference_run
from tests.reference_choice import facts_of
from tests.reference_interventions import ablated_run, ablation_edits

LAYER = 1


@pytest.fixture
def model(model_of: Any) -> Any:
    """OLMoE: three layers of experts, four of eight active. Afterwards nobody watches it."""
    model = model_of("olmoe")
    yield model
    assert model.run_observers == []
    assert model.current_run is None


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return prompts("left")


def active(hf: Any, batch: Any, layer: int, expert: int) -> Tensor:
    """`[b, p]`: where an expert is active in a clean run, by the reference, at real tokens."""
    tokens, mask = batch
    indices = reference_cache(hf("olmoe"), tokens, mask)[f"blocks.{layer}.mlp.hook_expert_indices"]
    return (indices == expert).any(-1) & mask.bool()


# --- counts -------------------------------------------------------------------------------------------------


def test_counts(hf: Any, model: Any, batch: Any) -> None:
    """Of every kind of spec, counted from a clean run at the layer."""
    n_real, at_six = int(batch[1].sum()), int(active(hf, batch, LAYER, 6).sum())
    sender = int(active(hf, batch, 0, 3).sum())
    cases: list[tuple[Any, dict[int, int]]] = [
        (Ablate("M1E6"), {1: at_six}),
        (Ablate("M1E6", how="reroute"), {1: at_six}),
        (Ablate("M1E6", how="renormalize"), {1: at_six}),
        (Ablate(ranks=(1, 3)), {0: 2 * n_real, 1: 2 * n_real, 2: 2 * n_real}),
        (Ablate("M1E6", all_but=True), {1: 4 * n_real - at_six}),
        (ForbidExperts("M1E6"), {1: at_six}),
        (ForceExperts(("M1E6", "M1E2"), pos=-1), {1: 4}),
        (SwapRanks(1, 8, layers=(1, 2), pos=MASK), {1: 3, 2: 3}),
        (TopK(5, layers=2), {2: n_real}),
        (RouterOnly("M0E3"), {1: sender, 2: sender}),
        (RouterOnly("embed", receivers=2, pos=4), {2: 2}),
    ]
    for spec, expected in cases:
        receipt = run(model, *batch, spec)[2]
        assert {layer: line.asked for (_, layer), line in receipt.lines.items()} == expected, spec
        assert {layer: line.fired for (_, layer), line in receipt.lines.items()} == expected, spec
        assert receipt.n_runs == 1


def test_shared_experts_are_counted(model_of: Any, batch: Any) -> None:
    receipt = run(model_of("qwen2_moe"), *batch, Ablate(("M1S", "M2S")))[2]
    assert [line.fired for line in receipt.lines.values()] == [int(batch[1].sum())] * 2


def test_several_runs_add_up(hf: Any, model: Any, batch: Any) -> None:
    other = prompts("right", seed=3, batch=3)
    with intervene(model, Ablate("M1E6"), TopK(5, layers=2)) as receipt, torch.no_grad():
        first = model(batch[0], attention_mask=batch[1])
        model(other[0], attention_mask=other[1])
        again = model(batch[0], attention_mask=batch[1])
    assert torch.equal(first, again)
    expected = [2 * int(active(hf, b, 1, 6).sum()) for b in (batch,)]
    expected = expected[0] + int(active(hf, other, 1, 6).sum())
    assert receipt.lines[0, 1].asked == receipt.lines[0, 1].fired == expected
    assert receipt.lines[1, 2].fired == 2 * int(batch[1].sum()) + int(other[1].sum())
    assert receipt.n_runs == 3
    assert receipt.asked == receipt.fired == sum(line.fired for line in receipt.lines.values())


def test_receipts_can_be_read(model: Any, batch: Any) -> None:
    specs = Ablate("M1E6", pos=MASK, inactive="allow"), TopK(5, layers=(0, 2))
    receipt = run(model, *batch, *specs)[2]
    frame = receipt.to_frame()
    assert frame.columns.tolist() == ["intervention", "layer", "asked", "fired"]
    assert frame.layer.tolist() == [1, 0, 2]
    assert frame.intervention.tolist()[1:] == ["TopK(5, layers=(0, 2))"] * 2
    assert frame.intervention[0] == "Ablate('M1E6', inactive='allow', pos=<mask of 3 places>)"
    assert (
        str(receipt).splitlines()[0] == f"{receipt.fired} of {receipt.asked} changes fired in 1 forward pass"
    )
    assert len(str(receipt).splitlines()) == 4
    assert repr(receipt) == str(receipt)


def test_what_did_not_fire_raises(model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an edit is lost on the way, asked and fired part."""
    from moe_lens.interventions.layer_hooks import LayerHooks

    monkeypatch.setattr(LayerHooks, "edits", lambda self: [])
    with pytest.raises(UnfiredIntervention, match=r"Ablate\('M1E6'\) at layer 1: \d+ changes .* and 0 fired"):
        run(model, *batch, Ablate("M1E6"))
    with pytest.raises(UnfiredIntervention, match="another hook changed the choice of layer 1 after"):
        run(model, *batch, TopK(5, layers=1))


def test_without_a_run(model: Any, batch: Any) -> None:
    with pytest.raises(UnfiredIntervention, match=r"no forward pass was run with TopK\(5\)"):  # noqa: SIM117
        with intervene(model, TopK(5)):
            pass
    with pytest.raises(UnfiredIntervention, match="no forward pass"):
        as_hooks(model, TopK(5)).receipt.check()


def test_run_with_interventions(model: Any, batch: Any) -> None:
    tokens, mask = batch
    spec = Ablate("M1E6")
    expected = run(model, tokens, mask, spec)
    logits, receipt = run_with_interventions(model, tokens, spec, attention_mask=mask)
    assert torch.equal(logits, expected[0])
    assert receipt.to_frame().equals(expected[2].to_frame())
    loss, _ = run_with_interventions(model, tokens, [spec], attention_mask=mask, return_type="loss")
    assert loss.shape == ()


# --- nothing is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Ablate("M1E6"), TopK(5), RouterOnly("M0", hold_outputs=True)], ids=str)
def test_nothing_is_left(model: Any, batch: Any, spec: Any) -> None:
    """Bit by bit the same before and after; between runs no hook is on the model."""
    before, cache = clean_run(model, *batch)
    with intervene(model, spec), torch.no_grad():
        model(batch[0], attention_mask=batch[1])
        assert leftover_hooks(model) == []
        model.reset_hooks(including_permanent=True)
        changed = model(batch[0], attention_mask=batch[1])
    assert leftover_hooks(model) == []
    after, cache_after = clean_run(model, *batch)
    assert torch.equal(before, after)
    assert all(torch.equal(cache[name], cache_after[name]) for name in cache)
    if not isinstance(spec, RouterOnly):
        assert not torch.equal(before, changed)


def test_after_an_exception(model: Any, batch: Any) -> None:
    before, _ = clean_run(model, *batch)
    with pytest.raises(ZeroDivisionError), intervene(model, Ablate("M1E6")):  # noqa: PT012
        model(batch[0], attention_mask=batch[1])
        raise ZeroDivisionError
    assert model.run_observers == []

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), intervene(model, Ablate("M1E6")):
        model.run_with_hooks(batch[0], attention_mask=batch[1], fwd_hooks=[("blocks.2.hook_resid_pre", fail)])
    assert leftover_hooks(model) == []
    assert torch.equal(clean_run(model, *batch)[0], before)


def test_a_run_that_raised_is_not_counted(model: Any, batch: Any) -> None:
    """It may be caught, and another one made; and the layers hold on to no value of it."""

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    tokens, mask = batch
    with intervene(model, Ablate("M1E6"), TopK(5, layers=2)) as receipt, torch.no_grad():
        model(tokens, attention_mask=mask)
        expected = receipt.to_frame()
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[("blocks.2.hook_resid_pre", fail)])
        assert receipt.to_frame().equals(expected)
        assert receipt.n_runs == 1
        model(tokens, attention_mask=mask)
        assert receipt.fired == 2 * expected.fired.sum()
        interventions = model.run_observers[0].__self__
        assert interventions.layers[1].probabilities is None
        assert interventions.layers[1].removed == {}


def test_copies_of_the_model_are_plain(model: Any, batch: Any) -> None:
    before, _ = clean_run(model, *batch)
    with intervene(model, Ablate("M1E6")) as receipt, torch.no_grad():
        twin = copy.deepcopy(model)
        stored = pickle.loads(pickle.dumps(model.run_observers))
        assert torch.equal(twin(batch[0], attention_mask=batch[1]), before)
        assert receipt.n_runs == 0
        assert not torch.equal(model(batch[0], attention_mask=batch[1]), before)
    assert receipt.n_runs == 1
    assert twin.run_observers == stored == []
    assert leftover_hooks(twin) == []
    changed = run(twin, *batch, Ablate("M1E6"))[0]
    assert torch.equal(changed, run(model, *batch, Ablate("M1E6"))[0])


# --- beside other hooks and interventions -------------------------------------------------------------------


def test_nested(hf: Any, model: Any, batch: Any) -> None:
    """Other layers go together, the same one is refused, and the outer one goes on."""
    together = run(model, *batch, Ablate("M1E6"), TopK(5, layers=2))[0]
    with intervene(model, Ablate("M1E6")) as outer, torch.no_grad():
        with intervene(model, TopK(5, layers=2)) as inner:
            both = model(batch[0], attention_mask=batch[1])
        with pytest.raises(ValueError, match="layer 1 is changed by an open intervene"):  # noqa: SIM117
            with intervene(model, ForceExperts("M1E2")):
                pass
        with pytest.raises(ValueError, match="layer 1 is changed by an open intervene"):
            model.run_with_hooks(
                batch[0], attention_mask=batch[1], fwd_hooks=as_hooks(model, TopK(5, layers=1))
            )
        alone = model(batch[0], attention_mask=batch[1])
    assert torch.equal(both, together)
    assert torch.equal(alone, run(model, *batch, Ablate("M1E6"))[0])
    assert (outer.n_runs, inner.n_runs) == (2, 1)


def test_an_inner_one_that_raises_undoes_the_outer_count(model: Any, batch: Any) -> None:
    with intervene(model, Ablate("M1E6")) as outer, torch.no_grad():
        with pytest.raises(ValueError, match="no position 20"), intervene(model, TopK(5, layers=2, pos=20)):
            model(batch[0], attention_mask=batch[1])
        assert (outer.n_runs, outer.asked) == (0, 0)
        model(batch[0], attention_mask=batch[1])


def test_a_model_run_inside_a_run(model: Any, batch: Any) -> None:
    def again(value: Tensor, hook: Any) -> None:
        model(batch[0][:1])

    with pytest.raises(RuntimeError, match="inside a run under the same"), intervene(model, Ablate("M1E6")):
        model.run_with_hooks(
            batch[0], attention_mask=batch[1], fwd_hooks=[("blocks.0.hook_resid_pre", again)]
        )


def test_caches_hold_what_was_done(hf: Any, model: Any, batch: Any) -> None:
    """Whichever came first, the hook that caches or the intervention."""
    tokens, mask = batch
    name = "blocks.1.mlp.hook_expert_contrib"
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value.clone()

    with torch.no_grad(), model.hooks([(name, keep)]), intervene(model, Ablate(ranks=2, layers=1)):
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=[name])
    assert torch.equal(kept[name], cache[name])
    assert (kept[name][mask.bool()][:, 1] == 0).all()
    assert (kept[name][mask.bool()][:, 0] != 0).any()


def test_own_hooks_beside_it(hf: Any, model: Any, batch: Any) -> None:
    """An edit of the stream before, and of the choice: what is removed is what is active then."""
    tokens, mask = batch

    def add(value: Tensor, hook: Any) -> Tensor:
        return value + 0.5

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return [6] if mask[row, column] else []

    def own_choice(value: Tensor, hook: Any) -> Tensor:
        return torch.tensor([7, 6, 5, 4]).expand_as(value)

    theirs, facts = hf("olmoe"), facts_of(hf("olmoe"))
    edits = dict(ablation_edits(1, removed, facts, "zero"))
    expected = reference_run(theirs, tokens, mask, {**edits, "blocks.0.hook_resid_post": lambda v: v + 0.5})
    with intervene(model, Ablate("M1E6")), torch.no_grad():
        actual = model.hooks([("blocks.0.hook_resid_post", add)])
        with actual:
            actual = model.run_with_cache(tokens, attention_mask=mask)
    assert_like(actual, (expected[0].detach(), {n: v.detach() for n, v in expected[1].items()}), mask)

    at = "blocks.1.mlp.hook_expert_indices"
    see_choice = edits[at]
    edits[at] = lambda value: see_choice(torch.tensor([7, 6, 5, 4]).expand_as(value).clone())
    expected = reference_run(theirs, tokens, mask, edits)
    with intervene(model, Ablate("M1E6")) as receipt, torch.no_grad():
        logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(at, own_choice)])
    assert_same(logits[mask.bool()], expected[0][mask.bool()].detach())
    assert receipt.fired == int(mask.sum())

    with pytest.raises(UnfiredIntervention, match="another hook changed the choice"):  # noqa: SIM117
        with intervene(model, ForceExperts("M1E2")), torch.no_grad():
            model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(at, own_choice)])


def test_own_probabilities_are_seen(model: Any, batch: Any) -> None:
    """A choice is made of the probabilities that other hooks leave."""

    def favour(value: Tensor, hook: Any) -> Tensor:
        return (value + 2.0 * (torch.arange(8) == 2)).softmax(-1)

    name = "blocks.1.mlp.hook_expert_weights"
    with intervene(model, TopK(1, layers=1)), torch.no_grad(), model.hooks([(name, favour)]):
        _, cache = model.run_with_cache(batch[0], attention_mask=batch[1])
    assert (cache["blocks.1.mlp.hook_expert_indices"] == 2).all()


# --- as hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        Ablate("M1E6"),
        Ablate(ranks=1, layers=1, how="renormalize", pos=-1),
        Ablate(ranks=1, layers=1, how="reroute"),
        TopK(6, layers=1, pos=4),
        SwapRanks(1, -1),
        RouterOnly("M0E3"),
        RouterOnly("A0H1", hold_outputs=True),
    ],
    ids=str,
)
def test_as_hooks(model: Any, batch: Any, spec: Any) -> None:
    tokens, mask = batch
    expected = run(model, tokens, mask, spec)
    hooks = as_hooks(model, spec)
    for number in (1, 2):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
        hooks.receipt.check()
        assert torch.equal(logits, expected[0])
        assert hooks.receipt.n_runs == number
        assert hooks.receipt.fired == number * expected[2].fired
    assert leftover_hooks(model) == []


def test_as_hooks_reads_tokens(model: Any, batch: Any) -> None:
    spec = Ablate(ranks=1, layers=1, how="resample", reference=reference_of(model))
    expected = run(model, *batch, spec)[0]
    with torch.no_grad():
        logits = model.run_with_hooks(batch[0], attention_mask=batch[1], fwd_hooks=as_hooks(model, spec))
    assert torch.equal(logits, expected)


def test_as_hooks_where_they_do_not_go(model: Any, batch: Any, model_of: Any) -> None:
    tokens, mask = batch
    hooks = as_hooks(model, Ablate("M1E6"))
    with torch.no_grad():
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
        residual = model(tokens, attention_mask=mask, stop_at_layer=1)
    with pytest.raises(RuntimeError, match="was not told of this run"):
        model.run_with_hooks(residual, attention_mask=mask, fwd_hooks=hooks, start_at_layer=1)
    with pytest.raises(RuntimeError, match="made for another model"):
        model_of("qwen3_moe").run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    with pytest.raises(ValueError, match="goes through layers 0 to 0"):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks, stop_at_layer=1)
    with pytest.raises(ValueError, match="no position 9 among 9"):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=as_hooks(model, TopK(5, pos=9)))
    with pytest.raises(ValueError, match="names a position"), model.hooks(as_hooks(model, TopK(5, pos=0))):
        model.generate(tokens[:1], 2)


# --- parts of the model -------------------------------------------------------------------------------------


def test_parts_of_the_model(model: Any, batch: Any) -> None:
    """The layers that run are enough; one that does not run raises before."""
    tokens, mask = batch
    spec = Ablate("M1E6")
    expected = run(model, tokens, mask, spec)
    with intervene(model, spec) as receipt, torch.no_grad():
        stream = model(tokens, attention_mask=mask, stop_at_layer=2)
        assert_same(stream, expected[1]["blocks.1.hook_resid_post"])
        before = model(tokens, attention_mask=mask, stop_at_layer=-1)
        assert torch.equal(before, stream)
        middle = expected[1]["blocks.1.hook_resid_pre"]
        logits = model(middle, attention_mask=mask, start_at_layer=1)
        assert torch.equal(logits, expected[0])
        with pytest.raises(ValueError, match=r"acts at layer 1, and this run goes through layers 0 to 0"):
            model(tokens, attention_mask=mask, stop_at_layer=1)
        with pytest.raises(ValueError, match=r"acts at layer 1, and this run goes through layers 2 to 2"):
            model(stream, attention_mask=mask, start_at_layer=2)
        with pytest.raises(ValueError, match=r"goes through none"):
            model(stream, attention_mask=mask, start_at_layer=1, stop_at_layer=1)
    assert receipt.n_runs == 3
    assert receipt.fired == 3 * expected[2].fired


def test_senders_and_parts(model: Any, batch: Any) -> None:
    tokens, mask = batch
    with torch.no_grad():
        start = model(tokens, attention_mask=mask, stop_at_layer=0)
        middle = model(tokens, attention_mask=mask, stop_at_layer=1)
        expected = run(model, tokens, mask, RouterOnly("A1"))[0]
        with intervene(model, RouterOnly("A1")):
            assert torch.equal(model(middle, attention_mask=mask, start_at_layer=1), expected)
        for sender, stream, layer in (("embed", start, 0), ("M0", middle, 1), ("embed", middle, 1)):
            with pytest.raises(ValueError, match=f"starts at layer {layer}, after {sender}"):  # noqa: SIM117
                with intervene(model, RouterOnly(sender, 2)):
                    model(stream, attention_mask=mask, start_at_layer=layer)


@pytest.mark.parametrize(
    "spec",
    [
        Ablate("M1E6", inactive="allow"),
        Ablate("M1E6"),
        Ablate(ranks=2, how="renormalize"),
        TopK(6, layers=1),
        SwapRanks(1, -1),
        ForbidExperts("M1E6", inactive="allow"),
        RouterOnly("M0E3", inactive="allow"),
    ],
    ids=str,
)
def test_generate(model: Any, batch: Any, spec: Any) -> None:
    """The same tokens as by full forward passes, step by step, under the same intervention."""
    tokens, mask = batch
    with intervene(model, spec) as receipt:
        made = model.generate(tokens, 4, attention_mask=mask, stop_at_eos=False)
    assert receipt.n_runs == 4
    for _ in range(4):
        with intervene(model, spec) as last, torch.no_grad():
            logits = model(tokens, attention_mask=mask)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    assert torch.equal(made, tokens)
    # Each token once, but the last one, which no step was given.
    assert receipt.fired == last.fired


def test_generate_refuses_positions(model: Any, batch: Any) -> None:
    """At the first step, even where it is the only one."""
    for spec in (Ablate(ranks=1, pos=-1), TopK(5, pos=4), RouterOnly("A0H1<-4")):
        with pytest.raises(ValueError, match="a generation runs each new token"), intervene(model, spec):
            model.generate(batch[0], 1, attention_mask=batch[1])
    spec = Ablate(ranks=1, how="resample", reference=reference_of(model))
    with pytest.raises(ValueError, match="so it needs a run from tokens"), intervene(model, spec):
        model.generate(batch[0], 1, attention_mask=batch[1])


def test_weights_sum(model: Any, batch: Any) -> None:
    """Weights by expert are those of the reference, as the other tests read them."""
    _, cache, _ = run(model, *batch, Ablate(ranks=1, layers=1, how="renormalize"))
    _, clean = clean_run(model, *batch)
    assert_same(by_expert(cache, 1).sum(-1), by_expert(clean, 1).sum(-1))


def test_one_document_without_mask(hf: Any, model: Any) -> None:
    tokens = prompts(batch=1)[0]

    def removed(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[:1] if column == 8 else []

    actual = run(model, tokens, None, Ablate(ranks=1, layers=1, pos=-1))
    assert_like(actual, ablated_run(hf("olmoe"), tokens, None, 1, removed, "zero"), None)

"""`routing_contributions` on a model whose layers stay on disk: the numbers of the one in memory, bit by bit."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.converters import NotEnoughMemory
from moe_lens.interventions import TopK
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE
from moe_lens.ranks import Ranks
from moe_lens.routing import parts
from moe_lens.routing.contributions import corpus_of, routing_contributions
from moe_lens.routing.held import Held
from moe_lens.routing.listener import NEURON_CHECKS, Listener
from moe_lens.routing.provenance import weights_fingerprint
from moe_lens.routing.receivers import LookAhead
from moe_lens.routing.runs import Group
from moe_lens.routing.senders import GRANULARITIES
from moe_lens.routing.shards import Shards
from moe_lens.routing.streamed_runs import StreamedPlan
from moe_lens.routing.streaming import ContributionAccumulator
from tests.checkpoints import load
from tests.families import FAMILIES
from tests.fault_cases import OF_A_GPU
from tests.routing_cases import Batch, assert_close_results, assert_same_results, corpus
from tests.test_contribution_runs import Killed, dies_in_forward, five_batches

AMPLE = 2**30


def held_of(model: Any, by: Sequence[str], **settings: Any) -> Held:
    given = {"selected": False, "rank_shift": False, "n_experts": model.cfg.n_experts, **settings}
    return Held(model.cfg, tuple(by), model.cfg.moe_layers, n_checked=NEURON_CHECKS, **given)


def groups_under(
    model: Any, batches: Sequence[Batch], budget: int, by: Sequence[str], **settings: Any
) -> list[list[tuple[int, int]]]:
    """For each pass the batches of every group, and how often layers are read for it."""
    held = held_of(model, by, **settings)
    plan = StreamedPlan.of(model, corpus_of(model, batches, None, 8), held, budget, 11)
    return [plan.group_sizes(n, [tuple(t.shape) for t, _ in batches]) for n in range(len(plan.chunks))]  # type: ignore[misc]


def assert_same(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for by in ours:
        assert_same_results(ours[by], theirs[by])
        assert ours[by].provenance == theirs[by].provenance
        assert ours[by].model_logit_difference == theirs[by].model_logit_difference


@pytest.fixture
def groups_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Filled with every group that is run: its batches, and how often layers are read for it."""
    run, seen = StreamedPlan.run, []

    def counted(self: Any, accumulator: Any, group: Group, *args: Any) -> None:
        before = self.model.read_counts.layers_read
        run(self, accumulator, group, *args)
        assert (
            self.model.read_counts.layers_read - before == (accumulator.receivers[-1] + 1) * group.n_readings
        )
        seen.append((len(group.batches), group.n_readings))

    monkeypatch.setattr(StreamedPlan, "run", counted)
    return seen


# --- the same numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [*FAMILIES, "deepseek_v2_bias", "qwen3_moe_dense_bias", "olmoe_bias_odd_width"]
)
def test_every_granularity(streamed: Any, hooked: Any, variant: str, groups_run: Any) -> None:
    """All batches go through each layer together, and it is read once."""
    model, how = streamed(variant), dict[str, Any](by=GRANULARITIES, max_positions=11)
    batches = corpus(("left", "right")[len(variant) % 2])
    ours = routing_contributions(model, batches, **how)
    assert groups_run == [(2, 1)]
    assert model.read_counts.layers_read == model.cfg.n_layers
    assert_same(ours, routing_contributions(hooked(variant), batches, **how))


@pytest.mark.parametrize(
    ("variant", "dtype"), [("qwen2_moe", torch.bfloat16), ("deepseek_v2", torch.float16)], ids=str
)
def test_half_precision(streamed: Any, checkpoint: Any, variant: str, dtype: Any, groups_run: Any) -> None:
    """In one reading, and in two; the rounding of the stream is a sender."""
    model, theirs = streamed(variant, dtype=dtype), load(checkpoint(variant), dtype=dtype)
    how: dict[str, Any] = dict(by=GRANULARITIES, max_positions=11)
    expected = routing_contributions(theirs, corpus(), **how)
    assert_same(routing_contributions(model, corpus(), **how), expected)
    assert_same(routing_contributions(model, corpus(), experts="selected", **how),
                routing_contributions(theirs, corpus(), experts="selected", **how))  # fmt: skip
    assert groups_run == [(2, 1), (2, 2)]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": dict(by=("layer", "head", "source", "expert")),
    "selected": dict(by=("layer", "head", "source", "expert"), experts="selected"),
    "rank shift": dict(by=("expert", "source"), rank_shift=True),
    "neurons of the selected": dict(by=("neuron", "layer"), experts="selected"),
    "some": dict(by="expert", experts=[3, 0], receivers=[1]),
    "offsets": dict(by="source", source_axis="offset", receivers=[2]),
    "no BOS": dict(by=("layer", "expert"), bos_is_lead=False),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_in_one_reading_and_in_two(
    streamed: Any, hooked: Any, settings: dict[str, Any], groups_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = streamed("deepseek_v2"), corpus(bos_in_first=True)
    settings = {"max_positions": 11, **settings}
    expected = routing_contributions(hooked("deepseek_v2"), batches, **settings)
    expected = expected if isinstance(expected, dict) else {"": expected}
    for n_readings in (1, 2):
        if n_readings == 2:
            monkeypatch.setattr(Held, "needs_two_readings", True)
        ours = routing_contributions(model, batches, **settings)
        assert_same(ours if isinstance(ours, dict) else {"": ours}, expected)
    first = 2 if settings["by"] == ("neuron", "layer") else 1
    assert groups_run == [(2, first), (2, 2)]


def test_plan_divides_passes_and_groups(streamed: Any, hooked: Any, groups_run: Any) -> None:
    """The less memory, the more often layers are read; the numbers stay, and so does what was foretold."""
    model, batches, by = streamed("olmoe"), five_batches(), ("layer", "head", "expert")
    expected = routing_contributions(hooked("olmoe"), batches, by=by)
    seen, times = [], []
    for budget in (AMPLE, 120_000, 40_000, 24_000):
        foretold = groups_under(model, batches, budget, by)
        groups_run.clear()
        ours = routing_contributions(model, batches, by=by, memory_budget=budget)
        if len(foretold) == 1:
            assert_same(ours, expected)
        for name in by:
            # Fewer receivers at a time are other matrix products.
            assert_close_results(ours[name], expected[name], rtol=1e-5, atol=1e-6)
        assert groups_run == [group for of_pass in foretold for group in of_pass]
        seen.append(foretold)
        times.append(sum(n for of_pass in foretold for _, n in of_pass))
    assert times == sorted(times)
    assert seen[0] == [[(5, 1)]]
    # Some once and some twice, several groups, and several passes.
    assert any({n for _, n in of_pass} == {1, 2} for plan in seen for of_pass in plan)
    assert any(len(plan) == 1 and len(plan[0]) > 1 for plan in seen)
    assert any(len(plan) > 1 for plan in seen)


def test_a_corpus_that_comes_once(streamed: Any, hooked: Any, groups_run: Any, capsys: Any) -> None:
    model, by = streamed("olmoe"), ("layer", "expert")
    ours = routing_contributions(model, iter(five_batches()), by=by, memory_budget=60_000, verbose=True)
    assert sum(n for n, _ in groups_run) == 5
    assert len(groups_run) > 1
    assert "shows as they come" in capsys.readouterr().out
    assert_same(ours, routing_contributions(hooked("olmoe"), iter(five_batches()), by=by))
    with pytest.raises(ValueError, match="must be passed 2 times"):
        routing_contributions(model, iter(five_batches()), by="source", max_positions=8, memory_budget=70_000)


def test_interventions(streamed: Any, hooked: Any) -> None:
    results = []
    for model in (streamed("olmoe"), hooked("olmoe")):
        with model.intervene(TopK(2, layers=1)):
            results.append(routing_contributions(model, corpus(), by=("layer", "expert")))
    assert_same(*results)
    assert results[0]["layer"].provenance["edited"] != []


# --- killed, and gone on with --------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "budget"), [(("layer",), 30_000), (("expert", "head"), 45_000)])
def test_killed_in_any_group(
    streamed: Any, hooked: Any, tmp_path: Path, groups_run: Any, by: tuple[str, ...], budget: int
) -> None:
    """Groups that have gone through are kept; the run goes on, in the same groups, in others, or in memory."""
    model, batches = streamed("olmoe"), [*five_batches(), *five_batches()]
    how: dict[str, Any] = dict(by=by)
    expected = routing_contributions(hooked("olmoe"), batches, **how)
    (sizes,) = groups_under(model, batches, budget, by)
    assert len(sizes) > 2
    ends = [sum(n_batches * n for n_batches, n in sizes[:done]) for done in range(len(sizes))]
    # At once, in the middle of the second group, and at the end of the third.
    for number, (n_killed, done) in enumerate(
        [(0, 0), (ends[1] + 1, 1), (ends[2] + sizes[2][0] * sizes[2][1] - 1, 2)]
    ):
        state = tmp_path / f"state{number}"
        with dies_in_forward(model, n_killed, "blocks.1.hook_attn_out"), pytest.raises(Killed):
            routing_contributions(model, batches, state=state, save_every=0, memory_budget=budget, **how)
        assert groups_run == sizes[:done]
        assert state.exists() == (done > 0)
        copies = [shutil.copy(state, tmp_path / name) for name in ("a", "b")] if done else []
        groups_run.clear()
        assert_same(
            routing_contributions(model, batches, state=state, save_every=0, memory_budget=budget, **how),
            expected,
        )
        assert groups_run == sizes[done:]
        if done == 1:
            assert_same(routing_contributions(model, batches, state=copies[0], **how), expected)
            assert_same(routing_contributions(hooked("olmoe"), batches, state=copies[1], **how), expected)
        groups_run.clear()
    assert_same(routing_contributions(model, batches, state=state, **how), expected)
    assert groups_run == []


def test_killed_in_the_second_of_several_passes(streamed: Any, hooked: Any, tmp_path: Path) -> None:
    model, batches, state = streamed("olmoe"), five_batches(), tmp_path / "state"
    how: dict[str, Any] = dict(by=("expert", "head"), memory_budget=40_000)
    passes = groups_under(model, batches, 40_000, how["by"])
    assert len(passes) > 1
    expected = routing_contributions(model, batches, **how)
    n_before = sum(n_batches * n_readings for n_batches, n_readings in passes[0])
    with dies_in_forward(model, n_before), pytest.raises(Killed):
        routing_contributions(model, batches, state=state, **how)
    assert [path.name for path in tmp_path.iterdir()] == [f"state.1-of-{len(passes)}"]
    assert_same(routing_contributions(model, batches, state=state, **how), expected)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_readings", [1, 2])
def test_senders_that_do_not_close_are_refused_at_once(
    streamed: Any, n_readings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layer where it shows, and not when the corpus is through."""
    monkeypatch.setattr(Held, "needs_two_readings", n_readings == 2)
    model = streamed("olmoe")
    with (
        model.hooks([("blocks.0.hook_resid_mid", lambda value, hook: value + 1)]),
        pytest.raises(ValueError, match="the senders by layer are not what the routers read"),
    ):
        routing_contributions(model, corpus())
    # The next layer may be on its way.
    assert model.read_counts.layers_read - model.cfg.n_layers * (n_readings - 1) <= 2
    with model.hooks([("blocks.0.hook_resid_mid", lambda value, hook: value + 1)]):
        result = routing_contributions(model, corpus(), allow_incomplete=True)
    assert result.completeness_error > 0.01


def test_values_that_are_others_the_second_time_are_refused(
    streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "needs_two_readings", True)
    generator = torch.Generator().manual_seed(0)

    def noise(value: Tensor, hook: Any) -> Tensor:
        return value + torch.randn(value.shape, generator=generator)

    model = streamed("olmoe")
    with (
        model.hooks([("blocks.0.hook_attn_out", noise)]),
        pytest.raises(ValueError, match="the same tokens gave other values the second time"),
    ):
        routing_contributions(model, corpus())


def test_bad_input_is_refused_before_a_layer_is_read(streamed: Any) -> None:
    model = streamed("olmoe")
    tokens, mask = corpus()[0]
    empty = mask.clone()
    empty[1] = 0
    for given, how, message in (
        (corpus(), dict(memory_budget=1000), r"needs [\d,]+ bytes of .*three quarters of memory_budget=1,000"),
        ([corpus()[1], tokens + 1000], {}, r"batch 1: tokens \d+..\d+ go beyond the vocabulary"),
        ([(tokens, empty)], {}, "row 1 of .* has no real token"),
        ([corpus()[1], (tokens[0], mask[0])], {}, r"tokens must be \[batch, pos\]"),
        (corpus(), dict(by="source", max_positions=5), r"a document of \d tokens is longer than max_positions=5"),
        (corpus(), dict(receivers=[3]), "receiver 3 is no MoE layer"),
        ([], {}, "there were no batches"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            routing_contributions(model, given, **how)  # type: ignore[arg-type]
    assert model.read_counts.layers_read == 0


def test_the_plan_is_printed(streamed: Any, capsys: Any) -> None:
    """What it foretells is what is read."""
    model = streamed("olmoe")
    routing_contributions(
        model, five_batches(), by=("layer", "head", "expert"), memory_budget=60_000, verbose=True
    )
    first = capsys.readouterr().out
    bytes_read, layers_read = model.read_counts.bytes_read, model.read_counts.layers_read
    pattern = r"in (\d+) group\(s\) .* (\d+) time\(s\) in all: (\d+) layers are read, ([\d.]+) MiB"
    found = re.search(pattern, first)
    assert found is not None
    # One more was read to see how fast the disk is.
    of_one = bytes_read / layers_read
    assert int(found[3]) == layers_read - 1 == 3 * int(found[2])
    assert float(found[4]) == pytest.approx((bytes_read - of_one) / 2**20, abs=0.05)
    assert re.search(r"\(about [\d,]+ s at the [\d,]+ MiB/s of what was read so far", first)
    assert re.search(
        "memory: two layers .* MiB, other weights .*, accumulators .*, and what batches hold", first
    )
    routing_contributions(model, five_batches(), verbose=True)
    assert model.read_counts.layers_read == layers_read + 3


# --- what is in memory --------------------------------------------------------------------------------------


def test_no_weight_and_in_two_readings_no_part_outlives_its_layer(
    streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, and what is folded of them: those of the layer that runs, and of no other. Parts: the one that was just
    made."""
    model, init = streamed("qwen2_moe"), parts.TokenPart.__init__
    made: list[weakref.ref[Any]] = []
    most: list[int] = []

    def counted(self: Any, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(self))
        most.append(sum(reference() is not None for reference in made))

    monkeypatch.setattr(parts.TokenPart, "__init__", counted)
    reader_of, layers_folded = ContributionAccumulator.reader, []

    def looked_at(self: ContributionAccumulator, group: Any) -> Any:
        reader = reader_of(self, group)
        folded = {r.group.layer for r in self.readers.values() if r._folded_output is not None}
        assert folded <= {group.layer}
        layers_folded.extend(folded)
        return reader

    monkeypatch.setattr(ContributionAccumulator, "reader", looked_at)
    weights: list[tuple[str, weakref.ref[Tensor]]] = []

    def look(value: Tensor, hook: Any) -> None:
        layer = hook.name.split(".")[1]
        alive = {name.split(".")[1] for name, reference in weights if reference() is not None}
        assert alive <= {layer}
        for name, parameter in model.named_parameters():
            is_there = name.startswith(f"blocks.{layer}.") and not isinstance(parameter, OnDisk)
            if is_there and parameter.ndim > 1 and not name.endswith("router.weight"):
                weights.append((name, weakref.ref(parameter)))

    how: dict[str, Any] = dict(by=("layer", "head", "source", "neuron"), max_positions=8)
    n_components = 1 + 2 * model.cfg.n_layers - 1
    for n_readings in (1, 2):
        monkeypatch.setattr(Held, "needs_two_readings", n_readings == 2)
        with model.hooks([(lambda name: name.endswith("hook_resid_mid"), look)]):
            routing_contributions(model, five_batches(), **how)
        gc.collect(2)
        assert not any(reference() is not None for _, reference in weights)
        assert not any(reference() is not None for reference in made)
        # Whole components, heads, and MLPs in `sources`: all of all batches, or one in each granularity.
        assert (max(most) > 5 * n_components) if n_readings == 1 else (max(most) <= 2)
        for kept in (made, most, weights):
            kept.clear()
    assert set(layers_folded) == set(range(model.cfg.n_layers))
    store = model.store
    assert model.read_counts.peak_bytes <= store.bytes_needed
    assert sum(stretch.nbytes for stretch in store._stretches) == 2 * store.layer_bytes


def reachable_bytes(value: Any, seen: set[int], storages: dict[int, int]) -> None:
    """Of the memory of every tensor that a listener leads to, but not of what is the accumulator's."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            reachable_bytes(inner, seen, storages)
    elif type(value).__module__.startswith("moe_lens.routing"):
        reachable_bytes(dict(vars(value)), seen, storages)


@pytest.mark.parametrize("settings", [dict(), dict(experts="selected"), dict(rank_shift=True)], ids=str)
@pytest.mark.parametrize(
    ("variant", "dtype"), [("qwen2_moe", torch.float32), ("deepseek_v2", torch.bfloat16)], ids=str
)
def test_what_batches_hold_is_foretold(
    streamed: Any, variant: str, dtype: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a fifth, for every granularity by itself and for all together, in one reading and in two."""
    model, finish, found = streamed(variant, dtype=dtype), Listener.finish, []
    batch = corpus()[1]

    def measured(self: Listener) -> None:
        owners: set[int] = {id(self.owner), id(self.values.readouts), id(self.owner.measuring)}
        owners |= {id(reader) for reader in self.owner.readers.values()}
        owners |= {id(r._columns) for r in self.owner.readers.values() if hasattr(r, "_columns")}
        storages: dict[int, int] = {}
        reachable_bytes(self, owners, storages)
        found.append(sum(storages.values()))
        finish(self)

    monkeypatch.setattr(Listener, "finish", measured)
    finish_ahead, found_ahead = LookAhead.finish, []

    def measured_ahead(self: LookAhead) -> None:
        finish_ahead(self)
        storages: dict[int, int] = {}
        reachable_bytes(self, {id(self.values.readouts), id(self.values.measuring)}, storages)
        found_ahead.append(sum(storages.values()))

    monkeypatch.setattr(LookAhead, "finish", measured_ahead)
    waits = bool(settings)
    for by in (("layer",), ("head",), ("source",), ("expert",), ("neuron",), GRANULARITIES):
        for n_readings in (1, 2):
            if n_readings == 1 and waits and "neuron" in by:
                continue
            monkeypatch.setattr(Held, "needs_two_readings", n_readings == 2)
            found.clear()
            routing_contributions(model, [batch], by=by, max_positions=11, **settings)
            held = held_of(model, by, selected="experts" in settings, rank_shift="rank_shift" in settings)
            # The stream and the tokens are held elsewhere.
            elsewhere = batch[0].numel() * (model.cfg.d_model * dtype.itemsize + 16)
            n_batch, n_pos = batch[0].shape
            foretold = held.bytes(n_batch, n_pos, n_readings) - elsewhere
            assert 0.8 * foretold < found[0] < 1.2 * foretold, (by, n_readings, found[0], foretold)
            assert len(found_ahead) == n_readings - 1
            # Between the readings, without the sums of scores.
            assert all(0 < ahead <= foretold - held._sums(batch[0].numel()) for ahead in found_ahead)
            found_ahead.clear()


def test_in_shards(streamed: Any, hooked: Any, tmp_path: Path) -> None:
    """As many as are asked for; each is a corpus of its own, and their merged whole that of the model in memory."""
    results = [
        routing_contributions(
            model, five_batches(), by=("layer", "neuron"), shards=Shards(tmp_path / str(number), number=2)
        )
        for number, model in enumerate((streamed("olmoe"), hooked("olmoe")))
    ]
    assert_same(*results)


def test_progress_and_plan_of_shards_are_of_what_is_run(
    streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Batches times layers, counted as they go through them; and all that the shards read."""
    model, batches = streamed("olmoe"), five_batches()
    weights_fingerprint(model)
    counts, n_layers, steps = model.read_counts, max(model.cfg.moe_layers) + 1, []
    layers_before, bytes_before = counts.layers_read, counts.bytes_read
    counter = Ranks.counter

    def counted(self: Ranks) -> Any:
        add = counter(self)

        def noting(more: int) -> int:
            steps.extend([counts.layers_read - layers_before] * more)
            return add(more)

        return noting

    monkeypatch.setattr(Ranks, "counter", counted)
    routing_contributions(model, batches, shards=Shards(tmp_path / "shards", number=2), verbose=True)
    assert len(steps) == len(batches) * n_layers
    # Two of the batches are in the first shard. While they are in a layer, the next is read.
    assert all(n_read <= min(step // 2 + 2, n_layers) for step, n_read in enumerate(steps[: 2 * n_layers]))
    printed = capsys.readouterr()
    said = re.search(r"for itself: ([\d.]+) MiB from disk", printed.out)
    assert said is not None
    assert float(said[1]) == pytest.approx((counts.bytes_read - bytes_before) / 2**20, abs=0.05)
    assert f"{len(steps)}/{len(steps)}" in printed.err


@pytest.mark.parametrize("n_readings", [1, 2])
def test_memory_that_runs_out_in_a_group(
    streamed: Any,
    hooked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    n_readings: int,
) -> None:
    """Fewer batches go through the layers together, with the same numbers; where some were added, the run ends, and
    goes on from the groups before."""
    model, batches = streamed("olmoe"), five_batches()
    how: dict[str, Any] = dict(by="neuron", rank_shift=n_readings == 2)
    expected = routing_contributions(hooked("olmoe"), batches, **how)
    run_corpus, seen, tried = StreamedMoE.run_corpus, Listener._stream_seen, []

    def counted(self: Any, given: Any, *args: Any, **more: Any) -> Any:
        tried.append(len(given))
        return run_corpus(self, given, *args, **more)

    def limited(self: Listener, place: int, value: Tensor) -> None:
        if tried[-1] > 2 and place == 1:
            raise OF_A_GPU
        seen(self, place, value)

    with monkeypatch.context() as patched:
        patched.setattr(StreamedMoE, "run_corpus", counted)
        patched.setattr(Listener, "_stream_seen", limited)
        if n_readings == 1:
            assert_same_results(routing_contributions(model, batches, **how), expected)
            assert tried == [5, 2, 2, 1]
            assert (
                "ran out at 5 batches that go through the layers together" in caplog.records[0].getMessage()
            )
            return
        with pytest.raises(
            NotEnoughMemory, match=r"ran out at 5 batches .*what would help: a smaller memory_b"
        ):
            routing_contributions(model, batches, **how, state=tmp_path / "state")
    assert tried == [5, 5]
    assert not (tmp_path / "state").exists()
    assert_same_results(routing_contributions(model, batches, **how, state=tmp_path / "state"), expected)


def test_memory_that_runs_out_when_some_of_a_group_were_added(
    streamed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They would be added twice."""
    finish, n_finished = Listener.finish, []

    def limited(self: Listener) -> None:
        if len(n_finished) == 2:
            raise OF_A_GPU
        finish(self)
        n_finished.append(1)

    monkeypatch.setattr(Listener, "finish", limited)
    with pytest.raises(NotEnoughMemory, match="ran out at 5 batches"):
        routing_contributions(streamed("olmoe"), five_batches(), state=tmp_path / "state")
    assert not (tmp_path / "state").exists()

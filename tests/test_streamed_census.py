"""The census of a streamed model: the rows of the one in memory bit by bit, each layer read once for many documents."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens.audit import census, census_streamed
from moe_lens.audit.census_table import Census
from moe_lens.census_page import largest_changes, write_census_page
from moe_lens.corpus import Document, token_batches
from moe_lens.interventions import clean_run, streamed_replay
from moe_lens.interventions.branches import Change, single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.replay import Branches, replay
from moe_lens.interventions.replay_plan import branch_bytes
from moe_lens.interventions.streamed_replay import ToReplay, branches_bytes, clean_bytes, replay_documents
from moe_lens.interventions.suffix import Suffix
from moe_lens.model import freed_memory, loss, residual_streams
from moe_lens.routing.provenance import weights_fingerprint
from tests.census_cases import SEED, WITH_SHARED, reference_of
from tests.checkpoints import change_tensors, load
from tests.families import FAMILIES, prompts
from tests.streamed_cases import assert_nothing_is_left
from tests.test_replay import assert_equal

N_DOCUMENTS = 6
OUTCOMES = ["kl", LogitDifference(4, 5)]


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of several lengths, one with padding inside; the last but one has no position to measure."""
    tokens, mask = prompts("right", batch=N_DOCUMENTS, length=8, seed=8)
    mask[:] = 1
    mask[::3, 6:], mask[1, 3], mask[4, 1:] = 0, 0, 0
    return tokens, mask.bool()


def run(model: Any, **changes: Any) -> Census:
    tokens, mask = corpus()
    arguments: dict[str, Any] = dict(attention_mask=mask, outcome=OUTCOMES, noise_samples=0, save_every=0.0)
    return census(model, tokens, **{**arguments, **changes})


def assert_same(one: Census, other: Census) -> None:
    """Bit by bit, but for what a streamed run scales afterwards."""
    assert one.columns == other.columns
    assert (one.n_documents, one.finished) == (other.n_documents, other.finished)
    mine, its = one.to_pandas(), other.to_pandas()
    for name in one.columns:
        if name == "direct":
            torch.testing.assert_close(
                torch.tensor(mine[name].to_numpy()), torch.tensor(its[name].to_numpy()), rtol=1e-5, atol=1e-6
            )
        else:
            assert mine[name].to_numpy().tobytes() == its[name].to_numpy().tobytes(), name


def layers_read(model: Any, work: Callable[[], Any]) -> int:
    weights_fingerprint(model)
    before = model.read_counts.layers_read
    work()
    return model.read_counts.layers_read - before


def streams_of(model: Any, settings_shared: bool, n_tokens: int, n_rows: int) -> int:
    """What a document takes of the budget, at all layers."""
    cfg = model.cfg
    n_branches = len(cfg.moe_layers) * (cfg.top_k + settings_shared + (cfg.dtype != torch.float32))
    return branches_bytes(model, n_rows, n_branches) + clean_bytes(model, n_tokens)


# --- the numbers of the model in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FAMILIES)
def test_rows_are_those_in_memory(
    streamed: Any, checkpoint: Any, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    """Documents by themselves with all streams in a file, two at a time, and all together."""
    ours, theirs = streamed(variant, dtype=dtype), load(checkpoint(variant), dtype=dtype)
    how: dict[str, Any] = dict(shared=theirs.cfg.shared is not None, predictors="direct")
    expected = run(theirs, **how)
    n_layers = ours.cfg.n_layers
    two = 2 * streams_of(ours, how["shared"], 8, 7)
    for budget, n_passes in ((1, N_DOCUMENTS - 1), (two, 3), (None, 1)):
        made: list[Census] = []
        given = dict(streams_budget=budget, spill_directory=tmp_path, **how)
        n_read = layers_read(ours, lambda: made.append(run(ours, **given)))  # noqa: B023
        assert_same(made[0], expected)
        assert n_read == n_passes * n_layers
        assert_nothing_is_left(ours)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["renormalize", "reroute", "mean", "resample"])
@pytest.mark.parametrize("variant", ["qwen3_moe", "deepseek_v2_groups", "qwen2_moe_no_bias"])
def test_other_ways_and_samples(streamed: Any, hooked: Any, variant: str, how: str) -> None:
    """Of a few layers, at a few positions, with little memory for the branches at work."""
    theirs = hooked(variant)
    reads = how in ("mean", "resample")
    given: dict[str, Any] = dict(
        how=how,
        reference=reference_of(hooked, variant) if reads else None,
        shared=reads and variant in WITH_SHARED,
        layers=[theirs.cfg.moe_layers[0], theirs.cfg.moe_layers[-1]],
        n=9,
        seed=SEED,
        memory_budget=5 * branch_bytes(theirs, 8),
    )
    ours = streamed(variant)
    ours.cfg = theirs.cfg  # the reference knows the model by its name
    assert_same(run(ours, streams_budget=30_000, **given), run(theirs, **given))


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_pieces_on_several_cores(streamed: Any, hooked: Any, n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        given: dict[str, Any] = dict(memory_budget=6 * branch_bytes(hooked("mixtral"), 8))
        assert_same(run(streamed("mixtral"), streams_budget=20_000, **given), run(hooked("mixtral"), **given))
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_branches_of_any_kind(streamed: Any, hooked: Any) -> None:
    """Several of one layer, with slots of their own at every position, in no order of layers."""
    theirs, (tokens, mask) = hooked("deepseek_v2_groups"), corpus()
    ours, k = streamed("deepseek_v2_groups"), theirs.cfg.top_k
    generator = torch.Generator().manual_seed(5)
    asked, expected, heard = [], [], []
    for number in (0, 2, 5):
        clean = CleanRun.of(theirs, tokens[number], mask[number])
        rows = clean.has_next.nonzero()[::2, 0]
        removed = torch.rand(3, len(rows), 2, k, generator=generator) < 0.5
        branches = [Branches(layer, removed[i]) for i, layer in enumerate((2, 0, 2))]
        branches.append(Branches(2, single_slots(k), torch.ones(k, dtype=torch.bool)))
        how: dict[str, Any] = dict(rows=rows, outcomes=OUTCOMES, memory_budget=8 * branch_bytes(theirs, 8))
        asked.append(ToReplay(tokens[number], mask[number], branches, **how))
        expected.append(replay(clean, branches, **how))
    made = replay_documents(
        ours,
        asked,
        streams_budget=5000,
        on_layer=lambda i, clean, values: heard.append((values.layer, i, [*clean.keys])),
    )
    for (clean, result), wanted in zip(made, expected, strict=True):
        assert_equal(result, wanted)
        assert torch.equal(clean.loss[clean.has_next][::2], wanted.clean_loss)
    # Of no other layer are keys held.
    assert heard == [(layer, i, [layer]) for layer in (0, 2) for i in range(3)]
    assert all(not clean.keys and not clean.values and not clean.resid_mid for clean, _ in made)


# --- a run that is left and taken up again ------------------------------------------------------------------


def stopped_after(n_passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass after so many is interrupted in its last layer."""
    replayed, passes = streamed_replay._Pass.run, []
    stepped = streamed_replay._OnTheWay.step_clean

    def counted(*args: Any) -> Any:
        passes.append(args)
        return replayed(*args)

    def interrupted(self: Any, block: Any, layer: int) -> bool:
        if len(passes) > n_passes and layer == self.model.cfg.n_layers - 1:
            raise KeyboardInterrupt
        return stepped(self, block, layer)

    monkeypatch.setattr(streamed_replay._Pass, "run", counted)
    monkeypatch.setattr(streamed_replay._OnTheWay, "step_clean", interrupted)


def test_gone_on_with(
    streamed: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other groups, at the first document that is not written; a pass that ended is written at once."""
    model, folder = streamed("qwen2_moe", dtype=torch.bfloat16), tmp_path / "census"
    expected = run(load(checkpoint("qwen2_moe"), dtype=torch.bfloat16), n=15)
    two = 2 * streams_of(model, False, 8, 7)
    with monkeypatch.context() as patched:
        stopped_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            run(model, output=folder, n=15, streams_budget=two, save_every=1e6)
    assert_nothing_is_left(model)
    part = Census.load(folder, allow_unfinished=True)
    n_done = part.n_documents
    assert 2 <= n_done < N_DOCUMENTS
    with monkeypatch.context() as patched:
        seen: list[int] = []
        clean = streamed_replay.real_tokens_of
        patched.setattr(
            streamed_replay,
            "real_tokens_of",
            lambda *args: seen.append(1) or clean(*args),  # type: ignore[func-returns-value]
        )
        assert_same(run(model, output=folder, n=15, save_every=1e6), expected)
        assert 0 < len(seen) <= N_DOCUMENTS - n_done
    assert_same(Census.load(folder), expected)
    assert layers_read(model, lambda: run(model, output=folder, n=15)) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_gone_on_with(streamed: Any, hooked: Any, tmp_path: Path) -> None:
    from tests.test_census_resume import killed_when, n_shards

    model, folder = streamed("mixtral"), tmp_path / "census"
    weights_fingerprint(model)
    how: dict[str, Any] = dict(output=folder, streams_budget=1, spill_directory=tmp_path, save_every=1e6)
    killed_when(lambda: run(model, **how), lambda: n_shards(folder) >= 2)
    assert n_shards(folder) >= 2  # of a pass each, however seldom is saved otherwise
    assert_same(run(model, **how), run(hooked("mixtral")))


def test_begun_in_memory(
    streamed: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is the same bit by bit goes on in either way; what is not, does not."""
    ours, theirs = streamed("olmoe"), load(checkpoint("olmoe"))
    clean_run, seen = CleanRun.of, []

    def interrupted(*args: Any) -> CleanRun:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return clean_run(*args)

    for folder, how in (("plain", {}), ("direct", dict(predictors="direct"))):
        seen.clear()
        with monkeypatch.context() as patched:
            patched.setattr(CleanRun, "of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(theirs, output=tmp_path / folder, **how)
    assert_same(run(ours, output=tmp_path / "plain"), run(theirs))
    with pytest.raises(ValueError, match="of another run: streamed was None and is True"):
        run(ours, output=tmp_path / "direct", predictors="direct")
    assert_same(run(theirs, output=tmp_path / "plain"), run(theirs))


# --- memory, and what is said of it -------------------------------------------------------------------------


def test_streams_beyond_the_budget_are_in_a_file(
    streamed: Any, hooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    files: list[int] = []
    enter = residual_streams.ResidualStreams.__enter__

    def entered(self: Any) -> Any:
        streams = enter(self)
        made.append(self)
        files.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        return streams

    monkeypatch.setattr(residual_streams.ResidualStreams, "__enter__", entered)
    model = streamed("qwen3_moe")
    full = streams_of(model, False, 8, 7)
    given: dict[str, Any] = dict(memory_budget=6 * branch_bytes(model, 8), spill_directory=tmp_path)
    expected = run(hooked("qwen3_moe"), memory_budget=given["memory_budget"])
    for budget in (full, full // 2, 1):
        made.clear()
        files.clear()
        assert_same(run(model, streams_budget=budget, **given), expected)
        assert len(made) == N_DOCUMENTS - 1
        most = max(streams.bytes_in_memory + streams.bytes_in_file for streams in made)
        # Places in the file are aligned.
        assert full - clean_bytes(model, 8) <= most <= 1.5 * full
        assert [streams.bytes_in_file for streams in made] == files
        assert max(files) == 0 if budget == full else max(files) > full // 3
        assert all(streams.bytes_in_memory <= budget for streams in made)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_file(
    streamed: Any, hooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before the pass begins; the documents before it are kept."""
    model, folder = streamed("olmoe"), tmp_path / "census"
    fallocate = os.posix_fallocate

    def full(descriptor: int, start: int, size: int) -> None:
        if Census.load(folder, allow_unfinished=True).n_documents == 2:
            raise OSError(28, "No space left on device")
        fallocate(descriptor, start, size)

    monkeypatch.setattr(residual_streams.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for [\d,]+ bytes .* a larger streams_budget"):
        run(model, output=folder, streams_budget=1, spill_directory=tmp_path)
    assert Census.load(folder, allow_unfinished=True).n_documents == 2
    assert_same(run(model, output=folder), run(hooked("olmoe")))


def test_the_plan_is_printed(streamed: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = streamed("olmoe")
    full = streams_of(model, False, 8, 7)
    run(model, streams_budget=3 * full, verbose=True)
    said = capsys.readouterr().out
    assert "streamed: 2 passes over 3 layers, with 3 documents at most" in said
    assert "spill" not in said
    run(model, streams_budget=full // 2, spill_directory=tmp_path, verbose=True)
    said = capsys.readouterr().out
    assert "streamed: 5 passes over 3 layers" in said
    assert f"in a file in '{tmp_path}'" in said
    assert "noise floor: three passes" not in said


def test_the_plan_counts_what_no_budget_bounds() -> None:
    """Clean runs are in memory whatever the budget, and a file has nothing of them."""
    passes = census_streamed.Passes(None, [[0], [1, 2]], [100, 60], [30, 10], 5, 20, None)  # type: ignore[arg-type]
    assert (passes.most_held, passes.most_spilled) == (30, 70)
    both = census_streamed.Passes.joined([passes, replace(passes, longest=9)])
    assert (both.n_passes, both.most_held, both.longest) == (4, 30, 9)
    passes = replace(passes, budget=200)
    assert (passes.most_held, passes.most_spilled) == (100, 0)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_clean_run_takes_what_was_planned(hooked: Any, variant: str) -> None:
    """Beside the stream, of every layer the stream before the MoE, keys and values, and nothing that these are of."""
    model = hooked(variant)
    clean = CleanRun.of(model, corpus()[0][2])
    kept = [*clean.resid_mid, *clean.keys, *clean.values]
    taken = sum(tensor.untyped_storage().nbytes() for tensor in kept) // model.cfg.n_layers
    assert taken + clean.final.nbytes == clean_bytes(model, len(clean.tokens))


def test_a_clean_run_makes_few_logits_at_a_time(hooked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, _) = hooked("olmoe"), corpus()
    whole = CleanRun.of(model, tokens[2]).loss
    for n_at_once in (1, 3, 7):
        likelihood = partial(loss.likelihood_in_parts, logits_budget=4 * 128 * n_at_once)
        monkeypatch.setattr(clean_run, "likelihood_in_parts", likelihood)
        parts = CleanRun.of(model, tokens[2]).loss
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_is_read_is_what_was_planned(streamed: Any) -> None:
    model = streamed("deepseek_v2")
    weights_fingerprint(model)
    before = model.read_counts.bytes_read
    passes: list[Any] = []
    rows = census_streamed.Passes.rows

    def kept(self: Any, *args: Any) -> Any:
        passes.append(self)
        return rows(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(census_streamed.Passes, "rows", kept)
        run(model, streams_budget=20_000)
    assert passes[0].n_passes > 1
    assert model.read_counts.bytes_read - before == passes[0].bytes_read
    assert model.read_counts.peak_bytes <= model.layer_memory


def test_freed_memory_goes_back(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every layer; and where documents make much of it, after each at each layer."""
    calls: list[int] = []
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: calls.append)
    model = streamed("olmoe")
    run(model)
    assert len(calls) == model.cfg.n_layers
    calls.clear()
    monkeypatch.setattr(freed_memory, "_GIVE_BACK_EVERY", 1)
    run(model)
    n_measured = N_DOCUMENTS - 1
    # Its clean run, its branches, and in the end its predictions.
    assert len(calls) == model.cfg.n_layers * (2 * n_measured + 1) + n_measured


def test_progress_comes_to_its_end(streamed: Any) -> None:
    (tokens, mask), shares = corpus(), {}
    model = streamed("qwen2_moe")
    branches = [Branches(layer, single_slots(model.cfg.top_k)) for layer in model.cfg.moe_layers]
    replay_documents(
        model,
        [ToReplay(tokens[i], mask[i], branches) for i in range(3)],
        advance=lambda i, share: shares.setdefault(i, []).append(share),
    )
    for i in range(3):
        assert sum(shares[i]) == pytest.approx(1)
        assert len(shares[i]) == model.cfg.n_layers + 1


# --- the noise floor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["olmoe_bf16", "deepseek_v2_bf16_sharded"])
def test_noise_floor_is_that_in_memory(streamed: Any, checkpoint: Any, variant: str) -> None:
    """Of the same sample. In float32 all slots are replayed together, which rounds otherwise; errors are of 1e-3."""
    ours, theirs = streamed(variant), load(checkpoint(variant))
    made: list[Census] = []
    n_read = layers_read(ours, lambda: made.append(run(ours, noise_samples=12)))
    expected = run(theirs, noise_samples=12)
    assert_same(made[0], expected)
    floor, wanted = made[0].facts["noise_floor"], expected.facts["noise_floor"]
    assert floor.keys() == wanted.keys()
    assert floor["n_samples"] > 5
    for name, value in wanted.items():
        assert floor[name] == pytest.approx(value, rel=1e-3, abs=2e-6), name
    # The census itself, the replays, and the full forward passes; the model in float32 is another.
    assert n_read == 3 * ours.cfg.n_layers


def test_noise_floor_in_groups(streamed: Any) -> None:
    """Where the clean runs of all samples do not fit the budget, fewer go together; the numbers are the same."""
    model = streamed("olmoe_bf16")
    together = run(model, noise_samples=3).facts["noise_floor"]
    made: list[Census] = []
    n_read = layers_read(model, lambda: made.append(run(model, noise_samples=3, streams_budget=1)))
    assert made[0].facts["noise_floor"] == together
    # The documents of the census and the replayed samples each by themselves, the full forward passes together.
    assert n_read == (N_DOCUMENTS - 1 + 3 + 1) * model.cfg.n_layers


def test_no_room_for_the_noise_floor(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lens.converters import NotEnoughMemory, loading

    model = streamed("olmoe_bf16")
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match=r"streamed in float32 .* noise_samples=0 leaves it out"):
        run(model, noise_samples=2)
    assert model.read_counts.layers_read == 0


# --- what cannot be -----------------------------------------------------------------------------------------


def test_what_needs_more_is_refused_at_once(streamed: Any, hooked: Any, tmp_path: Path) -> None:
    model = streamed("olmoe", dtype=torch.bfloat16)
    for given, message in (
        (dict(predictors=["direct", "first_order"]), "first_order.* needs gradients.* without stream=True"),
        (dict(scope="sequence"), "scope='sequence' .* without stream=True"),
        (dict(outcome=["kl", "later_loss"]), "later_loss.* without stream=True"),
        (
            dict(noise_samples=32),
            "not stored in torch.bfloat16.* noise_samples=0 leaves it",
        ),
        (dict(streams_budget=0), "streams_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, output=tmp_path / "census", **given)
    with (
        model.hooks([("blocks.1.hook_resid_mid", lambda value, hook: None)]),
        pytest.raises(ValueError, match="without hooks"),
    ):
        run(model)
    assert model.read_counts.layers_read == 0
    assert not (tmp_path / "census").exists()
    for name, value in (("streams_budget", 2**30), ("spill_directory", tmp_path)):
        with pytest.raises(ValueError, match=f"{name} is of a streamed model"):
            run(hooked("olmoe"), **{name: value})
    with pytest.raises(ValueError, match="no documents"):
        replay_documents(model, [])


def test_replay_of_one_document_is_refused(streamed: Any) -> None:
    model = streamed("olmoe")
    clean = CleanRun.of(model, corpus()[0][0])
    with pytest.raises(ValueError, match="replay_documents"):
        replay(clean, [Branches(1, single_slots(4))])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_numbers_that_are_not_finite(streamed: Any, copy: Any, layer: int, tmp_path: Path) -> None:
    """Told as of the model in memory: which document, which expert, which position. Documents before it are kept."""
    directory = copy("mixtral" if layer < 2 else "olmoe")

    def grow(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if f"layers.{layer}." in name and ("w2." in name or "down_proj" in name):
                tensor.fill_(3e38)

    change_tensors(directory, grow)
    messages = []
    for model in (load(directory), streamed(directory)):
        with pytest.raises(
            FloatingPointError, match=rf"document 0: the clean loss .*of layer {layer}, position"
        ) as told:
            run(model)
        messages.append(str(told.value))
    assert messages[0] == messages[1]


def test_a_change_that_gives_nan(streamed: Any, hooked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is named as well."""
    (tokens, mask), model = corpus(), streamed("olmoe")
    asked = ToReplay(
        tokens[2], mask[2], [Branches(1, single_slots(4))], change=Change("zero"), name="the third"
    )
    from moe_lens.interventions import suffix

    right = suffix.starts

    def broken(*args: Any) -> Any:
        start = right(*args)
        if args[3].any():
            start.streams[2, 1] = torch.nan
        return start

    monkeypatch.setattr(suffix, "starts", broken)
    with pytest.raises(
        FloatingPointError, match=r"the third: loss is nan at position 2 after the change of M1E"
    ):
        replay_documents(model, [asked])


def test_memory_that_runs_out(
    streamed: Any, hooked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At any layer, with branches that go on and such that begin: fewer rows at once, and the same branches."""
    (tokens, mask), theirs = corpus(), hooked("qwen2_moe")
    rows = torch.arange(5)
    generator, k = torch.Generator().manual_seed(6), theirs.cfg.top_k
    branches = [
        Branches(layer, torch.rand(5, 3, k, generator=generator) < 0.5) for layer in theirs.cfg.moe_layers
    ]
    expected = replay(CleanRun.of(theirs, tokens[2], mask[2]), branches, rows=rows, outcomes=["kl"])
    for most, n_said in ((4, 1), (1, 2)):
        right = Suffix.step

        def step(self: Any, *args: Any, most: int = most, right: Any = right) -> Any:
            if len(self.rows) > most and args[1] > 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(self, *args)

        caplog.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Suffix, "step", step)
            asked = ToReplay(tokens[2], mask[2], branches, rows=rows, outcomes=["kl"])
            ((_, result),) = replay_documents(streamed("qwen2_moe"), [asked])
        assert_equal(result, expected, 1e-5)
        assert len([r for r in caplog.records if "memory ran out" in r.message]) == n_said
    monkeypatch.setattr(Suffix, "step", lambda *args: torch.empty(2**60))
    with pytest.raises(MemoryError, match="memory ran out at 1 rows of a replay"):
        replay_documents(streamed("qwen2_moe"), [asked])
    monkeypatch.setattr(CleanRun, "_moe", lambda *args: torch.empty(2**60))
    with pytest.raises(MemoryError, match=r"memory ran out at the document .* shorter documents"):
        replay_documents(streamed("qwen2_moe"), [asked])


def test_a_page_of_it(streamed: Any, tmp_path: Path) -> None:
    """What the command makes of a census afterwards."""
    model = streamed("olmoe")
    batches = token_batches(
        model,
        [Document("one", "cats", "The cat sat on the mat."), Document("two", "dogs", "A dog.")],
        batch_size=1,
    )
    result = census(model, batches)
    examples = largest_changes(model, batches, result)
    assert len(examples) == 10
    assert write_census_page(result, tmp_path / "index.html", examples=examples).is_file()
    assert result.identity["weights"] == weights_fingerprint(model)

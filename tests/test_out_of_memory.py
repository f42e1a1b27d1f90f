"""Memory that runs out in a long run: what is at work is halved, and the numbers are the same."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.audit.census_table import Census
from moe_lens.converters import NotEnoughMemory
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.first_order import loss_gradients
from moe_lens.interventions.replay import replay
from moe_lens.model.block import Block
from moe_lens.out_of_memory import InParts, is_out_of_memory, said_what_would_help
from moe_lens.routing import listener
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.tally import Tally
from tests.families import prompts
from tests.fault_cases import OF_A_GPU, OF_THE_CPU, OUT_OF_MEMORY, as_census, memory_for, needs_fork
from tests.routing_cases import assert_close_results, assert_same_results
from tests.test_contribution_runs import five_batches
from tests.test_replay import assert_equal, each_slot

# ---- the helper ----


def test_what_is_out_of_memory() -> None:
    for ask in (lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value)
    assert all(is_out_of_memory(error) for error in OUT_OF_MEMORY)
    others = [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
    ]
    assert not any(is_out_of_memory(error) for error in others)


def test_rows_are_done_once_each_in_their_order(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[tuple[int, int]] = []

    def work(part: slice) -> list[int]:
        tried.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise OF_A_GPU
        return list(range(part.start, part.stop))

    in_parts = InParts("rows", "less of it")
    assert [row for part in in_parts.run(work, 20) for row in part] == list(range(20))
    assert tried[:3] == [(0, 20), (0, 10), (0, 5)]
    # What was found to be too much is not tried again, nor in the next run.
    assert {stop - start for start, stop in tried[3:]} == {2}
    tried.clear()
    assert in_parts.run(work, slice(4, 7)) == [[4, 5], [6]]
    assert tried == [(4, 6), (6, 7)]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("memory ran out at 20 rows (CUDA out of memory.")
    assert messages[0].endswith("; going on with 10 at a time")
    assert len(messages) == 3
    assert {(r.name, r.levelno) for r in caplog.records} == {("moe_lens.out_of_memory", logging.WARNING)}
    assert InParts("rows", "", at_once=4).run(lambda part: (part.start, part.stop), 9) == [
        (0, 4),
        (4, 8),
        (8, 9),
    ]
    assert InParts("rows", "").run(work, 0) == []


def test_what_cannot_be_helped_says_what_would_help() -> None:
    def fail(part: slice, error: BaseException = OF_THE_CPU) -> None:
        raise error

    with pytest.raises(
        NotEnoughMemory, match=r"at 1 rows \(\[enforce fail .* would help: less of it"
    ) as caught:
        InParts("rows", "less of it").run(fail, 5)
    assert caught.value.__cause__ is OF_THE_CPU
    with pytest.raises(NotEnoughMemory, match="memory ran out at 5 rows"):
        InParts("rows", "less of it").run(fail, 5, can_be_repeated=lambda: False)
    with (
        pytest.raises(NotEnoughMemory, match=r"at a batch \(std::bad_alloc\); what would help: less of it"),
        said_what_would_help("a batch", "less of it"),
    ):
        raise MemoryError("std::bad_alloc")
    for other in (RuntimeError("another"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as went_through:
            InParts("rows", "").run(lambda part, other=other: fail(part, other), 5)
        assert went_through.value is other


# ---- memory runs out in a replay ----


def document(model: Any, length: int = 12) -> CleanRun:
    tokens, _ = prompts("none", length=length)
    return CleanRun.of(model, tokens[0])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_replay_goes_on_with_fewer_rows(
    model_of: Any, caplog: pytest.LogCaptureFixture, error: BaseException, n_threads: int
) -> None:
    model = model_of("qwen2_moe_no_bias")
    clean, branches = document(model), each_slot(model, shared=True)
    expected = replay(clean, branches, outcomes=["kl"])
    torch.set_num_threads(n_threads)
    try:
        # A layer's branches at two tokens, or two layers' at one.
        with memory_for(2 * (model.cfg.top_k + 2), error) as tried:
            found = replay(clean, branches, outcomes=["kl"])
    finally:
        torch.set_num_threads(1)
    assert max(tried) > 2 * (model.cfg.top_k + 2)
    assert_equal(found, expected, tolerance=1e-6)
    assert "rows of a replay" in caplog.records[0].getMessage()


def test_logits_and_gradients_of_fewer_tokens(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("mixtral")
    clean, branches = document(model), each_slot(model)
    rows = clean.has_next.nonzero()[:, 0]
    expected, gradients = replay(clean, branches, outcomes=["kl"]), loss_gradients(clean, rows)
    width = (model.cfg.top_k + 1) * len(branches)
    with memory_for(2 * width, of=type(model.unembed), one=model.unembed):
        assert_equal(replay(clean, branches, outcomes=["kl"]), expected, tolerance=1e-6)
    with memory_for(3):
        torch.testing.assert_close(loss_gradients(clean, rows), gradients, rtol=1e-5, atol=1e-6)
    said = {record.getMessage().split(" (")[0].split(" ", 5)[-1] for record in caplog.records}
    assert said == {"tokens' logits of a replay", "tokens' gradients"}


def test_branches_of_fewer_layers_and_none_at_all(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where not even one token's fit, one layer's branches are taken at a time; then it is said what would help."""
    model = model_of("olmoe")
    tokens, _ = prompts("none", length=3)
    clean, branches = CleanRun.of(model, tokens[0]), each_slot(model)
    expected = replay(clean, branches)
    with memory_for(model.cfg.top_k + 1):
        assert_equal(replay(clean, branches), expected, tolerance=1e-6)
    assert any("layers' branches of a replay" in record.getMessage() for record in caplog.records)
    with memory_for(1), pytest.raises(NotEnoughMemory, match="what would help: a smaller memory_budget"):
        replay(clean, branches)
    with memory_for(1, RuntimeError("another")), pytest.raises(RuntimeError, match=r"^another$"):
        replay(clean, branches)


def assert_close_census(one: Census, other: Census) -> None:
    assert one.columns == other.columns
    for name, values in one.to_pandas().items():
        if values.dtype.kind == "i":
            assert values.equals(other.to_pandas()[name]), name
        else:
            np.testing.assert_allclose(
                values, other.to_pandas()[name], rtol=1e-5, atol=2e-6, err_msg=str(name)
            )


@pytest.mark.parametrize(
    "changes", [{}, {"scope": "sequence"}, {"outcome": "later_loss", "layers": [0]}], ids=str
)
def test_a_census_goes_on(model_of: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]) -> None:
    model = model_of("mixtral")
    expected = as_census(model, **changes)
    with memory_for(10):
        assert_close_census(as_census(model, **changes), expected)
    assert caplog.records


def test_a_document_that_does_not_fit_is_named(model_of: Any, tmp_path: Path) -> None:
    """What came before it is kept, and the same call goes on from there."""
    model = model_of("mixtral")
    expected, ran = as_census(model), []
    forward = Block.forward

    def full_in_the_third(self: Any, stream: torch.Tensor, *args: Any) -> Any:
        if self is model.blocks[0] and len(stream) == 1:
            ran.append(1)
        if len(ran) == 3:
            raise OF_A_GPU
        return forward(self, stream, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "forward", full_in_the_third)
        with pytest.raises(
            NotEnoughMemory, match=r"memory ran out at document 2 .*what would help: shorter doc"
        ):
            as_census(model, tmp_path / "census", predictors=())
    assert Census.load(tmp_path / "census", allow_unfinished=True).n_documents == 2
    found = as_census(model, tmp_path / "census", predictors=())
    np.testing.assert_array_equal(found.to_pandas().delta_loss, expected.to_pandas().delta_loss)


# ---- memory runs out in routing contributions ----

SEVERAL: dict[str, Any] = dict(by=("layer", "neuron", "source"), max_positions=8)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_contributions_of_fewer_documents_at_once(
    model_of: Any, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Batches are divided alike, and each document is counted once."""
    model, batches = model_of("qwen2_moe_no_bias"), five_batches()
    one_by_one = [(t[None], m[None]) for tokens, mask in batches for t, m in zip(tokens, mask, strict=True)]
    expected = routing_contributions(model, one_by_one, **SEVERAL)
    longest = max(tokens.shape[1] for tokens, _ in batches)
    with memory_for(longest, error) as tried:
        found = routing_contributions(model, batches, **SEVERAL)
    assert max(tried) > longest
    for by in SEVERAL["by"]:
        assert_close_results(found[by], expected[by], rtol=1e-5, atol=1e-6)
        assert found[by].n_documents == expected[by].n_documents
        assert found[by].provenance["fingerprints"] == expected[by].provenance["fingerprints"]
    assert "documents of a batch" in caplog.records[0].getMessage()


def test_a_document_of_a_batch_that_does_not_fit(model_of: Any, tmp_path: Path) -> None:
    """It is said what would help; the batches before are in the state, though it was not due."""
    model, batches = model_of("olmoe"), five_batches()
    expected = routing_contributions(model, batches)
    lengths = [tokens.shape[1] for tokens, _ in batches]
    assert lengths == sorted(lengths)
    with memory_for(max(t.numel() for t, _ in batches[:3])), pytest.raises(NotEnoughMemory) as caught:
        routing_contributions(
            model, [*batches[:3], prompts("none", length=40, batch=2)], state=tmp_path / "state"
        )
    assert "memory ran out at 1 documents of a batch (CUDA" in str(caught.value)
    assert "what would help: a smaller batch_size" in str(caught.value)
    with memory_for(max(t.numel() for t, _ in batches)) as tried:
        found = routing_contributions(model, batches, state=tmp_path / "state")
    assert len(tried) == 2 * model.cfg.n_layers - 2 * (model.cfg.n_layers - len(found.receivers))
    assert_same_results(found, expected)


@pytest.mark.parametrize("at_once", [True, False])
def test_memory_that_runs_out_while_a_batch_is_added(
    model_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once: bool
) -> None:
    """Nothing of it is added twice: its documents are divided where nothing was, and else the run ends."""
    model, batches = model_of("mixtral"), five_batches()
    expected = routing_contributions(model, batches, by="expert")
    additions, n_made = Tally.additions, []

    def fails_in_the_middle(self: Tally, *args: Any) -> Iterator[Callable[[], None]]:
        for addition in additions(self, *args):
            yield addition
            n_made.append(1)
            if len(n_made) == 60:
                raise OF_A_GPU

    if not at_once:
        monkeypatch.setattr(listener, "MADE_AT_ONCE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Tally, "additions", fails_in_the_middle)
        how: dict[str, Any] = dict(by="expert", state=tmp_path / "state")
        if at_once:
            assert_close_results(routing_contributions(model, batches, **how), expected, rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(NotEnoughMemory, match=r"memory ran out at \d documents of a batch"):
                routing_contributions(model, batches, **how)
    assert len(n_made) >= 60
    if not at_once:
        # What was added in part is kept nowhere.
        assert not (tmp_path / "state").exists()
        assert_same_results(routing_contributions(model, batches, **how), expected)


# ---- a limit that the system sets ----


@needs_fork
def test_under_a_limit_of_the_system(model_of: Any, tmp_path: Path) -> None:
    """A process that may take no more memory than it has and a little: its logits are made for fewer tokens at a time.
    The numbers are the same."""
    model = model_of("mixtral")
    expected = as_census(model)
    child = os.fork()
    if child == 0:
        try:
            logging.basicConfig(filename=tmp_path / "log", force=True)
            room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**27
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            unembed = type(model.unembed).forward

            def larger(self: Any, stream: torch.Tensor) -> torch.Tensor:
                if self is model.unembed:
                    # As a vocabulary of two millions would take.
                    torch.empty(stream[..., 0].numel(), 2_000_000)
                return unembed(self, stream)

            type(model.unembed).forward = larger
            result = as_census(model)
            (tmp_path / "rows").write_text(
                json.dumps(result.to_pandas()[["delta_loss", "kl"]].to_numpy().tolist())
            )
        except BaseException:
            logging.exception("it failed")
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0
    assert "memory ran out at" in (log := (tmp_path / "log").read_text())
    assert "DefaultCPUAllocator: can't allocate memory" in log
    found = np.array(json.loads((tmp_path / "rows").read_text()))
    np.testing.assert_allclose(
        found, expected.to_pandas()[["delta_loss", "kl"]].to_numpy(), rtol=1e-5, atol=2e-6
    )

"""Replay on several cores: the same numbers, torch's threads as they were, and errors that come through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from moe_lens.interventions import Branches, CleanRun, replay, single_slots
from moe_lens.interventions.cores import all_cores
from tests.families import prompts


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("null_branch", [False, True])
def test_two_cores_give_what_one_gives(
    variant: str, null_branch: bool, model_of: Callable[[str], Any], two_threads: None
) -> None:
    model = model_of(variant)
    tokens, _ = prompts(length=20)
    clean = CleanRun.of(model, tokens[0])
    slots = single_slots(model.cfg.top_k)
    branches = [Branches(layer, slots) for layer in reversed(model.cfg.moe_layers)]
    seen: list[int] = []
    both = replay(
        clean,
        branches,
        outcomes=("kl",),
        null_branch=null_branch,
        memory_budget=2**20,
        on_layer=lambda values: seen.append(values.layer),
    )
    assert sorted(seen) == list(model.cfg.moe_layers)
    torch.set_num_threads(1)
    one = replay(clean, branches, outcomes=("kl",), null_branch=null_branch)
    for name in ("loss", "kl"):
        for mine, its in zip(both.outcomes[name], one.outcomes[name], strict=True):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    for mine, its in zip(both.gap_norm, one.gap_norm, strict=True):
        torch.testing.assert_close(mine, its)
    assert (both.null is None) == (one.null is None)


def test_the_number_of_threads_is_restored(two_threads: None) -> None:
    with all_cores(torch.device("cpu")) as cores:
        assert cores.n == 2
        assert torch.get_num_threads() == 1
        assert cores.submit(torch.get_num_threads).result() == 1
        # What gradients do is known to each thread by itself.
        assert not cores.submit(torch.is_grad_enabled).result()
    assert torch.get_num_threads() == 2


def test_an_error_in_a_piece_comes_through_and_threads_are_restored(two_threads: None) -> None:
    def fail() -> None:
        raise FloatingPointError("M1E2")

    with pytest.raises(FloatingPointError, match="M1E2"), all_cores(torch.device("cpu")) as cores:
        cores.submit(fail).result()
    assert torch.get_num_threads() == 2


def test_an_error_does_not_wait_for_what_has_yet_to_begin(two_threads: None) -> None:
    begun: list[int] = []

    def slow(number: int) -> None:
        begun.append(number)
        time.sleep(0.05)

    def interrupted() -> None:
        with all_cores(torch.device("cpu")) as cores:
            for number in range(40):
                cores.submit(partial(slow, number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(begun) < 10
    assert torch.get_num_threads() == 2


def test_one_thread_works_in_place() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with all_cores(torch.device("cpu")) as cores:
            assert cores.n == 1
            assert cores.submit(lambda: 7).result() == 7
    finally:
        torch.set_num_threads(before)

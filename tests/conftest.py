"""Shared fixtures: every tiny checkpoint is written and loaded once a session."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, hf_model, write_checkpoint, write_tokenizer

# The models are tiny: a second thread only waits, and on a busy machine it waits by spinning.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_collecting() -> Iterator[None]:
    """statsmodels collects all garbage for every correction of p-values, which takes longer than all else there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "collect", lambda *arguments: 0)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(variant)`: the directory of a tiny checkpoint, with a tokenizer beside it."""

    @cache
    def write(variant: str) -> Path:
        directory = write_checkpoint(variant, tmp_path_factory.mktemp(variant))
        write_tokenizer(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def hf(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """`hf(variant)`: that checkpoint as transformers loads it, float32, eager attention and experts."""
    return cache(lambda variant: hf_model(checkpoint(variant)))


@pytest.fixture(scope="session")
def hooked(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """`hooked(variant)`: that checkpoint as a HookedMoE, in float32. Tests leave it without hooks."""
    from moe_lens import HookedMoE

    def load(variant: str) -> Any:
        return HookedMoE.from_pretrained(
            checkpoint(variant), dtype=torch.float32, device="cpu", verbose=False
        )

    return cache(load)


@pytest.fixture(scope="module")
def traced(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """`traced(variant)`: its checkpoint in float32 in nnsight, one for a module of tests."""
    from tests.nnsight_cases import traced_model

    return cache(lambda variant: traced_model(checkpoint(variant)))


@pytest.fixture(scope="session")
def _nnsight_server(checkpoint: Callable[[str], Path]) -> Iterator[Any]:
    from tests.nnsight_server import serve

    with serve({family: checkpoint(family) for family in FAMILIES}) as server:
        yield server


@pytest.fixture
def nnsight_server(_nnsight_server: Any) -> Iterator[Any]:
    """A stand-in for an NDIF server that holds every family in float32, with this test as its client.

    It is started when a test first asks for it. See `tests.nnsight_server`.
    """
    from tests.nnsight_server import as_client_of

    with as_client_of(_nnsight_server):
        yield _nnsight_server


def leftover_hooks(model: Any) -> list[str]:
    """Hook points that still carry a hook of TransformerLens's or of torch's."""
    return [
        name
        for name, point in model.hook_dict.items()
        if point.has_hooks()
        or point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    ]


@pytest.fixture
def model_of(hooked: Callable[[str], Any]) -> Iterator[Callable[[str], Any]]:
    """`hooked`, with a check afterwards that no hook was left on the models used."""
    used: list[Any] = []

    def load(variant: str) -> Any:
        used.append(hooked(variant))
        return used[-1]

    yield load
    for model in used:
        model.set_use_attn_result(False)
        assert leftover_hooks(model) == []


@pytest.fixture
def streamed(checkpoint: Any) -> Iterator[Callable[..., Any]]:
    """`streamed(variant)`: its checkpoint, streamed; afterwards nothing may be left on the models or running."""
    from moe_lens.model.streamed_moe import StreamedMoE
    from tests.checkpoints import load
    from tests.streamed_cases import assert_nothing_is_left

    models: list[StreamedMoE] = []

    def load_streamed(variant: str | Path, **options: Any) -> StreamedMoE:
        model = load(checkpoint(variant) if isinstance(variant, str) else variant, stream=True, **options)
        assert isinstance(model, StreamedMoE)
        models.append(model)
        return model

    yield load_streamed
    for model in models:
        assert_nothing_is_left(model)


@pytest.fixture
def in_memory(checkpoint: Any) -> Callable[..., Any]:
    """`in_memory(variant)`: its checkpoint, loaded for this test alone, to be held against a streamed one bit by bit:
    of `hooked`'s models one cannot know what other tests have set on them."""
    from tests.checkpoints import load

    return lambda variant, **options: load(checkpoint(variant), **options)


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a checkpoint's tensor is read."""

    def refuse(*args: Any) -> Any:
        pytest.fail("a weight was read")

    from moe_lens.converters.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensors", refuse)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A variant's checkpoint directory, to be damaged."""
    return lambda variant: shutil.copytree(checkpoint(variant), tmp_path / variant)

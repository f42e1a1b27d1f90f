"""A layer never waits for its device: nothing in it asks a tensor for a number that Python then goes by.

On a CUDA device each such question (`bool`, `item`, `nonzero`) stops the host until all that was asked for before is
done. Here they are counted on a CPU, where the same operations answer them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.replay_attend import ReplayAttend
from moe_lens.model import attention as attention_module
from moe_lens.model.attend import Attend
from tests.families import FAMILIES, prompts

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")
BY_MASK = ("aten::index", "aten::_index_put")


class Waits(TorchDispatchMode):
    """Names of the operations whose answer the host must have."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __enter__(self) -> Any:
        # Of a CPU's tensors this is no operation.
        self._patch = pytest.MonkeyPatch()
        given = Tensor.tolist
        self._patch.setattr(Tensor, "tolist", lambda tensor: self.names.append("tolist") or given(tensor))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._patch.undo()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name().startswith(BY_MASK) else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if func.name().startswith(WAITS) or by_mask:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one question that is asked on a CPU alone."""
    monkeypatch.setattr(attention_module, "_fused_would_hide_nan", lambda queries, keys: False)


def test_questions_are_counted() -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        assert bool(numbers.any())
        assert numbers[1].item() == 1
        assert len(numbers[numbers > 1]) == len(numbers.nonzero()[:1]) == 1
        numbers[numbers > 1] = 0
        assert numbers.tolist() == [0, 1, 0]
    assert waits.names == [
        *["aten::_local_scalar_dense"] * 2,
        "aten::index.Tensor",
        "aten::nonzero",
        "aten::index_put_",
        "tolist",
    ]


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("variant", FAMILIES)
def test_no_layer_waits(model_of: Any, variant: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts("left")
    attend = Attend(
        model.cfg.rotary, (len(tokens), tokens.shape[1]), tokens.device, attention_mask=mask.bool()
    )
    with Waits() as waits, torch.no_grad():
        model.run_blocks(model.embed(tokens), attend)
    assert waits.names == []


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("variant", FAMILIES)
def test_no_layer_of_a_replay_waits(model_of: Any, variant: str) -> None:
    model = model_of(variant)
    clean, rows = CleanRun.of(model, prompts(length=8)[0][0]), torch.tensor([0, 2, 5])
    attend = ReplayAttend(clean, rows, backend="fused")
    streams = clean.resid_mid[0][rows][:, None].expand(-1, 4, -1)
    with Waits() as waits, torch.no_grad():
        model.run_blocks(streams, attend)
    assert waits.names == []

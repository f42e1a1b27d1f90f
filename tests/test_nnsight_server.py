"""The stand-in for an NDIF server: what nnsight's client gets from it, and that it lacks what a real one lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel

from tests.families import FAMILIES
from tests.nnsight_server import Server, client

TEXT = "The router sends every token"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_gives_what_it_gives_locally(
    nnsight_server: Server, checkpoint: Callable[[str], Path], family: str
) -> None:
    """From a client without weights, bit for bit."""
    lm, local = client(checkpoint(family)), TransformersModel(str(checkpoint(family)), dispatch=True)
    with lm.trace(TEXT, remote=True):
        theirs = lm.model.layers[1].output.save()
        logits = lm.output.logits.save()
    with local.trace(TEXT):
        ours = local.model.layers[1].output.save()
        expected = local.output.logits.save()
    assert torch.equal(theirs, ours)
    assert torch.equal(logits, expected)
    assert next(iter(lm._module.parameters())).is_meta


@pytest.fixture
def lm(nnsight_server: Server, checkpoint: Callable[[str], Path]) -> Any:
    return client(checkpoint("olmoe"))

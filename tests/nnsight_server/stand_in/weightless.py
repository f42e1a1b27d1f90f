"""Running a block where the model's weights are not, as an NDIF server does for a key that is not trusted.

There the block runs in a process beside the model's (github.com/ndif-team/ndif, `services/ray/sandbox`), which holds
the modules on the meta device. Inputs, outputs and edits cross between the two, and so do calls of a module
(`lm.lm_head(hidden)`); but a parameter or buffer that the block itself reads has a shape and no values, and what
crosses has no history of gradients. Here the block stays in the model's process: what it reads off a module is taken
from a twin on the meta device, and what it is served is detached. Nothing is pickled on the way, and the wrapper of
`.source` is the model's, not the runner's: what differs in these is not seen here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from nnsight.util import apply


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """The same model without weights."""
    with torch.device("meta"):
        return type(module)(module.config).eval()  # type: ignore[arg-type]


def _from_nnsight() -> bool:
    """Whether the caller's caller is nnsight's own code, which works on the model, or the block."""
    name = sys._getframe(2).f_globals.get("__name__") or ""
    return name.partition(".")[0] == "nnsight"


class _Module:
    """`Envoy._module`: the model's module for nnsight, the twin's for everyone else."""

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        self.modules = modules

    def __get__(self, envoy: Any, owner: Any = None) -> Any:
        if envoy is None:
            return self
        if "_module" not in envoy.__dict__:
            raise AttributeError("_module")
        real = envoy.__dict__["_module"]
        return real if _from_nnsight() else self.of(envoy, real)

    def __set__(self, envoy: Any, module: torch.nn.Module) -> None:
        envoy.__dict__["_module"] = module

    def of(self, envoy: Any, real: Any) -> Any:
        # An envoy's path begins with the root's own name: "model", "model.lm_head", "model.model.layers.0".
        return self.modules.get(envoy.path.partition(".")[2], real)


@contextlib.contextmanager
def without_weights(model: Any) -> Iterator[None]:
    """Give a block, while it runs, no value of any parameter or buffer of the model, and no gradient through it."""
    described = _Module(dict(twin(model._module).named_modules()))
    fallen_through, served = Envoy.__getattr__, Mediator.switch

    def getattr_of_twin(envoy: Any, name: str) -> Any:
        value = fallen_through(envoy, name)
        real = envoy.__dict__.get("_module")
        if isinstance(value, Envoy) or name == "config" or _from_nnsight():
            return value
        return getattr(described.of(envoy, real), name)

    def serve_detached(mediator: Mediator, *values: Any) -> Any:
        return served(mediator, *apply(values, torch.Tensor.detach, torch.Tensor))

    Mediator.switch = serve_detached  # type: ignore[method-assign]
    Envoy._module = described  # type: ignore[assignment]
    Envoy.__getattr__ = getattr_of_twin  # type: ignore[method-assign]
    try:
        yield
    finally:
        del Envoy._module  # type: ignore[attr-defined]
        Envoy.__getattr__ = fallen_through  # type: ignore[method-assign]
        Mediator.switch = served  # type: ignore[method-assign]

"""Who wants to know that a run begins and ends, and what it is a run of.

A hook sees one value at one point. What acts on positions also needs to know which tokens are real and which layers
will run, before the first of them does, and to be asked at the end whether everything happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One pass through the model, as it is about to begin.

    Attributes:
        real: which tokens are real.
        first_layer, last_layer: layers first..last-1 run.
        tokens: None where the run begins at a later layer, from a residual stream.
        n_past: how many columns came before these, in a generation that keeps keys and values.
    """

    real: Bool[Tensor, "batch pos"]
    first_layer: int
    last_layer: int
    tokens: Int[Tensor, "batch pos"] | None
    n_past: int = 0


RunObserver = Callable[[Run], AbstractContextManager[object]]
"""Entered before the first value is made, left after the last; what it raises stops the run."""


class ObservedModel:
    """A model that tells its observers of each run."""

    run_observers: list[RunObserver]

    @contextmanager
    def observed(self, run: Run) -> Iterator[None]:
        """The run happens inside of this."""
        with ExitStack() as observers:
            for observer in self.run_observers:
                observers.enter_context(observer(run))
            yield

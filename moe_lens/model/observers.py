"""Who wants to know that a run begins and ends, and what it is a run of.

A hook sees one value at one point. What acts on positions also needs to know which tokens are real and which layers
will run, before the first of them does, and to be asked at the end whether everything happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """One pass through the model, as it is about to begin.

    Attributes:
        real: which tokens are real.
        first_layer, last_layer: layers first..last-1 run.
        tokens: None where the run begins at a layer, from a residual stream.
        n_past: in a generation, which keeps keys and values, how many columns came before these; None elsewhere.
    """

    real: Bool[Tensor, "batch pos"]
    first_layer: int
    last_layer: int
    tokens: Int[Tensor, "batch pos"] | None
    n_past: int | None = None


RunObserver = Callable[[Run], AbstractContextManager[object]]
"""Entered before the first value is made, left after the last; what it raises stops the run."""


def apart(observer: RunObserver) -> RunObserver:
    """An observer of its own for one of several runs that are under way at a time.

    A function makes a context for each run, and so is taken as it is. A method belongs to something that may keep one
    run's values: that has a method `apart`, which gives the observer for one more run, or is refused.

    Raises:
        RuntimeError: it is a method of something without one.
    """
    owner = getattr(observer, "__self__", None)
    if owner is None:
        return observer
    if not hasattr(owner, "apart"):
        raise RuntimeError(
            f"{type(owner).__name__} follows one run at a time, and batches that go through a model layer by layer are "
            f"under way together; run them one by one, model(tokens)"
        )
    return owner.apart()


class RunObservers(list[RunObserver]):
    """A model's observers. They are of this model: a copy of it, or one that was stored, has none."""

    def __reduce__(self) -> Any:
        return RunObservers, ()


class ObservedModel:
    """A model that tells its observers of each run."""

    run_observers: RunObservers
    current_run: Run | None = None
    """What is running now, for hooks that need to know more than a value."""

    @contextmanager
    def observed(self, run: Run) -> Iterator[None]:
        """The run happens inside of this."""
        before, self.current_run = self.current_run, run
        try:
            with ExitStack() as observers:
                for observer in list(self.run_observers):
                    observers.enter_context(observer(run))
                yield
        finally:
            self.current_run = before

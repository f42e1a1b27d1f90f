"""A router's own code, watched and run again with something else put in its place.

Routers differ by family: softmax or sigmoid, biases that only choose, groups, soft caps, scalings. None of it is
written down here again. `run_traced` lists the torch operations of a router's forward; `RouterTrace` finds among them
the one that made the logits and the one that made the choice, and what follows from each; `run_again` runs the same
forward with those operations' results replaced. What the choice does not follow from cannot re-route, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The same numbers in another shape: what leads from the operation that made the logits to what a router returns.
_RESHAPES = (Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten)
_PROBABILITIES = (
    torch.softmax,
    torch.nn.functional.softmax,
    Tensor.softmax,
    torch.sigmoid,
    Tensor.sigmoid,
    torch.nn.functional.sigmoid,
)
_TOP_K = (torch.topk, Tensor.topk)


class RouterNotUnderstood(NotImplementedError):
    """A router whose code does not allow what was asked of it."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch function. It keeps its tensors, so that no other one gets their identity."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @cached_property
    def inputs(self) -> set[int]:
        """Identities of the tensors that go in."""
        return {id(tensor) for tensor in _tensors((self.args, tuple(self.kwargs.values())))}

    @cached_property
    def outputs(self) -> set[int]:
        """Identities of the tensors that come out, or are changed in place."""
        changed = self.args[:1] if self.function in (Tensor.__setitem__,) else ()
        return {id(tensor) for tensor in _tensors((self.output, changed))}

    @property
    def is_in_place(self) -> bool:
        name = getattr(self.function, "__name__", "")
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


class _Record(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations.append(Operation(func, args, kwargs or {}, output))
        return output


class _Replace(TorchFunctionMode):
    def __init__(self, replacements: Mapping[int, Callable[[Operation], Any]]) -> None:
        super().__init__()
        self.replacements = replacements
        self.n_operations = 0
        self.n_replaced = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replace = self.replacements.get(self.n_operations)
        self.n_operations += 1
        output = func(*args, **(kwargs or {}))
        if replace is None:
            return output
        self.n_replaced += 1
        return replace(Operation(func, args, kwargs or {}, output))


def run_traced(router: Callable[..., Any], name: str, args: Any, kwargs: Any) -> tuple[Any, RouterTrace]:
    """Run a router's forward, and list the torch operations in it.

    Args:
        router: its forward.
        name: of its class and layer, for messages.
        args, kwargs: what it is called with.

    Returns:
        What it returns, and the trace.

    Raises:
        RouterNotUnderstood: it does not return (logits, weights, indices, ...).
    """
    with _Record() as record:
        returned = router(*args, **kwargs)
    return returned, RouterTrace(name, record.operations, returned)


class RouterTrace:
    """The operations of one run of a router, and where among them logits and choice are made.

    Attributes:
        logits: what the choice is made from, one column for each expert: what the router returns as its logits,
            or, where it returns their probabilities, what those are made of.
        weights, indices: as it returns them.
    """

    def __init__(self, name: str, operations: list[Operation], returned: Any):
        self.name = name
        self.operations = operations
        self.logits, self.weights, self.indices = _logits_weights_indices(name, returned)
        # From what is shown back to the operation that made it: how each step is undone for an edit.
        self._steps: list[Operation] = []
        self._logits_at, self.logits = self._find_logits(self.logits)
        self._indices_at = self._producer(self.indices)

    def _producer(self, tensor: Tensor) -> int | None:
        """Which operation made a tensor as it now is: the last that changed it in place, else the first to give it
        (a cast that has nothing to do gives back what it got)."""
        giving = [i for i, op in enumerate(self.operations) if id(tensor) in op.outputs]
        changing = [i for i in giving if self.operations[i].is_in_place]
        return changing[-1] if changing else giving[0] if giving else None

    def _find_logits(self, returned: Tensor) -> tuple[int | None, Tensor]:
        shown = tensor = returned
        while (at := self._producer(tensor)) is not None:
            op = self.operations[at]
            if op.function in _PROBABILITIES:
                shown, self._steps = op.args[0], []
            elif op.function in _RESHAPES or op.function is Tensor.__getitem__:
                self._steps.append(op)
            else:
                return at, shown
            tensor = op.args[0]
        return None, shown

    def _follows(self, at: int) -> set[int]:
        """Identities of the tensors that an operation's results reach."""
        op = self.operations[at]
        reached = {*op.outputs}
        for later in self.operations[at + 1 :]:
            if later.inputs & reached:
                reached |= later.outputs
        return reached

    @cached_property
    def why_logits_are_fixed(self) -> str | None:
        """Why an edit of the logits cannot re-route, or None where it does."""
        if self._logits_at is None:
            return "its logits are made by no torch operation in its forward"
        reached = self._follows(self._logits_at)
        if id(self.indices) not in reached:
            return "its choice of experts does not follow from its logits"
        if id(self.weights) not in reached:
            return "its routing weights do not follow from its logits"
        return None

    @cached_property
    def why_indices_are_fixed(self) -> str | None:
        """Why a forced choice gets no weights of its own, or None where it does."""
        if self._indices_at is None:
            return "its choice is made by no torch operation in its forward"
        if id(self.weights) not in self._follows(self._indices_at):
            return "its routing weights are not read for the experts that it returns"
        return None

    @cached_property
    def _top_values_are_used(self) -> bool:
        """Whether the weights are made of the top-k's values, rather than read for its indices."""
        assert self._indices_at is not None
        values = self.operations[self._indices_at].output[0]
        later = self.operations[self._indices_at + 1 :]
        return values is self.weights or any(id(values) in op.inputs for op in later)

    def run_again(
        self,
        router: Callable[..., Any],
        args: Any,
        kwargs: Any,
        logits: Float[Tensor, "*token expert"] | None,
        indices: Int[Tensor, "*token k"] | None,
    ) -> Any:
        """The router's forward with these logits, or with this choice, or both.

        Args:
            router, args, kwargs: as for `run_traced`; the module must be in eval mode.
            logits: of the shape of `self.logits`; None leaves them.
            indices: of the shape of `self.indices`, but for the number of slots; None leaves the choice to the router.

        Returns:
            What it returns.

        Raises:
            RouterNotUnderstood: the router does not allow it, said by name.
        """
        replacements: dict[int, Callable[[Operation], Any]] = {}
        if logits is not None:
            if self.why_logits_are_fixed is not None:
                raise RouterNotUnderstood(
                    f"{self.name}: its logits can be read but not edited: {self.why_logits_are_fixed}"
                )
            assert self._logits_at is not None
            replacements[self._logits_at] = lambda op: self._as_made(op, logits)
        if indices is not None:
            if self.why_indices_are_fixed is not None:
                raise RouterNotUnderstood(
                    f"{self.name}: the chosen experts can be read but not edited: {self.why_indices_are_fixed}"
                )
            assert self._indices_at is not None
            replacements[self._indices_at] = lambda op: self._with_choice(op, indices)
        with _Replace(replacements) as replace:
            returned = router(*args, **kwargs)
        if replace.n_replaced != len(replacements):
            raise RouterNotUnderstood(
                f"{self.name}: it ran other operations the second time, so no edit went in"
            )
        return returned

    def _as_made(self, op: Operation, shown: Tensor) -> Tensor:
        """Edited logits in the form in which the operation makes them: slices and shapes undone."""
        forms = [op.output]
        for step in reversed(self._steps):
            forms.append(step.function(forms[-1], *step.args[1:], **step.kwargs))
        edited = shown.reshape(forms[-1].shape)
        for step, whole in zip(self._steps, reversed(forms[:-1]), strict=True):
            if step.function is Tensor.__getitem__:
                # The columns that are not experts' stay as they are.
                around = whole.clone()
                around[step.args[1]] = edited
                edited = around
            else:
                edited = edited.reshape(whole.shape)
        return edited

    def _with_choice(self, op: Operation, indices: Tensor) -> Any:
        """The choosing operation's result for another choice; for a top-k, with the values of what is chosen."""
        if op.function not in _TOP_K:
            return indices.reshape(*op.output.shape[:-1], indices.shape[-1])
        scores = op.args[0]
        indices = indices.reshape(*scores.shape[:-1], indices.shape[-1])
        values = scores.gather(-1, indices)
        if self._top_values_are_used and bool(((values == 0) | values.isneginf()).any()):
            token, slot = ((values == 0) | values.isneginf()).flatten(0, -2).nonzero()[0].tolist()
            raise RouterNotUnderstood(
                f"{self.name}: expert {int(indices.flatten(0, -2)[token, slot])} cannot be forced at token {token}: "
                f"its score is masked there (its group is not among the best), so that it has no weight"
            )
        return torch.return_types.topk((values, indices))  # type: ignore[attr-defined]


def _logits_weights_indices(name: str, returned: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The three things that every router of transformers returns first."""
    if (
        isinstance(returned, tuple)
        and len(returned) >= 3
        and all(isinstance(x, Tensor) for x in returned[:3])
    ):
        logits, weights, indices = returned[:3]
        if weights.is_floating_point() and not indices.is_floating_point() and weights.shape == indices.shape:
            return logits, weights, indices
    got = (
        [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in returned]
        if isinstance(returned, tuple)
        else type(returned).__name__
    )
    raise RouterNotUnderstood(
        f"{name} returns {got}; it must return router logits, routing weights [token, k] and expert indices [token, k]"
    )

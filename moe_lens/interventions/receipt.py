"""What an intervention was asked to do, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from moe_lens.interventions.spec_base import Spec


class UnfiredIntervention(RuntimeError):
    """An intervention did not do all that it was asked for, or nothing."""


@dataclass
class Fired:
    """One spec at one layer, over all runs.

    Attributes:
        asked: how many (token, layer, expert) it was to change; (token, layer) for what changes a token's whole choice
            (`TopK`, `SwapRanks`) or a router's logits there (`RouterOnly`). A forced expert was to be in the choice.
        fired: how many it changed, counted where the change is made.
    """

    spec: Spec
    layer: int
    asked: int = 0
    fired: int = 0


Counts = tuple[int, dict[tuple[int, int], tuple[int, int]]]


@dataclass(repr=False)
class Receipt:
    """A line for every spec and layer; `print` it, or `to_frame()`.

    Attributes:
        specs: what was applied.
        lines: what was asked for and what fired, by (index of the spec, layer).
        n_runs: forward passes that it counts. One that raised is none.
    """

    specs: Sequence[Spec]
    lines: dict[tuple[int, int], Fired] = field(default_factory=dict)
    n_runs: int = 0

    @property
    def asked(self) -> int:
        """How many changes were asked for, over all lines."""
        return sum(line.asked for line in self.lines.values())

    @property
    def fired(self) -> int:
        """How many changes happened, over all lines."""
        return sum(line.fired for line in self.lines.values())

    def expect(self, layers: Mapping[int, Sequence[int]]) -> None:
        """Make an empty line for each layer of each spec, by its index."""
        for index, of_spec in layers.items():
            for layer in of_spec:
                self.add(index, layer)

    def add(self, index: int, layer: int, *, asked: int = 0, fired: int = 0) -> None:
        """Count one event of the index-th spec at a layer."""
        line = self.lines.setdefault((index, layer), Fired(self.specs[index], layer))
        line.asked += asked
        line.fired += fired

    def add_all(self, other: Receipt) -> None:
        """Count what another receipt of the same specs has counted."""
        self.n_runs += other.n_runs
        for (index, layer), line in other.lines.items():
            self.add(index, layer, asked=line.asked, fired=line.fired)

    def counts(self) -> Counts:
        """All that it has counted, to go back to with `restore`."""
        return self.n_runs, {key: (line.asked, line.fired) for key, line in self.lines.items()}

    def restore(self, counts: Counts) -> None:
        """Forget what was counted since."""
        self.n_runs, lines = counts
        for key, line in self.lines.items():
            line.asked, line.fired = lines.get(key, (0, 0))

    def check(self) -> None:
        """Raise unless everything happened.

        Raises:
            UnfiredIntervention: no run was made, or a line where asked and fired differ.
        """
        if self.n_runs == 0:
            raise UnfiredIntervention(f"no forward pass was run with {', '.join(map(str, self.specs))}")
        for line in self.lines.values():
            if line.asked != line.fired:
                raise UnfiredIntervention(
                    f"{line.spec} at layer {line.layer}: {line.asked} changes were asked for, and {line.fired} fired"
                )

    def to_frame(self) -> pd.DataFrame:
        """Columns `intervention`, `layer`, `asked`, `fired`; a row for each spec and layer."""
        rows = [(str(line.spec), line.layer, line.asked, line.fired) for line in self.lines.values()]
        return pd.DataFrame(rows, columns=["intervention", "layer", "asked", "fired"])

    def __str__(self) -> str:
        passes = f"{self.n_runs} forward pass{'' if self.n_runs == 1 else 'es'}"
        lines = [f"{self.fired} of {self.asked} changes fired in {passes}"]
        lines += [
            f"  layer {line.layer}: {line.fired} of {line.asked}  {line.spec}" for line in self.lines.values()
        ]
        return "\n".join(lines)

    __repr__ = __str__

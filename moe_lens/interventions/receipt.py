"""What an intervention was asked to do, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from moe_lens.interventions.spec import Spec


class UnfiredIntervention(RuntimeError):
    """An intervention did not do all that it was asked for, or nothing."""


@dataclass
class Fired:
    """One spec at one layer, over all runs.

    Attributes:
        asked: how many (token, layer, expert) it was to change; (token, layer) for what changes a token's whole choice.
        fired: how many it changed, counted where the change is made.
    """

    spec: Spec
    layer: int
    asked: int = 0
    fired: int = 0


@dataclass
class Receipt:
    """A line for every spec and layer; `print` it, or `to_frame()`.

    Attributes:
        specs: what was applied.
        lines: what was asked for and what fired, by (index of the spec, layer).
        n_runs: forward passes that it counts.
    """

    specs: Sequence[Spec]
    lines: dict[tuple[int, int], Fired] = field(default_factory=dict)
    n_runs: int = 0

    @property
    def asked(self) -> int:
        return sum(line.asked for line in self.lines.values())

    @property
    def fired(self) -> int:
        return sum(line.fired for line in self.lines.values())

    def add(self, index: int, layer: int, *, asked: int = 0, fired: int = 0) -> None:
        """Count one event of the index-th spec at a layer."""
        line = self.lines.setdefault((index, layer), Fired(self.specs[index], layer))
        line.asked += asked
        line.fired += fired

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
        """Columns `intervention`, `layer`, `asked`, `fired`."""
        rows = [(str(line.spec), line.layer, line.asked, line.fired) for line in self.lines.values()]
        return pd.DataFrame(rows, columns=["intervention", "layer", "asked", "fired"])

    def __str__(self) -> str:
        lines = [f"{self.fired} of {self.asked} changes fired in {self.n_runs} forward pass(es)"]
        lines += [
            f"  layer {line.layer}: {line.fired} of {line.asked}  {line.spec}" for line in self.lines.values()
        ]
        return "\n".join(lines)

"""Who writes into the residual stream before a router or the unembedding reads it, at each granularity.

The stream is a sum of *components*: the embedding, each attention layer and each MoE or dense layer.

    hook_resid_mid of r       =  embed  +  A0 + M0  +  A1 + M1  +  ...  +  A_r
    the last hook_resid_post  =  the same of the last layer  +  its M

A *granularity* (`by=`) divides one kind of component into finer senders and leaves the others whole, so that
the senders of every granularity sum to the same stream:

    by        divides                          into                                        names
    layer     nothing                                                                      embed A3 M3
    head      attention layers                 heads, and the output bias if there is one  A3H5 A3bias
    source    attention layers                 (head, source token) pairs, output bias     A3H5<-17 A3H5<-q-4
    expert    MoE layers                       routed experts and the shared ones          M1E9 M1S
    neuron    MoE and dense layers             neurons of those                            M1E9N40 M1SN40 M0N12

A `SenderGroup` is what one component divides into; `Senders` are all groups in the order in which the stream
adds them. A granularity of a large model has millions of senders: names are made when they are asked for.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from operator import eq
from typing import Literal, overload

from moe_lens.config import MoEConfig

Granularity = Literal["layer", "head", "source", "expert", "neuron"]
SourceAxis = Literal["position", "offset"]
Kind = Literal["whole", "heads", "sources", "experts", "neurons", "dense neurons"]

GRANULARITIES: tuple[Granularity, ...] = ("layer", "head", "source", "expert", "neuron")
SOURCE_AXES: dict[SourceAxis, str] = {"position": "<-", "offset": "<-q-"}
"""How the names of source senders go on: by the source's position, or by its distance from the query."""

ROUNDING = "rounding"
"""The sender that is the stream that is read minus all others: what the stream lost at its additions."""


@dataclass(frozen=True)
class Names:
    """The names `prefix`, or `prefix H0`, `prefix H1`, ... along one or more labelled axes, the last fastest."""

    prefix: str
    axes: tuple[tuple[str, int], ...] = ()

    @property
    def count(self) -> int:
        return prod(length for _, length in self.axes)

    def coordinates(self, index: int) -> dict[str, int]:
        """Label to place along that axis, for the index-th name."""
        places: dict[str, int] = {}
        for label, length in reversed(self.axes):
            index, places[label] = divmod(index, length)
        return dict(reversed(places.items()))

    def name(self, index: int) -> str:
        return self.prefix + "".join(f"{label}{place}" for label, place in self.coordinates(index).items())

    def find(self, name: str) -> int | None:
        """The index of a name, or None where it is not one of these."""
        pattern = re.escape(self.prefix) + "".join(
            rf"{re.escape(label)}(0|[1-9]\d*)" for label, _ in self.axes
        )
        match = re.fullmatch(pattern, name)
        if match is None:
            return None
        index = 0
        for place, (_, length) in zip(map(int, match.groups()), self.axes, strict=True):
            if place >= length:
                return None
            index = index * length + place
        return index


@dataclass(frozen=True)
class SenderGroup:
    """What one component divides into at a granularity.

    Attributes:
        component: `embed`, `A3`, `M3`, or `rounding`.
        layer: the component's; None for `embed` and `rounding`.
        kind: what its senders are.
        names: theirs, in order: one run of names, or two (heads and the output bias, say).
    """

    component: str
    layer: int | None
    kind: Kind
    names: tuple[Names, ...]

    def __len__(self) -> int:
        return sum(run.count for run in self.names)

    @property
    def written_at(self) -> str:
        """The hook point at which the whole component has been written."""
        if self.layer is None:
            return "hook_embed"
        return f"blocks.{self.layer}.hook_{'attn' if self.component.startswith('A') else 'mlp'}_out"


class Senders(Sequence[str]):
    """All senders of a granularity, as a sequence of their names; `groups` says how they hang together."""

    def __init__(self, groups: Sequence[SenderGroup]):
        self.groups = tuple(groups)
        self._starts = [0, *accumulate(map(len, self.groups))]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        run, place = self._run(index)
        return run.name(place)

    def __iter__(self) -> Iterator[str]:
        return (run.name(i) for group in self.groups for run in group.names for i in range(run.count))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Senders):
            return self.groups == other.groups
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    # Equal to any sequence of the same names, and so without a hash of its own.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = list(self[: min(len(self), 4)])
        return f"<{len(self)} senders: {', '.join(shown)}{', ...' if len(self) > 4 else ''}>"

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """The place of a sender, between `start` and `stop` where they are given.

        Raises:
            ValueError: there is no such sender; some that there are, are named.
        """
        offset = 0
        for run in (run for group in self.groups for run in group.names):
            place = run.find(value)
            if place is not None and offset + place in range(len(self))[start:stop]:
                return offset + place
            offset += run.count
        raise ValueError(f"there is no sender {value!r}; there are {self._examples}")

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and any(
            run.find(value) is not None for group in self.groups for run in group.names
        )

    def slice_of(self, component: str) -> slice:
        """Where the senders of a component lie.

        Raises:
            ValueError: there is no such component; those there are, are listed.
        """
        for i, group in enumerate(self.groups):
            if group.component == component:
                return slice(self._starts[i], self._starts[i + 1])
        components = ", ".join(group.component for group in self.groups)
        raise ValueError(f"there is no component {component!r}; there are {components}")

    def group_of(self, index: int) -> SenderGroup:
        """The group of the index-th sender."""
        return self.groups[bisect_right(self._starts, range(len(self))[index]) - 1]

    def coordinates(self, index: int) -> dict[str, int]:
        """Where the index-th sender lies within its component: `{"H": 5}` for `A3H5`; empty for a whole one."""
        run, place = self._run(index)
        return run.coordinates(place)

    def _run(self, index: int) -> tuple[Names, int]:
        index = range(len(self))[index]
        group = bisect_right(self._starts, index) - 1
        place = index - self._starts[group]
        for run in self.groups[group].names:
            if place < run.count:
                return run, place
            place -= run.count
        raise AssertionError("a group is as long as its runs")

    @cached_property
    def _examples(self) -> str:
        firsts = [run.name(0) for group in self.groups for run in group.names if run.count]
        return ", ".join(firsts if len(firsts) <= 12 else [*firsts[:11], "..."])


def check_granularity(by: str) -> Granularity:
    """A granularity, after its name was found to be one.

    Raises:
        ValueError: it is none; those there are, are listed.
    """
    for granularity in GRANULARITIES:
        if by == granularity:
            return granularity
    raise ValueError(f"by={by!r} is no granularity; available: {', '.join(map(repr, GRANULARITIES))}")


def senders_before(
    cfg: MoEConfig,
    receiver: int,
    by: str = "layer",
    *,
    n_sources: int = 0,
    source_axis: SourceAxis = "position",
) -> Senders:
    """The senders whose sum the router of layer `receiver` reads, in the order in which they are added.

    Args:
        receiver: a layer.
        by: the granularity.
        n_sources: for `by="source"`, how many source positions (or distances) each head has.
        source_axis: for `by="source"`, what names a source: its position, or its distance from the query.

    Raises:
        ValueError: an unknown granularity or source axis.
    """
    granularity = check_granularity(by)
    if source_axis not in SOURCE_AXES:
        raise ValueError(f"source_axis={source_axis!r} must be one of {', '.join(map(repr, SOURCE_AXES))}")
    groups = [SenderGroup("embed", None, "whole", (Names("embed"),))]
    for layer in range(receiver + 1):
        groups.append(_attention_group(cfg, layer, granularity, n_sources, SOURCE_AXES[source_axis]))
        if layer < receiver:
            groups.append(_mlp_group(cfg, layer, granularity))
    return Senders(groups)


def senders_of_all(
    cfg: MoEConfig, by: str = "layer", *, n_sources: int = 0, source_axis: SourceAxis = "position"
) -> Senders:
    """The senders whose sum the final norm reads, in the order in which they are added: all that there are.

    Args:
        by, n_sources, source_axis: see `senders_before`.

    Raises:
        ValueError: an unknown granularity or source axis.
    """
    last = cfg.n_layers - 1
    before = senders_before(cfg, last, by, n_sources=n_sources, source_axis=source_axis)
    return Senders([*before.groups, _mlp_group(cfg, last, check_granularity(by))])


def _attention_group(
    cfg: MoEConfig, layer: int, by: Granularity, n_sources: int, source_label: str
) -> SenderGroup:
    name = f"A{layer}"
    bias = (Names(f"{name}bias"),) if cfg.attention.output_bias else ()
    heads = ("H", cfg.attention.n_heads)
    if by == "head":
        return SenderGroup(name, layer, "heads", (Names(name, (heads,)), *bias))
    if by == "source":
        return SenderGroup(name, layer, "sources", (Names(name, (heads, (source_label, n_sources))), *bias))
    return SenderGroup(name, layer, "whole", (Names(name),))


def _mlp_group(cfg: MoEConfig, layer: int, by: Granularity) -> SenderGroup:
    name, has_experts, shared = f"M{layer}", layer in cfg.moe_layers, cfg.shared
    if by == "expert" and has_experts:
        runs = (Names(name, (("E", cfg.n_experts),)), *((Names(f"{name}S"),) if shared else ()))
        return SenderGroup(name, layer, "experts", runs)
    if by == "neuron" and has_experts:
        routed = Names(name, (("E", cfg.n_experts), ("N", cfg.d_expert)))
        runs = (routed, *((Names(f"{name}S", (("N", shared.d_shared),)),) if shared else ()))
        return SenderGroup(name, layer, "neurons", runs)
    if by == "neuron":
        return SenderGroup(name, layer, "dense neurons", (Names(name, (("N", cfg.d_mlp),)),))
    return SenderGroup(name, layer, "whole", (Names(name),))

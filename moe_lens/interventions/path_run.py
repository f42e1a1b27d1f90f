"""The clean run of a path patching, and how a change goes on from a sender to the receivers.

See `path_patching.py` for the rules. Everything happens at chosen places (a row and a column), each of which goes on
by itself, as a sequence of one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.path_senders import LOGITS, Points, Sender, receiver_depth
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE

Freeze = Literal["attention", "routing", "all"]
FREEZES: tuple[Freeze, ...] = ("attention", "routing", "all")


def values_at(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    at: Bool[Tensor, "batch pos"],
    names: Sequence[str],
    stop: int | None,
) -> tuple[Points, Tensor]:
    """Run the model up to a layer and keep hook values at some places; and what the run gives: the logits where it
    went to the end."""
    points: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        points[hook.name or ""] = value[at]

    hooks = [(name, keep) for name in names]
    out = model.run_with_hooks(tokens, attention_mask=mask, stop_at_layer=stop, fwd_hooks=hooks)
    return points, out


class Batch(NamedTuple):
    """Senders of one component, and the places where what it writes differs because of them, one sender after another.

    Attributes:
        component: whose output is replaced.
        senders: places in the list of all senders.
        places: of each sender.
        written: what the component writes there.
    """

    component: Sender
    senders: list[int]
    places: list[Int[Tensor, " changed"]]
    written: list[Float[Tensor, "changed d_model"]]

    @property
    def n_pairs(self) -> int:
        return sum(map(len, self.places))

    def apart(self, read: dict[str, Tensor]) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Each sender's place in the list, the places where it differs, and what the receivers make of it there."""
        lengths = [len(places) for places in self.places]
        split = {name: values.split(lengths) for name, values in read.items()}
        for i, (sender, places) in enumerate(zip(self.senders, self.places, strict=True)):
            yield sender, places, {name: values[i] for name, values in split.items()}


def batches(clean: CleanPaths, corrupted: Points, senders: Sequence[Sender], at_once: int) -> Iterator[Batch]:
    """Senders of one component that come after each other, together while they are few."""
    batch: Batch | None = None
    for index, sender in enumerate(senders):
        written = sender.replaced(clean.model, clean.points, corrupted)
        places = (written != clean.points[sender.written_at]).any(dim=-1).nonzero()[:, 0]
        if batch is not None and (
            sender.component != batch.component.component or batch.n_pairs + len(places) > at_once
        ):
            yield batch
            batch = None
        if batch is None:
            batch = Batch(sender, [], [], [])
        batch.senders.append(index)
        batch.places.append(places)
        batch.written.append(written[places])
    if batch is not None:
        yield batch


@dataclass(frozen=True, eq=False)
class CleanPaths:
    """The clean run at the places where senders are replaced, and the way from there to the receivers.

    Attributes:
        at: those places.
        points: values of hook points there, `[point, ...]`.
        logits: everywhere; None where they are no receiver.
    """

    model: HookedMoE
    receivers: tuple[str, ...]
    freeze: Freeze
    at: Bool[Tensor, "batch pos"]
    points: Points
    logits: Float[Tensor, "batch pos d_vocab"] | None

    @classmethod
    def of(
        cls,
        model: HookedMoE,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None,
        at: Bool[Tensor, "batch pos"],
        receivers: tuple[str, ...],
        freeze: Freeze,
        senders: Sequence[Sender],
    ) -> CleanPaths:
        layers = range(model.cfg.n_layers if LOGITS in receivers else _last_router(receivers) + 1)
        held = [f"blocks.{layer}.hook_attn_out" for layer in layers]
        if freeze == "all":
            held += [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        if freeze == "routing":
            held += [name for layer in layers if layer in model.cfg.moe_layers for name in _routing_of(layer)]
        needed = [name for sender in senders for name in (sender.written_at, *sender.parts)]
        read = [router_logits_of(receiver) for receiver in receivers if receiver != LOGITS]
        before = [_stream_before(sender) for sender in senders if sender.kind != "embed"]
        names = list(dict.fromkeys(["hook_embed", *held, *needed, *before, *read]))
        stop = None if LOGITS in receivers else len(layers)
        points, out = values_at(model, tokens, mask, at, names, stop)
        return cls(model, receivers, freeze, at, points, out if LOGITS in receivers else None)

    def follow(self, batch: Batch, at_once: int) -> dict[str, Float[Tensor, "pair output"]]:
        """What the receivers that come after the batch's component make of what it writes."""
        written, places = torch.cat(batch.written), torch.cat(batch.places)
        parts = [
            self._follow(batch.component, some, where)
            for some, where in zip(written.split(at_once), places.split(at_once), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _follow(
        self, sender: Sender, written: Float[Tensor, "pair d_model"], places: Int[Tensor, " pair"]
    ) -> dict[str, Float[Tensor, "pair output"]]:
        model, reached = self.model, self._reached(sender)
        to_logits = LOGITS in reached
        last = model.cfg.n_layers - 1 if to_logits else _last_router(reached)
        # The first layer whose MLP is still to run.
        first = sender.layer + (0 if sender.in_attention else 1)
        stream = written if sender.kind == "embed" else self.points[_stream_before(sender)][places] + written
        read: dict[str, Tensor] = {}
        runs_mlp = range(first, last + 1 if to_logits else last)
        with self._held_routing(runs_mlp, places):
            for layer in range(first, last + 1):
                block: Any = model.blocks[layer]
                if not (sender.in_attention and layer == first):
                    stream = stream + self.points[f"blocks.{layer}.hook_attn_out"][places]
                if f"M{layer}" in reached:
                    read[f"M{layer}"] = block.mlp.router(block.ln2(stream[:, None]))[:, 0].float()
                if layer not in runs_mlp:
                    break
                if self.freeze == "all":
                    stream = stream + self.points[f"blocks.{layer}.hook_mlp_out"][places]
                else:
                    stream = stream + block.mlp(block.ln2(stream[:, None]))[:, 0]
        if to_logits:
            read[LOGITS] = model.unembed(model.ln_final(stream[:, None]))[:, 0]
        return read

    def _reached(self, sender: Sender) -> list[str]:
        return [receiver for receiver in self.receivers if sender.depth < receiver_depth(receiver)]

    @contextmanager
    def _held_routing(self, layers: range, places: Int[Tensor, " pair"]) -> Iterator[None]:
        """While open, the MoE layers' choice and weights are the clean ones, if that is the rule.

        Raises:
            RuntimeError: on leaving, when a layer did not ask for them exactly once.
        """
        routed = [layer for layer in layers if layer in self.model.cfg.moe_layers]
        if self.freeze != "routing" or not routed:
            yield
            return
        asked: list[str] = []

        def give(value: Tensor, hook: HookPoint) -> Tensor:
            assert hook.name is not None
            asked.append(hook.name)
            return self.points[hook.name][places][:, None]

        names = [name for layer in routed for name in _routing_of(layer)]
        with self.model.hooks([(name, give) for name in names]):
            yield
        if sorted(asked) != sorted(names):
            raise RuntimeError(f"routing was to be held at {names}, each once, and was at {asked}")

    def null_change(self, at_once: int) -> float:
        """The largest change of any receiver's value when the embedding is replaced by itself: rounding alone."""
        embed = Sender("embed", "embed", -1)
        n = len(self.points["hook_embed"])
        everywhere = torch.arange(n, device=self.at.device)
        read = self.follow(Batch(embed, [0], [everywhere], [self.points["hook_embed"]]), at_once)
        return max(float((values - self.value(name)).abs().max()) for name, values in read.items())

    def value(self, receiver: str) -> Float[Tensor, "point output"]:
        """What the receiver was in the clean run, at the places."""
        if receiver != LOGITS:
            return self.points[router_logits_of(receiver)].float()
        assert self.logits is not None
        return self.logits[self.at]


def _routing_of(layer: int) -> tuple[str, str]:
    return f"blocks.{layer}.mlp.hook_expert_indices", f"blocks.{layer}.mlp.hook_routing_weights"


def router_logits_of(receiver: str) -> str:
    return f"blocks.{receiver[1:]}.mlp.hook_router_logits"


def _stream_before(sender: Sender) -> str:
    return f"blocks.{sender.layer}.hook_resid_{'pre' if sender.in_attention else 'mid'}"


def _last_router(receivers: Sequence[str]) -> int:
    return max(int(receiver[1:]) for receiver in receivers if receiver != LOGITS)

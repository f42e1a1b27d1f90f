"""Senders of a path: what their names mean, what they wrote in a run, and their component with another output.

name        sender                             what is replaced
embed       the embedding                      hook_embed
A2H1        a head                             z_h W_O^h, within hook_attn_out
A2          an attention layer                 hook_attn_out
M1E9        a routed expert, by identity       g_i E_i(x), zero where it is not active, within hook_mlp_out
M1S         the shared experts of a layer      hook_shared_out, within hook_mlp_out
M1          an MoE or dense layer              hook_mlp_out
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moe_lens.config import MoEConfig
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.writes import attention_of

Kind = Literal["embed", "head", "attention", "expert", "shared", "mlp"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "heads": ("head",),
    "experts": ("expert", "shared"),
    "layers": ("embed", "attention", "mlp"),
}
"""What `senders=` may ask for all of."""

LOGITS = "logits"

_NAME = re.compile(
    r"embed|A(?P<attention>\d+)(H(?P<head>\d+))?|M(?P<mlp>\d+)(E(?P<expert>\d+)|(?P<shared>S))?"
)

Points = Mapping[str, Tensor]
"""Values of hook points at the places that are looked at, `[point, ...]`, by their whole names."""


@dataclass(frozen=True)
class Sender:
    """Attributes:
    name: as in `A2H1`.
    kind: what it is.
    layer: its layer; -1 for the embedding.
    index: of the head or expert; None for the others.
    """

    name: str
    kind: Kind
    layer: int
    index: int | None = None

    @property
    def component(self) -> str:
        """The component that it is, or is a part of: its output is what is replaced in the stream."""
        return "embed" if self.kind == "embed" else f"{'A' if self.in_attention else 'M'}{self.layer}"

    @property
    def in_attention(self) -> bool:
        return self.kind in ("head", "attention")

    @property
    def depth(self) -> int:
        """Its place in the order in which components are added to the stream."""
        return 2 * self.layer + (0 if self.in_attention else 1)

    @property
    def written_at(self) -> str:
        """The hook point of its component's output."""
        if self.kind == "embed":
            return "hook_embed"
        return f"blocks.{self.layer}.hook_{'attn' if self.in_attention else 'mlp'}_out"

    @property
    def parts(self) -> tuple[str, ...]:
        """The hook points that its own output is read from."""
        inside = {
            "head": ("attn.hook_z",),
            "expert": ("mlp.hook_expert_indices", "mlp.hook_expert_contrib"),
            "shared": ("mlp.hook_shared_out",),
        }.get(self.kind)
        return (self.written_at,) if inside is None else tuple(f"blocks.{self.layer}.{p}" for p in inside)

    def replaced(self, model: HookedMoE, clean: Points, corrupted: Points) -> Float[Tensor, "point d_model"]:
        """What its component writes when this sender writes what it did in the corrupted run, and the rest of the
        component what it did in the clean one; the clean output to the last digit where the two are the same."""
        written = clean[self.written_at]
        if self.kind in ("embed", "attention", "mlp"):
            return corrupted[self.written_at].to(written.dtype)
        difference = self._part(corrupted) - self._part(clean)
        if self.kind == "head":
            weight = attention_of(model, self.layer).W_O.detach()[self.index]
            difference = difference @ weight.float()
        return (written.float() + difference).to(written.dtype)

    def _part(self, values: Points) -> Float[Tensor, "point d"]:
        part = values[self.parts[-1]].float()
        if self.kind == "head":
            return part[:, self.index]
        if self.kind == "expert":
            chosen = values[self.parts[0]] == self.index
            # Masked, not multiplied by zero: what another expert wrote may be infinite.
            return part.masked_fill(~chosen[..., None], 0.0).sum(dim=1)
        return part


def receiver_depth(receiver: str) -> int:
    """A sender reaches a receiver when its depth is smaller."""
    return 10**9 if receiver == LOGITS else 2 * int(receiver[1:]) + 1


def senders_of(cfg: MoEConfig, senders: str | Sequence[str], receivers: Sequence[str]) -> tuple[Sender, ...]:
    """The senders that were asked for.

    Args:
        senders: a name, several, or all of a kind: `"heads"`, `"experts"` (with the shared ones), `"layers"`.
        receivers: checked receivers; of all of a kind, those that reach one of these are meant.

    Raises:
        ValueError: no such sender, one that comes twice, or that reaches none of the receivers.
    """
    last = max(map(receiver_depth, receivers))
    if isinstance(senders, str) and senders in KINDS:
        chosen = tuple(s for s in all_senders(cfg) if s.kind in KINDS[senders] and s.depth < last)
        if not chosen:
            raise ValueError(f"there are no {senders} before {' or '.join(receivers)}")
        return chosen
    names = [senders] if isinstance(senders, str) else list(senders)
    if not names:
        raise ValueError("there are no senders: the sequence is empty")
    chosen = tuple(parse_sender(cfg, name) for name in names)
    for place, sender in enumerate(chosen):
        if names.index(sender.name) < place:
            raise ValueError(f"the sender {sender.name} comes twice")
        if sender.depth >= last:
            raise ValueError(
                f"the sender {sender.name} comes after {' and '.join(receivers)}, which it cannot reach"
            )
    return chosen


def parse_sender(cfg: MoEConfig, name: str) -> Sender:
    """The sender of a name.

    Raises:
        ValueError: there is none of that name; what there is, is named.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    sender = None if match is None else _sender(match)
    # By the name that it would have: `A01` is none.
    if sender is None or sender.name != name or not _exists(cfg, sender):
        raise ValueError(
            f"there is no sender {name!r}; {_what_there_is(cfg)}, and all of a kind: {', '.join(map(repr, KINDS))}"
        )
    return sender


def all_senders(cfg: MoEConfig) -> list[Sender]:
    """Every sender of every kind, in the order of the stream."""
    found = [Sender("embed", "embed", -1)]
    for layer in range(cfg.n_layers):
        found.append(Sender(f"A{layer}", "attention", layer))
        found += [Sender(f"A{layer}H{head}", "head", layer, head) for head in range(cfg.attention.n_heads)]
        found.append(Sender(f"M{layer}", "mlp", layer))
        if layer in cfg.moe_layers:
            found += [Sender(f"M{layer}E{e}", "expert", layer, e) for e in range(cfg.n_experts)]
            found += [Sender(f"M{layer}S", "shared", layer)] if cfg.shared else []
    return found


def _sender(match: re.Match[str]) -> Sender:
    attention, head, mlp, expert, shared = (
        match[group] for group in ("attention", "head", "mlp", "expert", "shared")
    )
    if head is not None:
        return Sender(f"A{int(attention)}H{int(head)}", "head", int(attention), int(head))
    if attention is not None:
        return Sender(f"A{int(attention)}", "attention", int(attention))
    if expert is not None:
        return Sender(f"M{int(mlp)}E{int(expert)}", "expert", int(mlp), int(expert))
    if shared is not None:
        return Sender(f"M{int(mlp)}S", "shared", int(mlp))
    return Sender("embed", "embed", -1) if mlp is None else Sender(f"M{int(mlp)}", "mlp", int(mlp))


def _exists(cfg: MoEConfig, sender: Sender) -> bool:
    if sender.layer >= cfg.n_layers:
        return False
    if sender.kind == "head":
        return sender.index in range(cfg.attention.n_heads)
    if sender.kind in ("expert", "shared") and sender.layer not in cfg.moe_layers:
        return False
    if sender.kind == "expert":
        return sender.index in range(cfg.n_experts)
    return sender.kind != "shared" or cfg.shared is not None


def _what_there_is(cfg: MoEConfig) -> str:
    layers, heads = cfg.n_layers - 1, cfg.attention.n_heads - 1
    there = [f"embed, A0..A{layers}, A0H0..A{layers}H{heads}, M0..M{layers}"]
    if cfg.moe_layers:
        low, high = cfg.moe_layers[0], cfg.moe_layers[-1]
        shared = " and MxS" if cfg.shared else ""
        moe = ", ".join(map(str, cfg.moe_layers))
        there.append(f"M{low}E0..M{high}E{cfg.n_experts - 1}{shared} (layers with experts: {moe})")
    return f"{cfg.model_name} has {' and '.join(there)}"

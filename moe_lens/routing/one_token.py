"""Everything that was written into the stream at one token, from one forward pass, to be divided as often as wanted.

At a single token the senders of every granularity fit in memory, so that one pass serves them all: what is kept of it
is each hook point at that position, and the values of all positions, which sources are read from. Senders that are
zero because of what was chosen there are left out: experts (and their neurons) that the token did not choose, and
sources that its query cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import weights_in_memory
from moe_lens.model.moe import MoE
from moe_lens.model.norm import RMSNorm, rms_norm
from moe_lens.routing.arguments import few
from moe_lens.routing.attribution import attribution_hooks
from moe_lens.routing.rank_shift import choice_of
from moe_lens.routing.rounding import StreamSum
from moe_lens.routing.senders import GRANULARITIES, SenderGroup, senders_before
from moe_lens.routing.writes import (
    GroupValues,
    attention_of,
    head_values,
    mlp_of,
    routed_neurons,
    sender_scores,
    shared_neurons,
    written_by,
)


@dataclass(frozen=True, eq=False)
class OneToken:
    """The hook values of one token, up to a router.

    Attributes:
        model: the model that ran; its weights are read when something is divided.
        values: by whole hook name, `[1, 1, ...]` at the token's position; `attn.hook_v` of all positions, and
            `attn.hook_pattern` of this query.
        receiver: the router's layer.
        pos: the column.
        n_columns: of the batch.
        sources: the columns that the query can see: real ones up to itself.
        weights: which weights ran, for `check_weights`.
    """

    model: HookedMoE
    values: dict[str, Tensor]
    receiver: int
    pos: int
    n_columns: int
    sources: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]

    @classmethod
    def run(
        cls,
        model: HookedMoE,
        tokens: Int[Tensor, "one pos"],
        mask: Bool[Tensor, "one pos"] | None,
        receiver: int,
        pos: int,
    ) -> OneToken:
        """Run the layers up to the router's, and keep what every granularity is read from."""
        values: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            assert hook.name is not None
            if not hook.name.endswith("attn.hook_v"):
                value = value.narrow(_axis(hook), pos, 1)
            values[hook.name] = value.detach().clone()

        names: dict[str, None] = {}
        for by in GRANULARITIES:
            names |= dict.fromkeys(attribution_hooks(model, [receiver], by=by))
        names[f"blocks.{receiver}.mlp.hook_expert_indices"] = None
        with torch.no_grad():
            model.run_with_hooks(
                tokens,
                attention_mask=mask,
                stop_at_layer=receiver + 1,
                fwd_hooks=[(name, keep) for name in names],
            )
        real = torch.ones_like(tokens[0], dtype=torch.bool) if mask is None else mask[0]
        sources = tuple(real[: pos + 1].nonzero()[:, 0].tolist())
        return cls(model, values, receiver, pos, tokens.shape[1], sources, _versions(model))

    def check_weights(self) -> None:
        """Raise where the model's weights are no longer those that ran, as far as torch counts their changes.

        Raises:
            ValueError: they were changed in place, or replaced.
        """
        if _versions(self.model) != self.weights:
            raise ValueError(
                "the model's weights have been changed since this was explained, and they would be read again; explain "
                "it anew"
            )

    def at_receiver(self, point: str) -> Tensor:
        """A hook value inside the router's block, without its batch and position axes."""
        return self.values[f"blocks.{self.receiver}.{point}"][0, 0]

    def groups(self, by: str) -> tuple[SenderGroup, ...]:
        """The components before the router, each with its senders at a granularity."""
        return senders_before(self.model.cfg, self.receiver, by, n_sources=self.n_columns).groups

    def group(self, component: str, by: str) -> SenderGroup:
        """One of them, by its component's name."""
        return next(group for group in self.groups(by) if group.component == component)

    # ---- which senders there are here ----

    def _chosen(self, group: SenderGroup) -> tuple[list[int], list[int]]:
        """The experts chosen here, lowest first, and each one's slot."""
        experts = GroupValues(group, self.values).at("hook_expert_indices")[0, 0].tolist()
        slots = sorted(range(len(experts)), key=experts.__getitem__)
        return [experts[slot] for slot in slots], slots

    def _check_pattern(self, group: SenderGroup) -> None:
        """Raise where a hook has given weight to sources that are not listed."""
        unseen = torch.ones(self.n_columns, dtype=torch.bool)
        unseen[list(self.sources)] = False
        weights = GroupValues(group, self.values).at("hook_pattern")[0, :, 0]
        attended = (weights != 0).any(dim=0).cpu() & unseen
        if bool(attended.any()):
            columns = few(attended.nonzero()[:, 0].tolist())
            raise ValueError(
                f"in layer {group.layer} the token at {self.pos} attends to positions {columns}, which come after it "
                f"or are padding: a hook has edited the pattern, and so it cannot be divided by source"
            )

    def present(self, group: SenderGroup) -> list[int]:
        """Which of a group's senders there are at this token, in order."""
        everything = range(len(group))
        n_first = group.names[0].count
        match group.kind:
            case "sources":
                self._check_pattern(group)
                heads = range(n_first // self.n_columns)
                seen = [head * self.n_columns + source for head in heads for source in self.sources]
            case "experts":
                seen = self._chosen(group)[0]
            case "neurons":
                d_expert = self.model.cfg.d_expert
                seen = [e * d_expert + n for e in self._chosen(group)[0] for n in range(d_expert)]
            case _:
                return list(everything)
        return [*seen, *everything[n_first:]]

    def names(self, group: SenderGroup) -> list[str]:
        """The names of `present`."""
        n_first = group.names[0].count
        return [
            group.names[0].name(i) if i < n_first else group.names[1].name(i - n_first)
            for i in self.present(group)
        ]

    # ---- what they score and write ----

    def scores(
        self, group: SenderGroup, readout: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "sender row"]:
        """Each present sender's product with each row of a readout, not yet divided by the scale."""
        if group.kind != "neurons":
            return sender_scores(self.model, group, self.values, readout)[self.present(group), 0, 0]
        with weights_in_memory(self.model, group.layer):
            parts = [
                activation[:, None] * (columns() @ readout.T) for activation, columns in self._neurons(group)
            ]
            return torch.cat(parts)

    def _neurons(
        self, group: SenderGroup
    ) -> list[tuple[Float[Tensor, " neuron"], Callable[[], Float[Tensor, "neuron d_model"]]]]:
        """The neurons of each chosen expert and of the shared ones: what multiplies their columns, and those. Only the
        chosen experts' weights are read, and each one's when asked for."""
        mlp, of = mlp_of(self.model, group.layer), GroupValues(group, self.values)
        assert isinstance(mlp, MoE)
        routed = routed_neurons(of)[0, 0]
        parts = [
            (routed[slot], partial(_float_rows, mlp.experts.W_down, expert))
            for expert, slot in zip(*self._chosen(group), strict=True)
        ]
        if mlp.shared is not None:
            parts.append((shared_neurons(self.model, of)[0, 0], partial(_float_rows, mlp.shared.W_down, ...)))
        return parts

    def vectors(self, group: SenderGroup, senders: Sequence[int]) -> Float[Tensor, "sender d_model"]:
        """What some of a group's senders write, given by their places among the group's present ones."""
        of, wanted = GroupValues(group, self.values), [self.present(group)[i] for i in senders]
        n_first = group.names[0].count
        match group.kind:
            case "whole":
                return self.values[group.written_at][0].float()[wanted]
            case "dense neurons":
                with weights_in_memory(self.model, group.layer):
                    weight = mlp_of(self.model, group.layer).W_down.detach()  # type: ignore[union-attr]
                    return of.at("hook_post")[0, 0, wanted].float()[:, None] * weight[wanted].float()  # type: ignore[index]
            case "experts":
                experts, slots = self._chosen(group)
                slot_of = dict(zip(experts, slots, strict=True))
                contributions = of.at("hook_expert_contrib")[0, 0]
                written = [
                    contributions[slot_of[i]] if i < n_first else of.at("hook_shared_out")[0, 0]
                    for i in wanted
                ]
                return torch.stack(written).float()
            case "neurons":
                with weights_in_memory(self.model, group.layer):
                    return self._neuron_vectors(group, senders)
            case "heads" | "sources":
                attention = attention_of(self.model, group.layer)
                if group.kind == "heads":
                    inner = of.at("hook_z")[0, 0].float()
                    heads = wanted
                else:
                    heads = [i // self.n_columns for i in wanted]
                    values = head_values(attention, of.at("hook_v"))[0]
                    pattern = of.at("hook_pattern")[0, :, 0].float()
                written = []
                with weights_in_memory(self.model, group.layer):
                    for i, head in zip(wanted, heads, strict=True):
                        if i >= n_first:
                            written.append(attention.b_O.detach().float())
                            continue
                        if group.kind == "heads":
                            read = inner[head]
                        else:
                            column = i % self.n_columns
                            read = pattern[head, column] * values[column, head]
                        written.append(read @ attention.W_O[head].detach().float())
                return torch.stack(written)

    def _neuron_vectors(self, group: SenderGroup, senders: Sequence[int]) -> Float[Tensor, "sender d_model"]:
        rows, start, found = torch.tensor(senders), 0, {}
        for activation, columns in self._neurons(group):
            inside = (rows >= start) & (rows < start + len(activation))
            if bool(inside.any()):
                places = (rows[inside] - start).to(activation.device)
                vectors = activation[places, None] * columns()[places]
                found |= dict(zip(rows[inside].tolist(), vectors, strict=True))
            start += len(activation)
        return torch.stack([found[i] for i in senders])

    def written(
        self, group: SenderGroup
    ) -> tuple[Float[Tensor, "one one d_model"], Float[Tensor, "one one d_model"] | None]:
        """See `writes.written_by`; of neurons, only the chosen experts' weights are read."""
        if group.kind != "neurons":
            return written_by(self.model, group, self.values)
        with weights_in_memory(self.model, group.layer):
            outputs = torch.stack([activation @ columns() for activation, columns in self._neurons(group)])
        sizes = 4 * outputs.abs().sum(dim=0) + self.values[group.written_at][0, 0].float().abs()
        return outputs.sum(dim=0)[None, None], sizes[None, None]

    def rounding(self, groups: Sequence[SenderGroup]) -> tuple[Float[Tensor, " d_model"], float]:
        """What the stream at the router holds beyond the senders of these groups, and that over the most that rounding
        can be (`StreamSum.rounding_ratio`)."""
        stream = self.values[f"blocks.{self.receiver}.hook_resid_mid"]
        total = StreamSum(self.written(groups[0])[0], stream.dtype)
        for group in groups[1:]:
            total.add(*self.written(group))
        return total.rounding(stream)[0, 0], total.rounding_ratio(stream)

    # ---- the same router, on another stream ----

    def routed(
        self, streams: Float[Tensor, "stream d_model"]
    ) -> tuple[Float[Tensor, "stream expert"], Bool[Tensor, "stream expert"], Float[Tensor, "stream expert"]]:
        """What the model's own norm and router make of streams at this token, in the model's dtype: logits, which
        experts are chosen, and weights as applied, 0 for the others. Both act on each token by itself, so no other
        layer need run.

        No hook point is passed: the streams stand where positions would, and a hook that edits one position would act
        on one of the streams. So hooks that the model carries do not act here.
        """
        block, router = self.model.blocks[self.receiver], self.model.cfg.router
        mlp, norm = block.mlp, block.ln2
        assert isinstance(mlp, MoE)
        assert isinstance(norm, RMSNorm)
        with torch.no_grad():
            x = rms_norm(streams.to(self.model.cfg.dtype)[None], norm.w, norm.eps)
            logits = mlp.router(x)[0].float()
            chosen, weights, _ = choice_of(logits, router)
        return logits, chosen, weights if router.float32_weights else weights.to(x.dtype).float()


def _versions(model: HookedMoE) -> tuple[tuple[int, int], ...]:
    """Changes whenever torch changes a parameter in place, or another takes its place. Inference tensors count none."""
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in model.parameters())


def _float_rows(weight: Float[Tensor, "*expert neuron d_model"], expert: object) -> Tensor:
    return weight[expert].detach().float()  # type: ignore[index]


def _axis(hook: HookPoint) -> int:
    assert hook.pos_dim is not None
    return hook.pos_dim

"""From a component that has just run to its part in the batch, for each kind of sender.

One `ComponentReader` for each component and granularity of a pass. It keeps what is made once for a checkpoint
(`W_O R^T` of an attention layer, the measures of an MLP's columns), takes the hook values of a batch, and gives the
part, with the sum of its senders' scores for the check that everything sums to the logits. Of the weights themselves
it keeps nothing, and it asks for them only while the component runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.measures import head_lengths, normalised_lengths
from moe_lens.routing.neuron_parts import NeuronColumns, NeuronPart
from moe_lens.routing.parts import Measuring, Part, Readouts, TokenPart, token_chunks
from moe_lens.routing.senders import SenderGroup, SourceAxis
from moe_lens.routing.source_parts import SourcePart
from moe_lens.routing.writes import (
    GroupValues,
    Values,
    attention_of,
    folded_output,
    head_values,
    mlp_of,
    routed_neurons,
    shared_neurons,
    written_by,
)


class Read(NamedTuple):
    """A component's part in a batch, and the sum of its senders' scores: at every token, or, for neurons, at the
    tokens where sums are checked."""

    part: Part
    summed: Float[Tensor, "token receiver expert"]


class ComponentReader:
    """Args:
    model: whose component it is.
    group: the component, and what it divides into.
    first: the first receiver that it reaches.
    readouts: of all receivers of the pass.
    measuring: how scores are measured.
    source_axis, n_sources: for (head, source) senders.
    """

    def __init__(
        self,
        model: HookedMoE,
        group: SenderGroup,
        first: int,
        readouts: Readouts,
        measuring: Measuring,
        *,
        source_axis: SourceAxis,
        n_sources: int,
    ):
        self.model, self.group, self.first = model, group, first
        self.readouts = readouts.later(first)
        self.measuring = measuring
        self.source_axis: SourceAxis = source_axis
        self.n_sources = n_sources
        self._rows = self.readouts.flat
        self._folded_output: Float[Tensor, "head d_value row"] | None = None
        if group.kind in ("neurons", "dense neurons"):
            self._columns = NeuronColumns(mlp_of(model, group.layer), self.readouts)

    @property
    def _folded(self) -> Float[Tensor, "head d_value row"]:
        """`W_O R^T`, made when first asked for."""
        if self._folded_output is None:
            self._folded_output = folded_output(attention_of(self.model, self.group.layer), self._rows)
        return self._folded_output

    def let_go(self) -> None:
        """Drop what can be made again when the layer is in memory again. The table of an MLP's columns, which takes
        longer to make than it takes memory, stays."""
        self._folded_output = None

    def read(self, values: Values, real: Bool[Tensor, "batch pos"], checked: Int[Tensor, " checked"]) -> Read:
        """Args:
        values: the hook values of this component in a batch.
        real: which tokens are.
        checked: the flattened tokens at which sums are checked.
        """
        of = GroupValues(self.group, values)
        match self.group.kind:
            case "whole":
                vectors = values[self.group.written_at].flatten(0, 1)[:, None]
                return self._token_part(vectors, torch.zeros_like(vectors[..., 0], dtype=torch.long))
            case "experts":
                vectors = of.at("hook_expert_contrib").flatten(0, 1)
                senders = of.at("hook_expert_indices").flatten(0, 1)
                if len(self.group.names) == 2:
                    vectors = torch.cat((vectors, of.at("hook_shared_out").flatten(0, 1)[:, None]), dim=1)
                    senders = torch.cat(
                        (senders, torch.full_like(senders[:, :1], len(self.group) - 1)), dim=1
                    )
                return self._token_part(vectors, senders)
            case "heads":
                return self._head_part(of.at("hook_z").flatten(0, 1).float())
            case "sources":
                return self._source_part(of, real)
            case "neurons" | "dense neurons":
                return self._neuron_part(of, checked)

    def _token_part(
        self, vectors: Float[Tensor, "token slot d_model"], senders: Int[Tensor, "token slot"]
    ) -> Read:
        part = TokenPart(len(self.group), self.first, self.measuring)
        tokens = torch.arange(len(vectors), device=vectors.device)
        sums = []
        for chunk in token_chunks(len(vectors), vectors.shape[1] * len(self._rows), vectors.device):
            sent = vectors[chunk].float()
            scores = self.readouts.unflatten(sent @ self._rows.T)
            part.add(tokens[chunk], senders[chunk], scores, normalised_lengths(sent, self.readouts.gains))
            sums.append(scores.sum(dim=1))
        return Read(part, torch.cat(sums))

    def _head_part(self, z: Float[Tensor, "token head d_value"]) -> Read:
        part = TokenPart(len(self.group), self.first, self.measuring)
        tokens = torch.arange(len(z), device=z.device)
        senders = torch.arange(len(self.group), device=z.device)
        attention = attention_of(self.model, self.group.layer)
        sums = []
        for chunk in token_chunks(len(z), len(self.group) * len(self._rows), z.device):
            scores = self.readouts.unflatten(
                einsum(z[chunk], self._folded, "token head d_value, head d_value row -> token head row")
            )
            lengths = head_lengths(attention, z[chunk], self.readouts.gains)
            if (bias := self._bias_measures()) is not None:
                bias_scores, bias_lengths = bias
                n = len(scores)
                scores = torch.cat((scores, bias_scores.expand(n, 1, *bias_scores.shape)), dim=1)
                lengths = torch.cat((lengths, bias_lengths.expand(n, 1, *bias_lengths.shape)), dim=1)
            part.add(tokens[chunk], senders.expand(len(scores), -1), scores, lengths)
            sums.append(scores.sum(dim=1))
        return Read(part, torch.cat(sums))

    def _bias_measures(self) -> tuple[Float[Tensor, "receiver expert"], Float[Tensor, " receiver"]] | None:
        """The output bias' scores and lengths, where there is a bias."""
        if len(self.group.names) == 1:
            return None
        bias = attention_of(self.model, self.group.layer).b_O.detach().float()
        return self.readouts.unflatten(bias @ self._rows.T), normalised_lengths(bias, self.readouts.gains)

    def _source_part(self, of: GroupValues, real: Bool[Tensor, "batch pos"]) -> Read:
        attention = attention_of(self.model, self.group.layer)
        sources, pattern = head_values(attention, of.at("hook_v")), of.at("hook_pattern")
        n_batch = len(sources)
        if not bool(real.all()):
            # What padding holds must not be read: 0 times infinity would be.
            sources = sources.masked_fill(~real[:, :, None, None], 0.0)
            pattern = pattern.masked_fill(~(real[:, None, :, None] & real[:, None, None, :]), 0.0)
        by_source = einsum(sources, self._folded, "b p head d_value, head d_value row -> b p head row")
        lengths = head_lengths(attention, sources.flatten(0, 1), self.readouts.gains)
        bias = self._bias_measures()
        part = SourcePart(
            pattern,
            self.readouts.unflatten(by_source),
            rearrange(lengths, "(b p) head r -> b p head r", b=n_batch),
            bias,
            real,
            self.n_sources,
            self.source_axis,
            self.first,
            self.measuring,
        )
        summed = einsum(pattern.float(), by_source, "b head q p, b p head row -> b q row")
        summed = self.readouts.unflatten(summed.flatten(0, 1))
        return Read(part, summed if bias is None else summed + bias[0])

    def _neuron_part(self, of: GroupValues, checked: Int[Tensor, " checked"]) -> Read:
        routed, always = None, None
        if self.group.kind == "neurons":
            routed = (routed_neurons(of).flatten(0, 1), of.at("hook_expert_indices").flatten(0, 1))
            if len(self.group.names) == 2:
                always = shared_neurons(self.model, of).flatten(0, 1)
        else:
            always = of.at("hook_post").flatten(0, 1).float()
        part = NeuronPart(self._columns, routed, always, self.first, self.measuring)
        if not self.measuring.waits:
            # Now, for it takes the weights, and the part is asked for its sums when they may be on disk.
            _ = self._columns.table
        # A sum over neurons is the down-projection once more, so it is made for the checked tokens alone.
        at_checked = {name: value.flatten(0, 1)[checked][None] for name, value in of.values.items()}
        vector, _ = written_by(self.model, self.group, at_checked)
        return Read(part, self.readouts.unflatten(vector[0] @ self._rows.T))

"""Neurons as senders, without ever making a neuron's scores.

What neuron n of expert i writes at token t is g_i a_n(t) times a weight column. The measures of the column alone, at
every later router, are a table `[measure, receiver, neuron]` that is made once for a checkpoint. With c = g_i a_n,

    variance = c^2 variance_column / s_r^2         norm = |c| norm_column / s_r        mean = c mean_column / s_r
    APS = (max(c, 0) APS_column + max(-c, 0) |ANS_column|) / s_r       ANS likewise, with the two exchanged

so all that a token contributes to a neuron and a receiver is c^2 / s_r^2, max(c, 0) / s_r and max(-c, 0) / s_r.
Summed over the tokens of a document that chose an expert, each of them is a small matrix product, `[receiver, token]`
times `[token, neuron]`.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 11, which
leaves the neurons open.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.model.expert_matmul import group_products
from moe_lens.model.mlp import DenseMLP
from moe_lens.model.moe import MoE
from moe_lens.routing.documents import POSITIONS
from moe_lens.routing.measures import MEASURES, chunk_size, normalised_lengths, score_measures
from moe_lens.routing.parts import DocumentSummer, DocumentSums, Measuring, Readouts, Routed, Rows


class NeuronColumns:
    """The weight columns of an MLP's neurons, routed experts' first and then the shared ones', and their table.

    Weights are read when they are asked for, and not kept: a streamed model's are in memory only while the layer runs.

    Args:
        mlp: whose neurons.
        readouts: the receivers that the layer reaches.
    """

    def __init__(self, mlp: MoE | DenseMLP, readouts: Readouts):
        self.mlp, self.readouts = mlp, readouts
        self.n_routed = mlp.experts.W_down.shape[:2].numel() if isinstance(mlp, MoE) else 0
        always = mlp.shared if isinstance(mlp, MoE) else mlp
        self.n_neurons = self.n_routed + (0 if always is None else always.W_down.shape[0])
        self._table: Float[Tensor, "measure receiver neuron"] | None = None

    @property
    def runs(self) -> list[Float[Tensor, "neuron d_model"]]:
        """The columns of the routed experts, and those of the shared experts or of the dense layer."""
        if not isinstance(self.mlp, MoE):
            return [self.mlp.W_down.detach()]
        shared = [] if self.mlp.shared is None else [self.mlp.shared.W_down.detach()]
        return [self.mlp.experts.W_down.detach().flatten(0, 1), *shared]

    @property
    def table(self) -> Float[Tensor, "measure receiver neuron"]:
        """Every column's measures at every receiver, for a scale of 1; made when first asked for."""
        if self._table is None:
            n_receivers, n_experts, _ = self.readouts.rows.shape
            step = max(1, chunk_size(self.readouts.rows.device) // (n_receivers * n_experts))
            self._table = torch.empty(
                len(MEASURES), n_receivers, self.n_neurons, device=self.readouts.rows.device
            )
            start = 0
            for run in self.runs:
                for columns in run.split(step):
                    columns = columns.float()
                    scores = self.readouts.unflatten(columns @ self.readouts.flat.T)
                    norms = normalised_lengths(columns, self.readouts.gains)
                    measures = score_measures(scores, norms)
                    place = slice(start, start + len(columns))
                    self._table[:, :, place] = rearrange(measures, "n measure receiver -> measure receiver n")
                    start += len(columns)
        return self._table

    def scores(self, receiver: int) -> Float[Tensor, "neuron expert"]:
        """Every column's scores at one receiver."""
        return torch.cat([run.float() @ self.readouts.rows[receiver].T for run in self.runs])


class NeuronPart:
    """A layer's neurons in a batch, flattened to `[token]`.

    Args:
        columns: their weights.
        routed: g_i a_n of the chosen experts, `[token, k, neuron]`, with the experts; None for a dense layer.
        always: a_n of the shared experts (gated) or the dense layer, `[token, neuron]`; None where there is none.
        first: the first receiver that the layer reaches.
    """

    def __init__(
        self,
        columns: NeuronColumns,
        routed: tuple[Float[Tensor, "token k neuron"], Int[Tensor, "token k"]] | None,
        always: Float[Tensor, "token neuron"] | None,
        first: int,
        measuring: Measuring,
    ):
        self.columns, self.routed, self.always = columns, routed, always
        self.first, self.measuring = first, measuring

    def document_sums(self, routed: Routed) -> Iterator[tuple[slice, DocumentSums]]:
        n_receivers = routed.scales.shape[1] - self.first
        active = {position: self._active(routed, position) for position in POSITIONS}
        if self.measuring.waits:
            for receiver in range(n_receivers):
                yield slice(receiver, receiver + 1), self._by_rows(routed, receiver)
            return
        squared, positive, negative = self._weighted(routed)
        for receiver in range(n_receivers):
            variance, aps, ans, mean, norm = self.columns.table[:, receiver].double()
            sums = {}
            for i, position in enumerate(POSITIONS):
                c2, up, down = (t[i, receiver].double() for t in (squared, positive, negative))
                sums[position] = torch.stack(
                    (
                        c2 * variance,
                        up * aps - down * ans,
                        up * ans - down * aps,
                        (up - down) * mean,
                        (up + down) * norm,
                    )
                )[:, None]
            yield slice(receiver, receiver + 1), DocumentSums(sums, active)

    def _weighted(self, routed: Routed) -> tuple[Float[Tensor, "position receiver document neuron"], ...]:
        """Sums over each document's tokens of c^2 / s^2, max(c, 0) / s and max(-c, 0) / s."""
        inverse = 1 / routed.scales[:, self.first :]
        member = torch.stack([routed.classes[position] for position in POSITIONS], dim=1)
        weights = rearrange(member[:, :, None] * inverse[:, None], "token position r -> token (position r)")
        parts: list[list[Tensor]] = [[], [], []]
        for values, tokens, groups, n_groups in self._runs(routed):
            order = groups.argsort(stable=True)
            boundaries = torch.arange(1, n_groups + 1, device=groups.device)
            ends = torch.searchsorted(groups[order], boundaries, out_int32=True)
            values, once = values[order], weights[tokens[order]]
            positive = values.clamp(min=0)
            negative = positive - values
            powers = ((once.square(), values.square_()), (once, positive), (once, negative))
            for part, (weight, power) in zip(parts, powers, strict=True):
                products = group_products(weight, power, ends)
                part.append(
                    rearrange(
                        products,
                        "(document group) (position r) neuron -> position r document (group neuron)",
                        document=routed.n_documents,
                        position=len(POSITIONS),
                    )
                )
        squared, positive, negative = (torch.cat(part, dim=-1) for part in parts)
        return squared, positive, negative

    def _runs(self, routed: Routed) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Slots of routed experts, and tokens of what is always active: values, tokens, groups (each document's
        experts, each document) and how many groups there are. What is in no class has no weight."""
        # What padding holds must not be read: 0 times infinity would be.
        unread = ~torch.stack(list(routed.classes.values())).any(dim=0)
        if self.routed is not None:
            values, experts = self.routed
            if bool(unread.any()):
                values = values.masked_fill(unread[:, None, None], 0.0)
            _require_finite(values)
            n_tokens, k, n_neurons = values.shape
            n_experts = self.columns.n_routed // n_neurons
            tokens = repeat(torch.arange(n_tokens, device=experts.device), "token -> (token k)", k=k)
            groups = routed.documents[tokens] * n_experts + experts.flatten()
            yield values.flatten(0, 1), tokens, groups, routed.n_documents * n_experts
        if self.always is not None:
            values = self.always.masked_fill(unread[:, None], 0.0) if bool(unread.any()) else self.always
            _require_finite(values)
            tokens = torch.arange(len(values), device=values.device)
            yield values, tokens, routed.documents, routed.n_documents

    def _active(self, routed: Routed, position: str) -> Float[Tensor, "document neuron"]:
        """How many tokens of each document chose each neuron's expert."""
        member = routed.classes[position].double()
        counts = []
        for values, tokens, groups, n_groups in self._runs(routed):
            count = torch.zeros(n_groups, dtype=torch.float64, device=groups.device)
            count.index_add_(0, groups, member[tokens])
            by_document = rearrange(count, "(d group) -> d group", d=routed.n_documents)
            counts.append(repeat(by_document, "d group -> d (group n)", n=values.shape[-1]))
        return torch.cat(counts, dim=-1)

    def _by_rows(self, routed: Routed, receiver: int) -> DocumentSums:
        """Every neuron's scores, a few tokens at a time: where measures need the receivers' own routing."""
        columns = self.columns.scores(receiver)
        lengths = normalised_lengths(
            torch.cat([run.float() for run in self.columns.runs]),
            self.columns.readouts.gains[receiver, None],
        )
        summer = DocumentSummer(routed, self.measuring.n_measures, 1, self.columns.n_neurons)
        place = slice(self.first + receiver, self.first + receiver + 1)
        offset = 0
        for run, (values, tokens, groups, n_groups) in enumerate(self._runs(routed)):
            n_neurons = values.shape[1]
            first = (
                (groups % (n_groups // routed.n_documents)) * n_neurons
                if run == 0 and self.routed is not None
                else None
            )
            neurons = torch.arange(n_neurons, device=values.device) + offset
            for chunk in torch.arange(len(values), device=values.device).split(
                max(1, chunk_size(values.device) // (n_neurons * columns.shape[1]))
            ):
                senders = neurons.expand(len(chunk), -1) if first is None else neurons + first[chunk, None]
                rows = Rows(
                    tokens=repeat(tokens[chunk], "slot -> (slot n)", n=n_neurons),
                    senders=senders.flatten(),
                    scores=(values[chunk].flatten()[:, None] * columns[senders.flatten()])[:, None],
                    norms=values[chunk].flatten()[:, None].abs() * lengths[senders.flatten()],
                )
                summer.add(rows.tokens, rows.senders, self.measuring.measured(rows, routed, place))
            offset += self.columns.n_routed if first is not None else n_neurons
        return summer.result()


def _require_finite(values: Float[Tensor, "*place neuron"]) -> None:
    """Sums over neurons are checked at a few tokens only; that every one is finite, here."""
    # The extremes hold any NaN or infinity that there is.
    if values.numel() and not bool(torch.stack(values.aminmax()).isfinite().all()):
        raise ValueError("neurons of a batch hold values that are not finite")

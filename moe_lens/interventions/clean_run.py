"""One document as the model runs it, unchanged, with what a replay reads of it.

Every layer's stream before its MoE, and its keys and values, are kept; what the experts did at a layer is computed
again when that layer is asked for, from the same stream and in the same shapes, so that the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.attend import Attend
from moe_lens.model.hook_point import HookPoint, with_own_hook_points
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import weights_in_memory
from moe_lens.model.loss import likelihood_in_parts
from moe_lens.routing.arguments import few


@dataclass(frozen=True, eq=False)
class MoEValues:
    """What one MoE layer did at every token of a document. `k` is the slot axis, heaviest routing weight first.

    Attributes:
        layer: which.
        resid_mid: the stream that it reads and adds to.
        normalized: the same, normalised and times the gain: what router and experts see.
        probabilities: of all experts.
        indices, weights: the choice, and the routing weights as applied.
        expert_out: E_i(x).
        contrib: g_i E_i(x).
        shared_out: what the shared experts add; None where there are none.
        shared_gate: their gate, 1 where there is none.
    """

    layer: int
    resid_mid: Float[Tensor, "pos d_model"]
    normalized: Float[Tensor, "pos d_model"]
    probabilities: Float[Tensor, "pos expert"]
    indices: Int[Tensor, "pos k"]
    weights: Float[Tensor, "pos k"]
    expert_out: Float[Tensor, "pos k d_model"]
    contrib: Float[Tensor, "pos k d_model"]
    shared_out: Float[Tensor, "pos d_model"] | None
    shared_gate: Float[Tensor, " pos"]

    def __repr__(self) -> str:
        n_tokens, k = self.indices.shape
        shared = "" if self.shared_out is None else " and the shared ones"
        return f"<MoEValues of layer {self.layer}: {n_tokens} tokens, {k} experts each{shared}>"


@dataclass(frozen=True, eq=False)
class CleanRun:
    """A document's real tokens, and the streams, keys and values of its clean run.

    Attributes:
        model: what ran.
        tokens: the real ones.
        columns: where they lie in the row they came from; they are the rotary positions too.
        resid_mid: by layer; of layers that are run one at a time, as a dictionary that has the present one alone.
        keys, values: likewise; keys are rotated.
        final: the stream before the final norm.
        loss: -log p(next token), nats, float32; NaN where the next column is padding or missing.
    """

    model: HookedMoE
    tokens: Int[Tensor, " pos"]
    columns: Int[Tensor, " pos"]
    resid_mid: list[Float[Tensor, "pos d_model"]] | dict[int, Float[Tensor, "pos d_model"]]
    keys: list[Float[Tensor, "pos kv_head d_head"]] | dict[int, Float[Tensor, "pos kv_head d_head"]]
    values: list[Float[Tensor, "pos kv_head d_value"]] | dict[int, Float[Tensor, "pos kv_head d_value"]]
    final: Float[Tensor, "pos d_model"]
    loss: Float[Tensor, " pos"]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: HookedMoE,
        tokens: Int[Tensor, " pos"],
        mask: Bool[Tensor, " pos"] | None = None,
    ) -> CleanRun:
        """Run one document. Padding, wherever it lies, is left out; the real tokens keep their positions.

        Raises:
            ValueError: the model carries hooks (a replay does not pass through them); tokens of no document or of
                several; no real token.
            FloatingPointError: the loss is NaN or infinite at a token, which is named.
        """
        row, columns = real_tokens_of(model, tokens, mask)
        kept = Kept()
        attend = Attend(model.cfg.rotary, (1, len(row)), row.device, positions=columns[None])
        with model.hooks([hook for layer in range(model.cfg.n_layers) for hook in kept.hooks(layer)]):
            final = model.run_blocks(model.embed(row[None]), attend)
        loss = next_token_loss(model, final, row, columns)
        by_layer = {name: list(values.values()) for name, values in vars(kept).items()}
        clean = cls(model, row, columns, **by_layer, final=final[0], loss=loss)
        clean._require_finite()
        return clean

    def __repr__(self) -> str:
        return f"<CleanRun of {self.model.cfg.model_name}: {len(self.tokens)} tokens>"

    @property
    def has_next(self) -> Bool[Tensor, " pos"]:
        """Whether the next column holds a real token: whether there is a loss."""
        followed = torch.zeros_like(self.columns, dtype=torch.bool)
        followed[:-1] = self.columns[1:] == self.columns[:-1] + 1
        return followed

    @property
    def next_tokens(self) -> Int[Tensor, " pos"]:
        """The token after each; the last one's is itself, and means nothing (see `has_next`)."""
        return torch.cat((self.tokens[1:], self.tokens[-1:]))

    @torch.no_grad()
    def moe(self, layer: int) -> MoEValues:
        """What an MoE layer did, computed again from the stream that it read. Of a streamed model the layer is read,
        unless it is in memory."""
        with weights_in_memory(self.model, layer):
            return self._moe(layer)

    def _moe(self, layer: int) -> MoEValues:
        block: Any = self.model.blocks[layer]
        # Branches may be at work in the model's own modules meanwhile: these hooks are for this one run.
        mlp = with_own_hook_points(block.mlp)
        points: dict[str, Tensor] = {}

        def keep(name: str, point: HookPoint, inputs: Any, value: Tensor) -> None:
            points[name] = value[0]

        shared = self.model.cfg.shared
        names = ["expert_weights", "expert_indices", "routing_weights", "expert_out", "expert_contrib"]
        names += ["shared_out"] if shared else []
        names += ["shared_gate"] if shared and shared.gated else []
        for name in names:
            getattr(mlp, f"hook_{name}").register_forward_hook(partial(keep, name))
        normalized = block.ln2(self.resid_mid[layer][None])
        mlp(normalized)
        gate = points.get("shared_gate")
        return MoEValues(
            layer=layer,
            resid_mid=self.resid_mid[layer],
            normalized=normalized[0],
            probabilities=points["expert_weights"],
            indices=points["expert_indices"],
            weights=points["routing_weights"],
            expert_out=points["expert_out"],
            contrib=points["expert_contrib"],
            shared_out=points.get("shared_out"),
            shared_gate=torch.ones_like(self.loss) if gate is None else gate[:, 0].float(),
        )

    def _require_finite(self) -> None:
        broken = (self.has_next & ~self.loss.isfinite()).nonzero()
        if len(broken):
            raise FloatingPointError(
                f"the clean loss at position {int(self.columns[broken[0, 0]])} is {float(self.loss[broken[0, 0]])}"
                f"{self._first_broken()}; nothing can be measured against it"
            )

    def _first_broken(self) -> str:
        """Where a NaN or an infinity comes from: the first layer that has one, its first position, and the experts."""
        for layer in range(self.model.cfg.n_layers):
            broken = (~self.resid_mid[layer].isfinite()).any(dim=-1).nonzero()
            if len(broken):
                before = (
                    f"{f'layer {layer - 1}' if layer else 'the embedding'} or the attention of layer {layer}"
                )
                return f" (from {before}, position {int(self.columns[broken[0, 0]])})"
            if layer not in self.model.cfg.moe_layers:
                continue
            values = self.moe(layer)
            of_slots = (~values.contrib.isfinite()).any(dim=-1)
            names = [f"M{layer}E{expert}" for expert in range(self.model.cfg.n_experts)]
            by_row = [
                [names[e] for e in row[bad].tolist()]
                for row, bad in zip(values.indices, of_slots, strict=True)
            ]
            if values.shared_out is not None:
                for row in (~values.shared_out.isfinite()).any(dim=-1).nonzero()[:, 0].tolist():
                    by_row[row].append(f"M{layer}S")
            for row, of_row in enumerate(by_row):
                if of_row:
                    return f" (from {', '.join(of_row)} of layer {layer}, position {int(self.columns[row])})"
        return ""


def require_no_hooks(model: HookedMoE) -> None:
    """Of whatever is about the model as it is, and of replays above all: a replay drives the layers with branches of
    tokens, whose shape no hook expects.

    Torch's hooks on any module count as well as those on hook points: where branches begin, a layer's output is summed
    anew from its slots, and a hook on the layer would not see it.

    Raises:
        ValueError: modules carry hooks, and are named; or observers (an open `intervene`).
    """
    hooked = [
        name or type(model).__name__
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ]
    if hooked or model.run_observers:
        raise ValueError(
            f"this runs the model without hooks, and it carries some (at {few(hooked) or 'an open intervene'}); "
            f"close `hooks` and `intervene` first, or call reset_hooks()"
        )


def real_tokens_of(
    model: HookedMoE, tokens: Int[Tensor, " pos"], mask: Bool[Tensor, " pos"] | None
) -> tuple[Int[Tensor, " real"], Int[Tensor, " real"]]:
    """The tokens of one document that a clean run runs, and the columns in which they stand.

    Raises:
        ValueError: as `CleanRun.of`.
    """
    require_no_hooks(model)
    if not isinstance(tokens, Tensor) or tokens.ndim != 1:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"a clean run is of one document: tokens [pos], such as model.to_tokens(text)[0], not {got}"
        )
    checked, checked_mask = model.tokens_and_mask(tokens[None], None if mask is None else mask[None])
    row = checked[0]
    columns = torch.arange(len(row), device=row.device)
    return (row, columns) if checked_mask is None else (row[checked_mask[0]], columns[checked_mask[0]])


class Kept:
    """What a replay reads of the layers of a clean run, by layer; hooks fill it."""

    def __init__(self) -> None:
        self.resid_mid: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def hooks(self, layer: int) -> list[tuple[str, Callable[..., None]]]:
        return [
            (f"blocks.{layer}.{point}", partial(self._keep, kept, layer))
            for point, kept in (
                ("hook_resid_mid", self.resid_mid),
                ("attn.hook_rot_k", self.keys),
                ("attn.hook_v", self.values),
            )
        ]

    @staticmethod
    def _keep(kept: dict[int, Tensor], layer: int, value: Tensor, hook: HookPoint) -> None:
        # Latent attention's values are a part of a larger tensor, all of which a view of them would hold.
        kept[layer] = value[0].contiguous()

    def clear(self) -> None:
        for kept in vars(self).values():
            kept.clear()


def next_token_loss(
    model: HookedMoE,
    final: Float[Tensor, "one pos d_model"],
    tokens: Int[Tensor, " pos"],
    columns: Int[Tensor, " pos"],
) -> Float[Tensor, " pos"]:
    """-log p(next token) of the stream before the final norm, nats; NaN where the next column is not the next token."""
    loss = torch.full(columns.shape, torch.nan, device=columns.device)
    loss[:-1] = likelihood_in_parts(model.unembed, model.ln_final(final), tokens[None])[0]
    followed = columns[1:] == columns[:-1] + 1
    loss[:-1].masked_fill_(~followed, torch.nan)
    return loss

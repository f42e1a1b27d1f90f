"""Slow, obvious direct logit attribution: one sender, one token and one dot product at a time, in float64.

    values = reference_run(hf_model, tokens, mask)[1]
    vector = all_sender_vectors(hf_model, values, by="expert")["M1E3"]  # [batch, pos, d_model]
    scores = logit_scores(hf_model, values, vector, targets)  # [batch, pos]

Weights are transformers', hook values are given; nothing of moe_lens is imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reference_routing import Senders, Values, double, feed_forward_parts, sender_vectors


def all_sender_vectors(hf_model: Any, values: Values, by: str = "layer") -> Senders:
    """What each sender of the whole model writes, `[batch, pos, d_model]`: those before the last router or dense
    layer, and that layer."""
    last = len(hf_model.model.layers) - 1
    senders = sender_vectors(hf_model, values, last, by)
    if by in ("expert", "neuron"):
        return senders | feed_forward_parts(hf_model, values, last, by)
    return senders | {f"M{last}": double(values[f"blocks.{last}.hook_mlp_out"])}


def logit_scores(
    hf_model: Any, values: Values, vectors: np.ndarray, tokens: Tensor, incorrect: Tensor | None = None
) -> np.ndarray:
    """`[batch, pos]`, logits: vectors over the scale of the last stream, times the final gain, read by the row of the
    unembedding that is the place's token; less what the row of its incorrect token reads."""
    unembedding = double(hf_model.lm_head.weight)
    gain = double(hf_model.model.norm.weight)
    stream = double(values[f"blocks.{len(hf_model.model.layers) - 1}.hook_resid_post"])
    out = np.zeros(vectors.shape[:2])
    for row, position in np.ndindex(*out.shape):
        scale = np.sqrt(np.mean(stream[row, position] ** 2) + hf_model.config.rms_norm_eps)
        read = gain * vectors[row, position] / scale
        out[row, position] = np.dot(unembedding[int(tokens[row, position])], read)
        if incorrect is not None:
            out[row, position] -= np.dot(unembedding[int(incorrect[row, position])], read)
    return out


def written_as_transformers_says(hf_model: Any, tokens: Tensor, mask: Tensor) -> tuple[Senders, Tensor]:
    """What embedding, attention layers and MoE or dense layers write, from plain torch hooks on transformers' own
    modules, under this package's names; and its logits. Nothing is recomputed."""
    written: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            written[name] = first.reshape(*tokens.shape, -1)

        return hook

    decoder = hf_model.model
    handles = [decoder.embed_tokens.register_forward_hook(keep("embed"))]
    for i, layer in enumerate(decoder.layers):
        handles.append(layer.self_attn.register_forward_hook(keep(f"A{i}")))
        handles.append(layer.mlp.register_forward_hook(keep(f"M{i}")))
    try:
        with torch.no_grad():
            logits = hf_model(tokens, attention_mask=mask).logits
    finally:
        for handle in handles:
            handle.remove()
    return {name: double(vector) for name, vector in written.items()}, logits


def read_at(logits: Tensor, tokens: Tensor, incorrect: Tensor | None = None) -> Tensor:
    """Logits `[batch, pos, vocabulary]` of one token at each place, less those of another: `[batch, pos]`."""
    of_tokens = logits.gather(-1, tokens[..., None])[..., 0]
    return of_tokens if incorrect is None else of_tokens - logits.gather(-1, incorrect[..., None])[..., 0]

"""Slow, obvious implementations of the routing analyses: loops over tokens, senders and experts in float64.

They read hook values from wherever they are given (`tests.reference.reference_run` computes them without
moe_lens) and the router's weights from transformers' modules. Nothing of moe_lens is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sender_hooks(n_layers: int, receiver: int) -> dict[str, str]:
    """Sender name to hook name, for everything that is added to the stream before the router of `receiver`."""
    hooks = {"embed": "hook_embed"}
    for layer in range(n_layers):
        if layer <= receiver:
            hooks[f"A{layer}"] = f"blocks.{layer}.hook_attn_out"
        if layer < receiver:
            hooks[f"M{layer}"] = f"blocks.{layer}.hook_mlp_out"
    return hooks


@torch.no_grad()
def dense_scores(hf_model: Any, values: Mapping[str, Tensor], receiver: int) -> dict[str, np.ndarray]:
    """What each sender adds to each expert's logit, `[batch, pos, expert]`, one number at a time.

    Each sender's vector is divided by the scale of the whole stream and multiplied by the norm's gain as the norm
    does, and then read by one row of the router.
    """
    layer = hf_model.model.layers[receiver]
    gain = layer.post_attention_layernorm.weight.double().numpy()
    router = layer.mlp.gate.weight.double().numpy()
    eps = hf_model.config.rms_norm_eps
    stream = values[f"blocks.{receiver}.hook_resid_mid"].double().numpy()
    scores = {}
    for name, hook in sender_hooks(len(hf_model.model.layers), receiver).items():
        vectors = values[hook].double().numpy()
        out = np.zeros((*vectors.shape[:2], len(router)))
        for batch in range(vectors.shape[0]):
            for position in range(vectors.shape[1]):
                scale = np.sqrt(np.mean(stream[batch, position] ** 2) + eps)
                read = gain * vectors[batch, position] / scale
                for expert in range(len(router)):
                    out[batch, position, expert] = np.dot(router[expert], read)
        scores[name] = out
    return scores


def measures_of(scores: np.ndarray) -> tuple[float, float, float]:
    """Variance, APS and ANS of one token's scores over experts."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    positive = sum(score for score in scores if score > 0) / len(scores)
    negative = sum(score for score in scores if score < 0) / len(scores)
    return variance, positive, negative


def document_means(scores: np.ndarray, mask: Tensor, position: str) -> np.ndarray:
    """`[document, measure]`: each document's mean over its lead token, or over the rest of its real tokens.
    Documents without such a token have no row."""
    rows = []
    for row, real in zip(scores, mask.bool().tolist(), strict=True):
        positions = [i for i, is_real in enumerate(real) if is_real]
        chosen = positions[:1] if position == "lead" else positions[1:]
        if chosen:
            rows.append(np.mean([measures_of(row[i]) for i in chosen], axis=0))
    return np.array(rows)

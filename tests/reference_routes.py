"""Slow, obvious maps of contributions and losses of a run in which routes were changed.

A run is logits and all values, as the functions of `tests.reference_interventions` return them. Nothing of moe_lens is
imported here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from tests.reference import Cache
from tests.reference_census import losses_of
from tests.reference_interventions import Run
from tests.reference_routing import document_means, readout_scores, sender_vectors

Maps = dict[tuple[str, int], np.ndarray]  # (sender, receiver): [document, measure] of variance, APS, ANS


def contribution_rows(
    hf_model: Any,
    values: Cache,
    mask: Tensor,
    receivers: Iterable[int],
    by: str,
    position: str,
    without: str | None = None,
) -> Maps:
    """Of every sender at every receiver each document's mean variance, APS and ANS, over its lead token or the rest.

    Args:
        without: an expert that senders are read without: its own scores are zero, and those of its layer are what is
            left when its vector is taken away.
    """
    rows = {}
    for receiver in receivers:
        vectors = dict(sender_vectors(hf_model, values, receiver, by))
        if without is not None:
            parts = sender_vectors(hf_model, values, receiver, "expert")
            if without in parts and by == "expert":
                vectors[without] = 0 * vectors[without]
            elif without in parts:
                layer = without.split("E")[0].removesuffix("S")
                vectors[layer] = vectors[layer] - parts[without]
        for sender, vector in vectors.items():
            scores = readout_scores(hf_model, values, receiver, vector)
            rows[sender, receiver] = document_means(scores, mask, position)
    return rows


def document_losses(run: Run, tokens: Tensor, mask: Tensor) -> list[list[float]]:
    """Of every document, the losses at its tokens that have a next one; nats."""
    losses = losses_of(run[0].detach(), tokens, mask)
    return [[float(loss) for loss in row if not loss.isnan()] for row in losses]

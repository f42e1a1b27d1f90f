"""Redistribution: how far an expert moves its layer's output, and how much of that the rest of the layer says as well.

    found = redistribution(model, texts)
    found.correlations  # a row per layer and pair: rho, p, and two intervals
    found.experts  # a row per (layer, expert): what is correlated

At a token, with y the whole output of the layer (shared experts included) and c = g_i E_i(x) what expert i adds to it:

routing weight         g_i, as applied
gap norm               ||c|| = ||y - y_ablated||, how far the output moves when the expert is zeroed
remaining              y - c, the layer's output without the expert
cosine                 cos(c, remaining)
relative compensation  ||remaining|| max(cos, 0) / ||c|| = max(<c, remaining>, 0) / ||c||^2: how much of the lost
                       vector the rest of the layer still writes, as a multiple of it

All of it is of one run with the expert, so nothing makes up for it; where the rest points the other way, that counts
as 0; and whether any of it reaches the logits, as the source reads it, is not measured.

Each is averaged over the tokens at which the expert is active, and the averages are correlated across the experts of a
layer (Spearman). Where c is zero, cosine and relative compensation are undefined; where `remaining` is zero, the cosine
is undefined and the relative compensation is 0. Such tokens are counted, and left out of those means only.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), appendix A.3, figure 2 and table 7. The partial correlation, the intervals and the correlations with
the loss are added.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.audit.census_plan import Documents
from moe_lens.audit.census_table import Census
from moe_lens.audit.frame_file import read_frame, write_frame
from moe_lens.audit.redistribution_correlations import (
    COLUMNS,
    PerDocument,
    correlations_of,
    experts_of,
)
from moe_lens.audit.redistribution_sums import LayerSums
from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.clean_run import require_no_hooks
from moe_lens.interventions.spec_base import moe_layers_of
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few, natural_number, positive_integer
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import weights_fingerprint
from moe_lens.routing.runs import Mask

__all__ = ["Redistribution", "redistribution"]


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What experts add to their layer, and how much of it the rest writes too. `redistribution` makes one.

    Attributes:
        experts: one row per (layer, expert), active or not: `layer`, `expert`, `n_tokens` (at which it is active),
            `n_documents` (in which it is), `n_undefined` (tokens whose cosine is undefined, `c` or `remaining` being
            zero), `n_zero_gap` (those of them where c is zero, which have no relative compensation either);
            `routing_weight`, `gap_norm`, `cosine`, `relative_compensation`, each with `<name>_standard_error`. With a
            census also `delta_loss` (nats), its standard error, and `n_rows` of the census that it is over.
            Standard errors are clustered by document, NaN for fewer than two; a mean over no token is NaN.
        correlations: one row per (layer, x, y, given). `x`, `y`: the quantities; `given`: what is held fixed ("" or
            "gap_norm"). `rho`: Spearman's, or the partial one; `p`: two-sided, from t with n - 2 degrees of freedom,
            n - 3 for the partial one, which takes experts for independent; `n_experts`: n, those with both values.
            `low`, `high`: the interval over documents drawn anew; `low_experts`, `high_experts`: over experts drawn
            anew; `n_draws`, `n_draws_experts`: those of the `n_bootstrap` draws that have a rho.
            `mean_gap_norm`: over the layer's experts, as in table 7.
            Fewer than 4 experts, or a quantity that is the same for all, have no correlation: rho is NaN, and so is
            all that follows from it. Likewise the partial one where a quantity's order is that of the gap norm, or its
            reverse. A draw that has no rho counts as -1 for the low end and as 1 for the high one, since it could be
            anything.
        provenance: model, revision, dtype, weights (a fingerprint), layers, corpus, tokens (a fingerprint), documents
            (their names, where they have some), n_documents, n_tokens, n_bootstrap, confidence, seed, census (its
            provenance, or None), versions, seconds.
    """

    experts: pd.DataFrame
    correlations: pd.DataFrame
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        of = self.provenance
        n_experts = self.experts["expert"].nunique()
        return (
            f"<Redistribution of {of['model']}: layers {few(of['layers'])}, {n_experts} experts each, "
            f"{of['n_tokens']:,} tokens of {of['n_documents']:,} documents"
            f"{'' if of['census'] is None else '; with delta_loss'}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """A copy of `correlations`."""
        return self.correlations.copy()

    def save(self, path: str | Path) -> Path:
        """Write everything to one Parquet file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        # JSON has no NaN. Python writes every other float so that it is read back the same.
        lines = [
            {name: None if value != value else value for name, value in line.items()}
            for line in self.correlations.to_dict("records")
        ]
        facts = {"provenance": dict(self.provenance), "correlations": lines}
        return write_frame(path, self.experts, "redistribution", facts)

    @classmethod
    def load(cls, path: str | Path) -> Redistribution:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        experts, facts = read_frame(path, "redistribution")
        correlations = pd.DataFrame(facts["correlations"], columns=list(COLUMNS)).astype(COLUMNS)
        return cls(experts, correlations, facts["provenance"])


def redistribution(
    model: HookedMoE,
    tokens_or_batches: Batches,
    *,
    attention_mask: Mask | None = None,
    layers: Layers = None,
    census: Census | None = None,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 8,
    verbose: bool = False,
) -> Redistribution:
    """What every active expert adds to its layer's output, how the rest goes along with it, and how these correlate.

    One forward pass, without gradients, over all real tokens; padding is not counted, and neither batch size nor the
    side of padding matters. Seven numbers in float64 are kept for each document, layer and expert: 55 MiB for 1,000
    documents of OLMoE (16 layers of 64 experts).

    Two intervals, both percentiles of `n_bootstrap` draws with replacement (Efron and Tibshirani 1993, An introduction
    to the bootstrap, chapter 13). Of documents: what another corpus of the kind would give; the means are taken anew in
    every draw, NaN for fewer than two documents. A draw's means are noisier than the corpus's own, and noise weakens
    correlations, so with few tokens for an expert the interval lies too near 0. Of experts: what a model with other
    experts of the kind would give, which is what p assumes too.

    Args:
        model: in float32, bfloat16 or float16, on any device. It must carry no hooks. In half precision its values are
            taken as it has them, and everything after that is float64. Of a streamed model each layer is read once
            for all documents.
        tokens_or_batches: tokens `[batch, pos]`, one document a row; texts; or batches of (tokens, mask), a
            `TokenBatches` for one. All tokens are held in memory.
        attention_mask: of tokens given as one tensor: true where they are real.
        layers: MoE layers, as 3 or `"M3"`; None is all.
        census: of the same weights, on the same documents, scope `token`, how `zero`; all positions or a sample. With
            it `delta_loss`, the mean over an expert's rows, is correlated with gap norm and routing weight.
        n_bootstrap: draws for the intervals; 0 leaves these NaN.
        confidence: of the intervals.
        seed: of the draws. The same documents are drawn for all layers.
        batch_size: documents run at once, where they lie in rows of one length.
        verbose: show a progress bar, and of a streamed model what is read and held.

    Raises:
        ValueError: what makes no sense, or a census of something else, before anything runs; a model with hooks.
        FloatingPointError: a NaN or an infinity in what is read, with its document, position and layer.
    """
    require_no_hooks(model)
    chosen = moe_layers_of(model.cfg, layers)
    n_bootstrap, seed = natural_number(n_bootstrap, "n_bootstrap"), natural_number(seed, "seed")
    batch_size = positive_integer(batch_size, "batch_size")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    corpus = corpus_of(model, tokens_or_batches, attention_mask, batch_size)
    documents = Documents.of(model, corpus)
    if census is not None:
        _require_same(census, model, chosen, documents)

    started = time.monotonic()
    gathered = [LayerSums(model, layer, documents) for layer in chosen]

    def listening(batch: CorpusBatch) -> AbstractContextManager[None]:
        (first,) = batch.rest
        return model.listening([hook for layer in gathered for hook in layer.hooks(first, batch.real)])

    batches = _batches(documents, batch_size, model.cfg.device)
    run_batches(model, batches, listening, stop_at_layer=chosen[-1] + 1, verbose=verbose)

    quantities: dict[int, dict[str, PerDocument]] = {}
    parts = []
    for layer, sums in zip(chosen, gathered, strict=True):
        quantities[layer] = sums.quantities()
        if census is not None:
            quantities[layer]["delta_loss"] = _delta_loss(census, layer, len(documents), model.cfg.n_experts)
        parts.append(experts_of(layer, quantities[layer]))
    experts = pd.concat(parts, ignore_index=True)
    cfg = model.cfg
    return Redistribution(
        experts=experts,
        correlations=correlations_of(quantities, n_bootstrap, confidence, seed),
        provenance={
            "kind": "redistribution",
            "model": cfg.model_name,
            "revision": cfg.revision,
            "dtype": str(cfg.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(model),
            "layers": list(chosen),
            "corpus": corpus.description,
            "tokens": documents.fingerprint,
            "documents": documents.names,
            "n_documents": len(documents),
            "n_tokens": sum(int(real.sum()) for _, real in documents.rows),
            "n_bootstrap": n_bootstrap,
            "confidence": float(confidence),
            "seed": seed,
            "census": None if census is None else census.provenance,
            "versions": {name: version(name) for name in ("moe-lens", "torch", "transformers")},
            "seconds": time.monotonic() - started,
        },
    )


def _batches(
    documents: Documents, batch_size: int, device: torch.device
) -> list[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], int]]:
    """Tokens, which of them are real, and the number of the first document. Rows of one length go together."""
    batches = []
    first = 0
    for _, same_length in groupby(documents.rows, key=lambda row: len(row[0])):
        rows = list(same_length)
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            tokens, real = (torch.stack(list(parts)).to(device) for parts in zip(*some, strict=True))
            batches.append((tokens, real, first + start))
        first += len(rows)
    return batches


# ---- the census ----


def _require_same(census: Census, model: HookedMoE, layers: tuple[int, ...], documents: Documents) -> None:
    """The census is of this model, these documents, and zeroed experts at one token.

    Raises:
        ValueError: it is not.
    """
    of = census.provenance
    for name, wanted in (("scope", "token"), ("how", "zero")):
        if of.get(name) != wanted:
            raise ValueError(f"the census must be of {name}={wanted!r}, and it is of {name}={of.get(name)!r}")
    if not census.finished:
        raise ValueError(
            f"the census is not finished: it has {census.n_documents} documents so far; go on with its run first"
        )
    missing = [layer for layer in layers if layer not in census.layers]
    if missing:
        raise ValueError(
            f"the census has no layer {missing[0]}; it has {few(census.layers)}: give these as layers"
        )
    if of.get("weights") != weights_fingerprint(model):
        raise ValueError(
            f"the census is of other weights ({of.get('model')}, {of.get('dtype')}) than the model "
            f"({model.cfg.model_name}, {str(model.cfg.dtype).removeprefix('torch.')})"
        )
    if of.get("tokens") != documents.fingerprint:
        raise ValueError(
            f"the census is of other documents ({of.get('corpus')}); give those that it was made from, in its order"
        )


def _delta_loss(census: Census, layer: int, n_documents: int, n_experts: int) -> PerDocument:
    """Of the routed experts' rows, summed by document and expert."""
    rows = census.to_pandas(["document", "expert", "rank", "delta_loss"], layer)
    routed = rows["rank"].to_numpy() > 0
    document, expert, change = (
        rows[name].to_numpy()[routed] for name in ("document", "expert", "delta_loss")
    )
    shape, size = (n_documents, n_experts), n_documents * n_experts
    cells = document.astype(np.int64) * n_experts + expert
    sums = np.bincount(cells, weights=change.astype(np.float64), minlength=size)
    counts = np.bincount(cells, minlength=size).astype(np.float64)
    return PerDocument(sums.reshape(shape), counts.reshape(shape))

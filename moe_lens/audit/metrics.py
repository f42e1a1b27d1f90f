"""Population metrics of expert importance over a corpus, in one streaming pass, for all layers.

    table = expert_metrics(model, batches)
    table.values["activation_norm"][table.layer_index(3), 9]

A metric is a function of what one pass gathers (`ExpertStatistics`); `@metric("name")` registers another. Padding is
not counted (released definitions have padding of their own), and neither batch size nor the batches' padding matters.
The corpus need not be the one that experts are ablated on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.audit.metric_registry import Metric, find_metrics, forget_metric, metric, metric_names
from moe_lens.audit.metric_statistics import (
    QUANTITIES,
    Estimate,
    ExpertStatistics,
    LayerStatistics,
    statistics_of,
)
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.released_metrics import (
    RELEASED,
    ReleasedCount,
    ReleasedLayer,
    released_of,
)
from moe_lens.audit.released_padding import PaddingAsInTransformers, pad_token_of, padded_as_released
from moe_lens.model.corpus_passes import CorpusBatch, MakeAttend, run_batches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few, natural_number
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import TokenDigest, edit_counts, weights_fingerprint
from moe_lens.routing.runs import Corpus, Mask

__all__ = [
    "PAPER_METRICS",
    "QUANTITIES",
    "RELEASED",
    "Estimate",
    "ExpertStatistics",
    "Metric",
    "MetricTable",
    "expert_metrics",
    "forget_metric",
    "metric",
    "metric_names",
]

Hooks = list[tuple[str, Callable[..., Any]]]


def expert_metrics(
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    attention_mask: Mask | None = None,
    metrics: Sequence[str] | str | None = None,
    as_released: str | bool | None = None,
    pad_token: int | None = None,
    layers: Sequence[int] | int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    verbose: bool = False,
) -> MetricTable:
    """Run a corpus once and compute population metrics of every routed expert.

    Over real tokens. An expert that is never active has NaN in the metrics that are means over its tokens, and 0 in
    `counts`. Metrics that are means over tokens have standard errors, clustered by document (NaN for fewer than two);
    the others (spreads, maxima, norms of weights, similarity) have NaN.

    It costs a forward pass, and in float64 beside it the norms and sums of the expert outputs: k d_model numbers for
    each token and layer (1.6 to 1.9 times a forward pass on one CPU core for the bundled model, whose experts are 80
    wide; wider experts make that share smaller). What is kept is the mean output of every expert and some seventy
    numbers more: for OLMoE 16 x 64 x 2,048 numbers in float64, 16 MiB, and 0.6 MiB; for Qwen3-30B-A3B 48 x 128 x
    2,048, 96 MiB. It does not grow with the corpus. `output_similarity` compares mean outputs, so no expert is run
    where it was not chosen.

    Args:
        model: run without gradients, up to the last of the layers. Hooks on it stay, and what they edited is said in
            the provenance. Of a streamed model each layer is read once for the whole corpus.
        batches_or_texts: a text or several (one document each); tokens `[batch, pos]`, with `attention_mask`; what
            `corpus.token_batches` gives; or any iterable of batches, each tokens `[batch, pos]` or a tuple of tokens,
            the mask of real ones (or None), and whatever else, which is not read. Every row is one document.
        attention_mask: of tokens given as one tensor.
        metrics: names; None is all that are registered (`metric_names()`).
        as_released: `"olmoe"`, `"deepseek_v2"` or `"qwen2_moe"`, or True for the model's own: the four metrics of the
            paper as its released code computes them for that model (`moe_lens.audit.released_metrics`). OLMoE's and
            DeepSeek's count padding. It is the released code's, whatever padding the batches have: every document is
            filled up to the longest of the corpus, on the right for OLMoE and on the left for DeepSeek. The table
            says with which token, to which width, and how many positions that were.
        pad_token: with `as_released`, the token of the padding that is counted; None is the tokenizer's pad token,
            or its EOS where it has none.
        layers: MoE layers; None is all of them.
        seed: of the metrics that draw (`random`).
        batch_size: documents run at once, of texts, of tokens given as one tensor, and where padding is counted.
        verbose: show a progress bar, and of a streamed model what is read and held.

    Raises:
        ValueError: an unknown metric or layer, no batches, a value that is not finite, a metric that gives another
            shape, NaN or an infinity; with `as_released`, a model or a metric that the released code does not have,
            or no token to pad with; a `pad_token` where no padding is counted.
    """
    layers = _moe_layers(model, layers)
    seed = natural_number(seed, "seed")
    corpus = corpus_of(model, batches_or_texts, attention_mask, batch_size)
    whose = released_of(model, as_released) if as_released not in (None, False) else None
    if pad_token is not None and (whose is None or not RELEASED[whose].counts_padding):
        raise ValueError("pad_token is of padding that is counted, as_released='olmoe' or 'deepseek_v2'")
    if whose is not None:
        return _released_table(model, corpus, metrics, whose, pad_token, layers, seed, batch_size, verbose)
    chosen = find_metrics(metrics)
    gathered = [LayerStatistics(model, layer) for layer in layers]
    pass_ = _Pass(model, corpus, verbose)
    pass_.run(lambda real: [hook for layer in gathered for hook in layer.hooks(real)], layers[-1] + 1)
    statistics = statistics_of(model, gathered, pass_.n_tokens, pass_.n_documents, seed)
    estimates = {asked.name: asked.of(statistics) for asked in chosen}
    return MetricTable(
        layers=layers,
        values={name: estimate.value for name, estimate in estimates.items()},
        standard_errors={name: estimate.standard_error for name, estimate in estimates.items()},
        counts=statistics.count,
        n_tokens=statistics.n_tokens,
        n_documents=statistics.n_documents,
        provenance=pass_.provenance(
            seed=seed,
            definitions={asked.name: asked.definition for asked in chosen},
            functions={asked.name: asked.fingerprint for asked in chosen},
            higher_is_more_important={asked.name: asked.higher_is_more_important for asked in chosen},
            as_released=None,
            padding=None,
            n_padding_counted=0,
        ),
    )


def _released_table(
    model: HookedMoE,
    corpus: Corpus,
    metrics: Sequence[str] | str | None,
    as_released: str,
    pad_token: int | None,
    layers: tuple[int, ...],
    seed: int,
    batch_size: int,
    verbose: bool,
) -> MetricTable:
    definitions, side = RELEASED[as_released].definitions, RELEASED[as_released].padding
    chosen = [asked.name for asked in find_metrics(PAPER_METRICS if metrics is None else metrics)]
    for name in chosen:
        if name not in definitions:
            raise ValueError(
                f"the released code has no metric {name!r}; as_released has {', '.join(definitions)}"
            )
    padding = None
    if side is not None:
        token = pad_token_of(model, pad_token)
        corpus, padding = padded_as_released(model, corpus, side, token, batch_size)
    gathered = [ReleasedLayer(model, layer, as_released) for layer in layers]
    count = ReleasedCount(as_released)
    pass_ = _Pass(model, corpus, verbose)

    def hooks_of(real: Bool[Tensor, "batch pos"]) -> Hooks:
        counted, with_outputs = count.of(real)
        return [hook for layer in gathered for hook in layer.hooks(counted, with_outputs)]

    # Padded queries are transformers'; real tokens see what they always see.
    pass_.run(hooks_of, layers[-1] + 1, PaddingAsInTransformers)
    if count.n_tokens == 0:
        raise ValueError(
            f"as_released={as_released!r} counts texts of 4 tokens or more, and there is none in {corpus.description}"
        )
    by_layer = [layer.values() for layer in gathered]
    values = {name: np.stack([found[name].numpy() for found in by_layer]) for name in chosen}
    return MetricTable(
        layers=layers,
        values=values,
        standard_errors={name: np.full_like(found, np.nan) for name, found in values.items()},
        counts=np.stack([layer.count.long().cpu().numpy() for layer in gathered]),
        n_tokens=count.n_tokens,
        n_documents=pass_.n_documents,
        provenance=pass_.provenance(
            seed=seed,
            definitions={name: definitions[name] for name in chosen},
            functions={},
            higher_is_more_important=dict.fromkeys(
                chosen, True
            ),  # the released code takes the highest of all
            as_released=as_released,
            padding=None if padding is None else asdict(padding),
            n_padding_counted=count.n_padding,
        ),
    )


class _Pass:
    """One pass over a corpus, and what it was of."""

    def __init__(self, model: HookedMoE, corpus: Corpus, verbose: bool):
        self.model, self.corpus, self.verbose = model, corpus, verbose
        self.n_tokens = self.n_documents = 0
        self._digest, self._edits = TokenDigest(), edit_counts(model)

    def run(
        self,
        hooks_of: Callable[[Bool[Tensor, "batch pos"]], Hooks],
        last: int,
        attend: MakeAttend | None = None,
    ) -> None:
        """Run the corpus up to layer `last`, with the hooks that are made for each batch from which of its tokens are
        real.

        Raises:
            ValueError: there are no batches.
        """

        def listening(batch: CorpusBatch) -> AbstractContextManager[None]:
            real = batch.real
            self._digest.add(batch.tokens, real)
            self.n_documents += len(real)
            self.n_tokens += int(real.sum())
            return self.model.listening(hooks_of(real))

        run_batches(
            self.model,
            self.corpus,
            listening,
            stop_at_layer=last,
            attend=attend,
            n_batches=self.corpus.n_batches,
            verbose=self.verbose,
        )

    def provenance(self, **more: Any) -> dict[str, Any]:
        cfg, edits = self.model.cfg, edit_counts(self.model)
        return {
            "model": cfg.model_name,
            "revision": cfg.revision,
            "dtype": str(cfg.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.model),
            "edited": sorted(name for name, n in edits.items() if n != self._edits[name]),
            "corpus": self.corpus.description,
            "fingerprint": self._digest.hexdigest(),
            **more,
            "moe_lens": version("moe-lens"),
        }


def _moe_layers(model: HookedMoE, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    there = model.cfg.moe_layers
    asked = there if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in asked if isinstance(layer, bool) or layer not in there]
    if wrong or not asked:
        problem = f"layer {wrong[0]!r} is no MoE layer" if wrong else "no MoE layer is asked for"
        raise ValueError(f"{problem}; {model.cfg.model_name} has MoE layers {few(there) or 'nowhere'}")
    return tuple(sorted({operator.index(layer) for layer in asked}))

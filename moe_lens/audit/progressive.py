"""Progressive ablation: the heaviest active expert of a layer is taken away, then the two heaviest, ... all but one.

    table = progressive(model, texts, layers=(0, 7))
    table.to_frame()  # layer, removed, mean loss change with its standard error, median, 95th percentile

For each token and layer the k heaviest active experts are changed together at that one token, and the loss is read
there, by exact replay: one branch for each k.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), section 3 and appendix C; there at 500 sampled positions of a layer, one of each text and each
predicted from 32 to 256 tokens (`n=500, per_document=1, min_context=32`), here at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.audit.census_document import Settings
from moe_lens.audit.census_plan import CensusPlan, Documents
from moe_lens.audit.census_summary import clustered_mean
from moe_lens.audit.frame_file import read_frame, write_frame
from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.branches import Change, How, heaviest_slots
from moe_lens.interventions.clean_run import CleanRun, require_no_hooks
from moe_lens.interventions.expert_reference import ExpertReference
from moe_lens.interventions.replay import Branches, replay
from moe_lens.interventions.spec_base import moe_layers_of
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import layers_said, natural_number, positive_integer
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import weights_fingerprint
from moe_lens.routing.runs import Mask

_DTYPES = {
    "document": np.int32,
    "position": np.int32,
    "layer": np.int16,
    "removed": np.int16,
    "gap_norm": np.float32,
    "loss": np.float32,
    "delta_loss": np.float32,
}


@dataclass(frozen=True, eq=False)
class Progressive:
    """What taking away the k heaviest active experts together does, token by token.

    Attributes:
        rows: one for each (document, layer, position, k), in that order: `document`, `position` (the column), `layer`,
            `removed` (k), `gap_norm` (||y - y_changed||_2 of the layer's output), `loss` (nats, clean), `delta_loss`
            (nats), and in half precision `null_delta_loss`, the change of a branch that changes nothing, from which
            changes are then counted.
        provenance: of what this is: `model`, `revision`, `dtype`, `weights` (a fingerprint), `how` (with `reference`
            and `seed` where they matter), `scope`, `layers`, `removed`, `corpus`, `tokens` (a fingerprint),
            `documents` (their names, where they have some), `sample` (None, or `n` and `seed`, and where they were
            given `per_document` and `min_context`), `versions`, `seconds`. JSON data.
    """

    rows: pd.DataFrame
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        of = self.provenance
        return (
            f"<Progressive of {of['model']}: {len(self.rows):,} rows; {layers_said(of['layers'])}; "
            f"1 to {of['removed'][-1]} experts removed ({of['how']})>"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, k): `layer`, `removed`, `n_rows`, `n_documents` (that have any), `delta_loss` and
        `gap_norm` (means over rows) with their `_standard_error`, `delta_loss_median`, `delta_loss_p95`.

        Rows of one document are not independent: standard errors are clustered by document, as in `Census.by_layer`,
        and NaN for fewer than two.

        Source: the trajectories of appendix C, tables 8 and 9.
        """
        lines = []
        for (layer, removed), cell in self.rows.groupby(["layer", "removed"], sort=True):  # type: ignore[misc]
            starts = np.unique(cell["document"].to_numpy(), return_index=True)[1]
            line: dict[str, Any] = {"layer": layer, "removed": removed}
            line |= {"n_rows": len(cell), "n_documents": len(starts)}
            for name in ("delta_loss", "gap_norm"):
                values = cell[name].to_numpy(np.float64)
                line[name], line[f"{name}_standard_error"] = clustered_mean(values, starts)
                if name == "delta_loss":
                    line[f"{name}_median"], line[f"{name}_p95"] = np.percentile(values, [50, 95])
            lines.append(line)
        return pd.DataFrame(lines)

    def save(self, path: str | Path) -> Path:
        """Write everything to one Parquet file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        return write_frame(path, self.rows, "progressive", {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Progressive:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        rows, facts = read_frame(path, "progressive")
        return cls(rows, facts["provenance"])


def progressive(
    model: HookedMoE,
    tokens_or_batches: Batches,
    *,
    attention_mask: Mask | None = None,
    layers: Layers = None,
    how: How = "zero",
    reference: ExpertReference | None = None,
    seed: int = 0,
    n: int | None = None,
    per_document: int | None = None,
    min_context: int = 0,
    max_removed: int | None = None,
    memory_budget: int = 2**30,
    batch_size: int = 8,
    verbose: bool = False,
) -> Progressive:
    """Take away the k heaviest active experts at one token, for every token, MoE layer and k from 1 to K - 1.

    Scope `token`: the change is made at one position, and the loss is read there.

    Args:
        model: in float32, bfloat16 or float16, on any device. It must carry no hooks.
        tokens_or_batches: tokens `[batch, pos]`, one document a row; texts; or batches of (tokens, mask), a
            `TokenBatches` for one. All tokens are held in memory.
        attention_mask: of tokens given as one tensor: true where they are real.
        layers: MoE layers, as 3 or `"M3"`; None is all.
        how: what becomes of the experts; see `Ablate`. `zero` is the source's.
        reference: what `mean` and `resample` read (`expert_reference(model, batches)`).
        seed: of `resample`'s draws and of the sample of positions.
        n: a sample of so many positions, uniform over the corpus without replacement, the same for all layers;
            None is all, or all that the next two leave.
        per_document: at most so many positions of a document. They are drawn first, uniformly from each document's,
            and the `n` from those: with 1, `n` documents are drawn and a position of each, as in the source, and a
            position of a long document is less likely than one of a short. None is no limit.
        min_context: only positions whose prediction is made from at least so many tokens of the document, the
            position's own and those before it; the source's is 32.
        max_removed: the largest k; None is K - 1.
        memory_budget: bytes for the branches at work.
        batch_size: rows of tokens given as one tensor, at a time; it changes no number.
        verbose: print the plan, show progress.

    Raises:
        ValueError: what makes no sense, before anything runs; a model with hooks.
        FloatingPointError: a NaN or an infinity on the way, with its document, position, layer and experts.
    """
    require_no_hooks(model)
    settings = Settings(
        layers=moe_layers_of(model.cfg, layers),
        change=Change(how, reference, seed),
        scope="token",
        shared=False,
        outcomes=(),
        predictors=(),
        null_branch=model.cfg.dtype != torch.float32,
        memory_budget=positive_integer(memory_budget, "memory_budget"),
    )
    most = _most_removed(model, how, max_removed)
    settings.change.check_model(model, settings.layers)
    n = None if n is None else positive_integer(n, "n")
    per_document = None if per_document is None else positive_integer(per_document, "per_document")
    min_context = natural_number(min_context, "min_context")
    corpus = corpus_of(model, tokens_or_batches, attention_mask, batch_size)
    documents = Documents.of(model, corpus)
    positions = documents.sampled(n, seed, per_document=per_document, min_context=min_context)
    plan = _plan(model, positions, settings, most)
    if verbose:
        print(f"progressive removal of the 1 to {most} heaviest experts")
        print(plan.describe(corpus.description))
    started = time.monotonic()
    parts = []
    with tqdm(total=sum(plan.ablations), unit=" ablations", unit_scale=True, disable=not verbose) as progress:
        for number, places in enumerate(positions):
            if len(places):
                parts.append(_document(model, documents, number, places, settings, most))
            progress.update(plan.ablations[number])
    rows = pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    cfg = model.cfg
    provenance = {
        "kind": "progressive",
        "model": cfg.model_name,
        "revision": cfg.revision,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model),
        **settings.change.describe(),
        "scope": settings.scope,
        "layers": list(settings.layers),
        "removed": list(range(1, most + 1)),
        "corpus": corpus.description,
        "tokens": documents.fingerprint,
        "documents": documents.names,
        "sample": _sample(n, seed, per_document, min_context),
        "versions": {name: version(name) for name in ("moe-lens", "torch", "transformers")},
        "seconds": time.monotonic() - started,
    }
    return Progressive(rows, provenance)


def _sample(
    n: int | None, seed: int, per_document: int | None, min_context: int
) -> dict[str, int | None] | None:
    """How positions are drawn, as provenance says it: with what was asked for and nothing else; None is all."""
    sample = {"n": n, "seed": seed}
    if per_document is not None:
        sample["per_document"] = per_document
    if min_context > 0:
        sample["min_context"] = min_context
    return None if n is None and len(sample) == 2 else sample


def _most_removed(model: HookedMoE, how: How, max_removed: int | None) -> int:
    """The largest k.

    Raises:
        ValueError: there is none, or too many are asked for.
    """
    k, n_experts = model.cfg.top_k, model.cfg.n_experts
    if k == 1:
        raise ValueError(
            "progressive removal leaves an expert that stays, and this model's routers choose one; census removes it"
        )
    most = k - 1 if max_removed is None else positive_integer(max_removed, "max_removed")
    if most > k - 1:
        raise ValueError(f"max_removed={most} must leave one of the {k} experts that a router chooses")
    if how == "reroute" and n_experts - most < k:
        fewer = f"max_removed={n_experts - k} or " if n_experts > k else ""
        raise ValueError(
            f"reroute needs experts to take the slots: {n_experts} experts less {most} are fewer than the {k} that a "
            f"router chooses; give {fewer}another how"
        )
    return most


def _plan(
    model: HookedMoE, positions: Sequence[Int[Tensor, " n"]], settings: Settings, most: int
) -> CensusPlan:
    """What it takes, in a census's terms."""
    ablations = [len(places) * most * len(settings.layers) for places in positions]
    depth = sum(model.cfg.n_layers - 1 - layer for layer in settings.layers)
    layer_tokens = sum(map(len, positions)) * most * depth
    return CensusPlan(ablations, layer_tokens, 0, model, settings, noise_samples=0)


def _document(
    model: HookedMoE,
    documents: Documents,
    number: int,
    places: Int[Tensor, " n"],
    settings: Settings,
    most: int,
) -> dict[str, Float[np.ndarray, " row"] | Int[np.ndarray, " row"]]:
    """The rows of one document.

    Raises:
        FloatingPointError: see `progressive`.
    """
    tokens, real = documents.rows[number]
    removed = heaviest_slots(model.cfg.top_k, model.cfg.device)[:most]
    try:
        clean = CleanRun.of(model, tokens, real)
        result = replay(
            clean,
            [Branches(layer, removed) for layer in settings.layers],
            rows=places.to(clean.tokens.device),
            change=settings.change,
            null_branch=settings.null_branch,
            memory_budget=settings.memory_budget,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{documents.name(number)}: {error}") from error
    gap_norm = torch.stack(result.gap_norm)  # [layer, n, k]
    columns: dict[str, Tensor] = {
        "document": torch.tensor(number).expand_as(gap_norm),
        "position": result.columns[:, None].expand_as(gap_norm),
        "layer": torch.tensor(settings.layers)[:, None, None].expand_as(gap_norm),
        "removed": torch.arange(1, most + 1).expand_as(gap_norm),
        "gap_norm": gap_norm,
        "loss": result.clean_loss[:, None].expand_as(gap_norm),
        "delta_loss": torch.stack(result.delta_loss),
    }
    dtypes = dict(_DTYPES)
    if result.null is not None:
        null = torch.stack(result.null["loss"]) - result.clean_loss
        columns["null_delta_loss"] = null[..., None].expand_as(gap_norm)
        dtypes["null_delta_loss"] = np.float32
    return {name: column.cpu().numpy().ravel().astype(dtypes[name]) for name, column in columns.items()}

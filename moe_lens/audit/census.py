"""The census: every active expert ablated at every token of a corpus, one at a time.

For each document, position t with a next token, MoE layer and expert active there: what becomes of the loss at t when
this expert is changed at t (scope `token`), by exact replay; or when it is changed at every position where it is
active (scope `sequence`). Every metric, control and test of an audit is then a query on one table.

Source: the functional importance and gap norm of "From Observation to Intervention: A Causal Audit of Expert
Importance in Mixture-of-Experts Models" (arXiv:2606.10703), section 2; there at n = 200 sampled positions, here at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.audit.census_document import (
    PREDICTORS,
    SCOPES,
    CensusOutcome,
    Predictor,
    Scope,
    Settings,
    rows_of,
)
from moe_lens.audit.census_plan import CensusPlan, Documents, no_rows, runs_of
from moe_lens.audit.census_streamed import Passes, PassesOf, require_streamable, streamed_passes
from moe_lens.audit.census_table import Census, CensusWriter
from moe_lens.audit.noise import NoiseFloor, noise_floor, require_room_for_float32
from moe_lens.audit.streamed_noise import streamed_noise_floor
from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.branches import Change, How
from moe_lens.interventions.clean_run import CleanRun, require_no_hooks
from moe_lens.interventions.expert_reference import ExpertReference
from moe_lens.interventions.first_order import require_gradients
from moe_lens.interventions.outcomes import LogitDifference, check_outcomes
from moe_lens.interventions.replay import check_shared
from moe_lens.interventions.spec_base import moe_layers_of
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.out_of_memory import said_what_would_help
from moe_lens.ranks import ALONE, Ranks
from moe_lens.routing.arguments import natural_number, positive_integer
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import weights_fingerprint
from moe_lens.routing.runs import Corpus, Mask

__all__ = ["Census", "LogitDifference", "census"]

_RUNS_PER_RANK = 8
"""Of documents that a rank takes at a time: some ranks are faster than others."""


def census(
    model: HookedMoE,
    tokens_or_batches: Batches,
    *,
    attention_mask: Mask | None = None,
    layers: Layers = None,
    how: How = "zero",
    scope: Scope = "token",
    reference: ExpertReference | None = None,
    seed: int = 0,
    shared: bool = False,
    n: int | None = None,
    outcome: CensusOutcome | Sequence[CensusOutcome] = (),
    predictors: Predictor | Sequence[Predictor] = (),
    output: str | Path | None = None,
    memory_budget: int = 2**30,
    noise_samples: int = 32,
    save_every: float = 30.0,
    batch_size: int = 8,
    ranks: Ranks = ALONE,
    streams_budget: int | None = None,
    spill_directory: str | Path | None = None,
    verbose: bool = False,
) -> Census:
    """Change every active expert at every token, one at a time, and record what becomes of the loss.

    One row for each (document, position, layer, active routed expert), in that order but layers before positions:
    `document`, `position` (the column), `layer`, `expert`, `rank` (1 the heaviest), `routing_weight` (as applied),
    `gap_norm` (||y - y_changed||_2 of the layer's output), `loss` (nats, clean), `delta_loss` (nats). Positions whose
    next token is missing or padding are no rows.

    A streamed model goes layer by layer: each layer is read once for a group of documents, and the rows are those of
    the model in memory, bit by bit (`direct` but for its last digit). What needs gradients or passes of its own raises
    there: `first_order`, scope `sequence` and `later_loss`. The noise floor takes three passes more (others where
    the clean runs of its samples exceed `streams_budget`), one of them by a second streamed model in float32, and so
    needs a checkpoint that is stored in the model's dtype.

    Args:
        model: in float32, bfloat16 or float16, on any device. It must carry no hooks.
        tokens_or_batches: tokens `[batch, pos]`, one document a row; texts; or batches of (tokens, mask), a
            `TokenBatches` for one. All tokens are held in memory.
        attention_mask: of tokens given as one tensor: true where they are real.
        layers: MoE layers, as 3 or `"M3"`; None is all.
        how: `zero`, `renormalize`, `reroute`, `mean` or `resample`; see `Ablate`.
        scope: `token`: the expert is changed at one position, and the loss is read there. `sequence`: it is changed
            wherever it is active in the document. These are different experiments.
        reference: what `mean` and `resample` read (`expert_reference(model, batches)`).
        seed: of `resample`'s draws and of the sample of positions.
        shared: also change the shared experts, as expert -1 of rank 0, with their gate as routing weight.
        n: a sample of so many positions, uniform over the corpus without replacement, instead of all.
        outcome: beside the loss: `"kl"` (column `kl`: D_KL(clean || changed), nats), `LogitDifference(correct,
            incorrect)` (column `delta_logit_difference`, logits), `"later_loss"` (column `delta_later_loss`: the mean
            change of the losses after the position, nats, NaN where there is none; needs scope `token`, and a pass of
            its own for every position).
        predictors: `"first_order"` (column `first_order`, nats) and `"direct"` (column `direct`, logits); see
            `moe_lens.interventions.first_order`.
        output: a folder for a parquet dataset, written as it goes. A killed run goes on from it with the same call,
            and gives the same numbers.
        memory_budget: bytes for the branches at work. It divides the work, and so the rounding: a run is gone on with
            under the same budget only. The number of torch's threads divides it too and is not checked: with another
            one, a resumed run may differ in the last bits. So may one in which memory ran out, where fewer branches
            are then at work at once; that is said in the log (`moe_lens.out_of_memory`).
        noise_samples: in half precision, how many ablations are repeated by hooked full forward passes and in float32
            to measure the noise floor that is stored; 0 leaves it out.
        save_every: seconds between shards.
        batch_size: rows of tokens given as one tensor, at a time; it changes no number.
        ranks: processes that do this together, each with its own model, and the same arguments otherwise; see
            `moe_lens.ranks`. Each takes documents that are not done yet, and writes its own shards to `output`.
        streams_budget: of a streamed model: bytes of the branches' streams that are held in memory between two layers,
            2 GiB where nothing is said. A group has as many documents as fit; where one alone does not, the rest of
            its streams lie in a file. It changes no number.
        spill_directory: of a streamed model: where that file is made, and removed; None is the system's temporary
            directory.
        verbose: print the plan, show progress.

    Returns:
        The table; `facts` holds the noise floor. In half precision changes are counted from a null branch, which runs
        the same path and changes nothing, and its own change is the column `null_delta_loss`. All ranks get
        the same table.

    Raises:
        ValueError: what makes no sense, before anything runs; a folder of another run; a model with hooks; ranks that
            see different runs.
        RankLost: another rank has ended.
        NotEnoughMemory: there is no room for the float32 copy that the noise floor is measured with; or, on the way,
            not even for the smallest piece of work. Documents that are done are kept.
        FloatingPointError: a NaN or an infinity on the way, with its document, position, layer and expert.
    """
    require_no_hooks(model)
    if ranks.n > 1 and output is None:
        raise ValueError(f"{ranks.n} ranks need an output: a folder in which each writes its part")
    settings = _settings(
        model, layers, how, scope, reference, seed, shared, outcome, predictors, memory_budget
    )
    noise_samples = natural_number(noise_samples, "noise_samples")
    if isinstance(model, StreamedMoE):
        # The first rank measures the noise floor for all.
        require_streamable(model, settings, noise_samples if ranks.first else 0)
    if n is not None:
        n = positive_integer(n, "n")
    corpus = corpus_of(model, tokens_or_batches, attention_mask, batch_size)
    documents = Documents.of(model, corpus)
    positions = documents.sampled(n, seed)
    settings.change.check_model(model, settings.layers)
    if settings.null_branch and noise_samples and ranks.first and not isinstance(model, StreamedMoE):
        require_room_for_float32(model)
    plan = CensusPlan.of(model, documents, positions, settings, noise_samples)
    passes_of = streamed_passes(model, documents, positions, settings, streams_budget, spill_directory)
    verbose = verbose and ranks.first
    if verbose:
        print(plan.describe(corpus.description))
        if passes_of is not None:
            of_ranks = [passes_of(run) for run in runs_of(range(len(documents)), plan.ablations, ranks.n)]
            floor = noise_samples if settings.null_branch else 0
            print(Passes.joined(of_ranks).describe(floor, ranks.n))
    identity = _identity(model, settings, corpus, documents, n, seed, noise_samples)
    extra = settings.columns
    ranks.agree(identity)
    if output is not None:
        ranks.require_shared(Path(output).absolute().parent)
    started = time.monotonic()
    with CensusWriter(
        output,
        identity,
        extra=extra,
        may_be_nan=["delta_later_loss"] if "delta_later_loss" in extra else [],
        save_every=save_every,
        ranks=ranks,
    ) as writer:
        due = writer.missing(len(documents))
        n_left, made = sum(plan.ablations[number] for number in due), ranks.counter()
        if verbose and ranks.n > 1:
            print(f"{ranks.n} processes; {len(due):,} of {len(documents):,} documents are to be done")
        progress = tqdm(
            total=sum(plan.ablations),
            initial=sum(plan.ablations) - n_left,
            unit=" ablations",
            unit_scale=True,
            disable=not verbose,
        )
        n_before = progress.n
        with progress:

            def show(more: int = 0) -> None:
                progress.update(n_before + made(more) - progress.n)

            # A pass over the layers of a streamed model is for as many documents as fit.
            n_runs = ranks.n if passes_of is not None else _RUNS_PER_RANK * ranks.n
            for run in ranks.taking(runs_of(due, plan.ablations, n_runs)):
                for group in _groups(model, documents, positions, settings, run, passes_of, plan, show):
                    for number, columns in group:
                        writer.add_document(number, columns)
                    if passes_of is not None:
                        # A pass takes long: what it gave is not to wait for the next one's end.
                        writer.flush()
            writer.together(meanwhile=show)
        done = writer.finished or not ranks.first  # the first rank measures the noise floor for all
        noise = None
        if not done:
            noise = _noise(model, documents, positions, settings, noise_samples, seed, passes_of, verbose)
        return writer.finish(
            {
                "noise_floor": None if noise is None else asdict(noise),
                "seconds": time.monotonic() - started,
            }
        )


# ---- what is asked for ----


def _settings(
    model: HookedMoE,
    layers: Layers,
    how: How,
    scope: Scope,
    reference: ExpertReference | None,
    seed: int,
    shared: bool,
    outcome: CensusOutcome | Sequence[CensusOutcome],
    predictors: Predictor | Sequence[Predictor],
    memory_budget: int,
) -> Settings:
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} must be one of {', '.join(map(repr, SCOPES))}")
    outcomes = (outcome,) if isinstance(outcome, (str, LogitDifference)) else tuple(outcome)
    for asked in outcomes:
        if asked not in ("kl", "later_loss") and not isinstance(asked, LogitDifference):
            raise ValueError(f"outcome {asked!r} must be 'kl', 'later_loss' or a LogitDifference")
    check_outcomes([asked for asked in outcomes if asked != "later_loss"], model.cfg.d_vocab)
    if "later_loss" in outcomes and scope == "sequence":
        raise ValueError(
            "later_loss is of a change at one token; under scope='sequence' every later position is changed itself"
        )
    chosen = (predictors,) if isinstance(predictors, str) else tuple(predictors)
    for name in chosen:
        if name not in PREDICTORS:
            raise ValueError(f"predictor {name!r} must be one of {', '.join(map(repr, PREDICTORS))}")
    if "first_order" in chosen:
        require_gradients(model)
    change = Change(how, reference, natural_number(seed, "seed"))
    if shared:
        check_shared(model, change)
    router = model.cfg.router
    if how == "renormalize" and router.top_k == 1:
        raise ValueError("renormalize needs an expert that stays, and this model's routers choose one")
    eligible = router.top_k_groups * (router.n_experts // router.n_groups)
    if how == "reroute" and eligible - 1 < router.top_k:
        raise ValueError(
            f"reroute needs an expert to take the slot, and this model's routers choose all {eligible} that they may"
        )
    settings = Settings(
        layers=moe_layers_of(model.cfg, layers),
        change=change,
        scope=scope,
        shared=shared,
        outcomes=outcomes,
        predictors=chosen,
        null_branch=model.cfg.dtype != torch.float32,
        memory_budget=positive_integer(memory_budget, "memory_budget"),
    )
    names = settings.columns
    if len(set(names)) < len(names):
        raise ValueError(
            f"two columns would be named alike: {names}; give LogitDifferences names of their own"
        )
    return settings


def _identity(
    model: HookedMoE,
    settings: Settings,
    corpus: Corpus,
    documents: Documents,
    n: int | None,
    seed: int,
    noise_samples: int,
) -> dict[str, Any]:
    """What must be the same for a run to be gone on with, and what the table is of."""
    cfg = model.cfg
    return {
        "kind": "census",
        "model": cfg.model_name,
        "revision": cfg.revision,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model),
        **settings.change.describe(),
        "scope": settings.scope,
        "layers": list(settings.layers),
        "shared": settings.shared,
        "outcomes": [
            asdict(asked) if isinstance(asked, LogitDifference) else asked for asked in settings.outcomes
        ],
        "predictors": list(settings.predictors),
        "corpus": corpus.description,
        "tokens": documents.fingerprint,
        "columns": documents.columns,
        "documents": documents.names,
        "sample": None if n is None else {"n": n, "seed": seed},
        "memory_budget": settings.memory_budget,
        "noise_samples": noise_samples if settings.null_branch else 0,
        # The only column that is rounded otherwise where the layers come one at a time.
        **({"streamed": True} if isinstance(model, StreamedMoE) and "direct" in settings.predictors else {}),
        "versions": {name: version(name) for name in ("moe-lens", "torch", "transformers")},
    }


# ---- the run ----


def _groups(
    model: HookedMoE,
    documents: Documents,
    positions: Sequence[Int[Tensor, " n"]],
    settings: Settings,
    numbers: Sequence[int],
    passes_of: PassesOf | None,
    plan: CensusPlan,
    show: Callable[[int], None],
) -> Iterator[list[tuple[int, Mapping[str, np.ndarray | Tensor]]]]:
    """The rows of these documents, of those together that are measured together.

    Args:
        show: is told how many more ablations were made.
    """
    if passes_of is None:
        for number in numbers:
            yield [(number, _document(model, documents, number, positions[number], settings))]
            show(plan.ablations[number])
        return
    made, shown = 0.0, 0

    def advance(number: int, share: float) -> None:
        nonlocal made, shown
        made += share * plan.ablations[number]
        show(round(made) - shown)
        shown = round(made)

    yield from passes_of(numbers).rows(documents, positions, settings, advance)


def _document(
    model: HookedMoE,
    documents: Documents,
    number: int,
    places: Int[Tensor, " n"],
    settings: Settings,
) -> Mapping[str, np.ndarray | Tensor]:
    if len(places) == 0:
        return no_rows(settings)
    tokens, real = documents.rows[number]
    try:
        with said_what_would_help(documents.name(number), "shorter documents (max_length)"):
            clean = CleanRun.of(model, tokens, real)
        return rows_of(clean, places.to(clean.tokens.device), settings)
    except (FloatingPointError, ValueError) as error:
        raise type(error)(f"{documents.name(number)}: {error}") from error


def _noise(
    model: HookedMoE,
    documents: Documents,
    positions: Sequence[Int[Tensor, " n"]],
    settings: Settings,
    noise_samples: int,
    seed: int,
    passes_of: PassesOf | None,
    verbose: bool,
) -> NoiseFloor | None:
    if not settings.null_branch or noise_samples == 0:
        return None
    measured = [(row, places) for row, places in zip(documents.rows, positions, strict=True) if len(places)]
    sample: dict[str, Any] = dict(
        layers=settings.layers,
        n_samples=noise_samples,
        seed=seed,
        memory_budget=settings.memory_budget,
        verbose=verbose,
    )
    if passes_of is None:
        return noise_floor(model, measured, **sample)
    passes = passes_of(())
    return streamed_noise_floor(
        passes.model, measured, streams_budget=passes.budget, spill_directory=passes.spill_directory, **sample
    )

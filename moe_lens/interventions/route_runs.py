"""A corpus run once under each of some conditions: contributions and losses from the same passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.interventions.clean_run import require_no_hooks
from moe_lens.interventions.hooks import Interventions
from moe_lens.interventions.receipt import Receipt
from moe_lens.interventions.route_experiment import UNCHANGED, RouteCondition, RouteExperiment, described
from moe_lens.interventions.spec_base import Spec
from moe_lens.interventions.unread import UNREAD_BY, Unread
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import positive_integer
from moe_lens.routing.contributions import MEMORY_BUDGET, Batches, bos_id, contributions_of, corpus_of
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.provenance import TokenDigest, weights_fingerprint
from moe_lens.routing.runs import Corpus, Mask, Plan
from moe_lens.routing.streaming import ContributionAccumulator


@dataclass(frozen=True)
class Condition:
    """What is done to the model in one condition.

    Attributes:
        name: for results.
        specs: none is the unchanged model.
        unread: an expert whose scores routers are not given under these specs; see `Unread`.
    """

    name: str
    specs: tuple[Spec, ...]
    unread: str | None = None


@dataclass(frozen=True)
class RouteSettings:
    """What all experiments measure in the same way.

    Attributes:
        by: the granularity of senders: `layer`, `head` or `expert`.
        receivers: the routers that are read; None is all.
        attention_mask: of tokens given as one tensor.
        bos_is_lead: as in `routing_contributions`.
        memory_budget: bytes for the accumulators of all conditions, which stand beside each other.
        batch_size: documents run at once, of texts and of tokens given as one tensor.
        verbose: print the plan and show progress.
    """

    by: str = "layer"
    receivers: Sequence[int] | None = None
    attention_mask: Mask | None = None
    bos_is_lead: bool = True
    memory_budget: int = MEMORY_BUDGET
    batch_size: int = 8
    verbose: bool = False


class _Running:
    """One condition, batch by batch."""

    def __init__(self, model: HookedMoE, condition: Condition, settings: RouteSettings):
        self.model, self.condition = model, condition
        self.accumulator = ContributionAccumulator(
            model,
            by=settings.by,
            receivers=settings.receivers,
            left_out=None if settings.bos_is_lead else bos_id(model),
        )
        self.receipt = Receipt(condition.specs) if condition.specs else None
        self.loss_sums: list[Float[Tensor, " batch"]] = []

    @contextmanager
    def changed(self) -> Iterator[None]:
        """A batch under the condition's interventions, which are counted."""
        with ExitStack() as contexts:
            if self.condition.unread is not None:
                # Before the interventions, so that their hooks see values as they are.
                contexts.enter_context(Unread(self.model, self.condition.unread).open())
            receipt = None
            if self.condition.specs:
                receipt = contexts.enter_context(self.model.intervene(*self.condition.specs))
            yield
        if self.receipt is not None:
            assert receipt is not None
            self.receipt.n_runs += receipt.n_runs
            for (index, layer), line in receipt.lines.items():
                self.receipt.add(index, layer, asked=line.asked, fired=line.fired)

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        """One batch.

        Raises:
            ValueError: senders that do not sum to what the routers read.
            FloatingPointError: a loss is NaN or infinite.
        """
        with self.changed(), self.accumulator.listening(tokens, real):
            losses = self.model(tokens, attention_mask=real, return_type="loss", loss_per_token=True)
        self.accumulator.require_closed()
        has_loss = real[:, :-1] & real[:, 1:]
        broken = (has_loss & ~losses.isfinite()).nonzero()
        if len(broken):
            row, column = broken[0].tolist()
            raise FloatingPointError(
                f"condition {self.condition.name}: the loss is {float(losses[row, column])} at row {row}, position "
                f"{column} of a batch"
            )
        self.loss_sums.append(losses.double().masked_fill(~has_loss, 0.0).sum(dim=1).cpu())

    def result(self, corpus: Corpus, digest: str, by: str) -> RouteCondition:
        contributions = contributions_of(
            self.accumulator, corpus=[corpus.description], fingerprints=[digest], copy=False
        )[by]
        condition = self.condition
        if condition.specs:
            done = {"interventions": described(condition.specs)}
            unread = {} if condition.unread is None else {"unread": condition.unread}
            contributions = replace(contributions, provenance={**contributions.provenance, **done, **unread})
        return RouteCondition(
            condition.name,
            condition.specs,
            contributions,
            condition.unread,
            torch.cat(self.loss_sums).numpy(),
            self.receipt,
        )


def run_conditions(
    model: HookedMoE,
    batches: Batches,
    experiment: str,
    conditions: Sequence[Condition],
    settings: RouteSettings,
) -> RouteExperiment:
    """The corpus without a change, and under each condition: every batch is run once in each.

    Args:
        experiment: its name, for the provenance.

    Raises:
        ValueError: what makes no sense in this model, before anything runs; a model with hooks; no batches, or none
            with a token that has a next one.
        UnfiredIntervention: an intervention did not do all that it was asked for, or nothing in the whole corpus.
    """
    require_no_hooks(model)
    if settings.by not in UNREAD_BY:
        raise ValueError(f"by={settings.by!r} must be one of {', '.join(map(repr, UNREAD_BY))}")
    for condition in conditions:
        Interventions(model, condition.specs)
    corpus = corpus_of(model, batches, settings.attention_mask, settings.batch_size)
    every = [Condition(UNCHANGED, ()), *conditions]
    _check_memory(model, settings, len(every))
    running = [_Running(model, condition, settings) for condition in every]
    if settings.verbose:
        print(
            f"corpus: {corpus.description}\nplan: every batch once in each of {len(every)} conditions: "
            f"{', '.join(condition.name for condition in every)}"
        )
    digest, counts = TokenDigest(), []
    for given, given_mask in tqdm(corpus, total=corpus.n_batches, unit="batch", disable=not settings.verbose):
        tokens, mask = model.tokens_and_mask(given, given_mask)
        real = real_tokens(tokens, mask)
        digest.add(tokens, real)
        counts.append((real[:, :-1] & real[:, 1:]).sum(dim=1).cpu())
        for condition in running:
            condition.run(tokens, real)
    if not counts:
        raise ValueError("there were no batches, so there is nothing to measure")
    n_losses = torch.cat(counts).numpy()
    if not n_losses.any():
        raise ValueError("no position has a next token, so there is no loss to measure")
    results = [condition.result(corpus, digest.hexdigest(), settings.by) for condition in running]
    cfg = model.cfg
    return RouteExperiment(
        conditions={result.name: result for result in results},
        n_losses=n_losses.astype(np.int64),
        provenance={
            "experiment": experiment,
            "model": cfg.model_name,
            "revision": cfg.revision,
            "dtype": str(cfg.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(model),
            "by": settings.by,
            "corpus": corpus.description,
            "tokens": digest.hexdigest(),
            "conditions": {
                result.name: {
                    "interventions": described(result.specs),
                    "unread": result.unread,
                    "fired": 0 if result.receipt is None else result.receipt.fired,
                }
                for result in results
            },
        },
    )


def _check_memory(model: HookedMoE, settings: RouteSettings, n_conditions: int) -> None:
    """Raises:
    ValueError: no such receiver, or the accumulators take more than the budget.
    """
    budget = positive_integer(settings.memory_budget, "memory_budget")
    each = Plan.make(model, [settings.by], settings.receivers, 2**62, False, 0).bytes_needed
    if each * n_conditions > budget:
        raise ValueError(
            f"{n_conditions} conditions take {each * n_conditions:,} bytes of accumulators, over memory_budget="
            f"{budget:,}; give fewer conditions or receivers, or a larger budget"
        )

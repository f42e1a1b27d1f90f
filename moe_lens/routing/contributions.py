"""How much each sender moves each later router, over a corpus, as a stream: `routing_contributions`.

    result = routing_contributions(model, texts, by="expert")
    result.variance["rest"][result.senders.index("M1E9"), result.receiver_index("M5")]

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 5.1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from moe_lens.corpus import Document, TokenBatches, bos_by_default, refuse_bare_pair, token_batches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.held import Held
from moe_lens.routing.listener import NEURON_CHECKS
from moe_lens.routing.readout import Experts, check_experts, check_receivers
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.runs import Corpus, Mask, Plan, Run, contributions_of
from moe_lens.routing.senders import SourceAxis, check_granularity
from moe_lens.routing.shards import ShardedRun, Shards
from moe_lens.routing.streamed_runs import StreamedPlan

__all__ = ["MEMORY_BUDGET", "RoutingContributions", "Shards", "contributions_of", "routing_contributions"]

MEMORY_BUDGET = 4 * 2**30
"""Bytes that the accumulators of a pass may take, unless told otherwise."""

Batches = str | Sequence[str] | Tensor | TokenBatches | Iterable[Tensor | Sequence[Any]]


@overload
def routing_contributions(
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    by: str = "layer",
    shards: None = None,
    **settings: Any,
) -> RoutingContributions: ...
@overload
def routing_contributions(
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    by: Sequence[str],
    shards: None = None,
    **settings: Any,
) -> dict[str, RoutingContributions]: ...
@overload
def routing_contributions(
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    by: str | Sequence[str] = "layer",
    shards: Shards,
    **settings: Any,
) -> RoutingContributions | dict[str, RoutingContributions] | None: ...
def routing_contributions(  # pyright: ignore[reportInconsistentOverload]
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    by: str | Sequence[str] = "layer",
    receivers: Sequence[int] | None = None,
    experts: Experts = "all",
    attention_mask: Mask | None = None,
    rank_shift: bool = False,
    source_axis: SourceAxis = "position",
    max_positions: int | None = None,
    bos_is_lead: bool = True,
    memory_budget: int = MEMORY_BUDGET,
    batch_size: int = 8,
    allow_incomplete: bool = False,
    state: str | Path | None = None,
    save_every: float = 60.0,
    shards: Shards | None = None,
    verbose: bool = False,
) -> RoutingContributions | dict[str, RoutingContributions] | None:
    """Run a corpus and measure how much each sender moves each later router.

    On a streamed model (`HookedMoE.from_pretrained(..., stream=True)`) batches go through the layers together, in
    groups that fit into `memory_budget`, and each group takes one reading of the layers or two, whichever reads less;
    the numbers are the same, bit by bit on the CPU. The second reading needs hooks that do the same each time, and
    the receipt of an open `intervene` counts both. See `moe_lens.routing.streamed_runs`.

    Args:
        model: run without gradients.
        batches_or_texts: a text or several (one document each); tokens `[batch, pos]`, with `attention_mask`; what
            `corpus.token_batches` gives; or any iterable of batches, each tokens `[batch, pos]` or a tuple of tokens,
            the mask of real ones (or None), and whatever else, which is not read. Every row is one document.
        by: `"layer"`, `"head"`, `"source"`, `"expert"` or `"neuron"` (see `moe_lens.routing.senders`); several give a
            dict of results from one pass.
        receivers: MoE layers; None is all of them.
        experts: measured over all experts of a receiver, over those that it `"selected"` at the token, or over a list.
        attention_mask: of tokens given as one tensor.
        rank_shift: also measure `aarv`, `overlap` and `weight_change` (`moe_lens.routing.rank_shift`). It ranks all
            experts once for each sender and receiver: slow for sources, and very slow for neurons.
        source_axis: with `by="source"`, whether the senders are (head, source `"position"` in the document) or (head,
            `"offset"` back from the query).
        max_positions: with `by="source"`, the length of the longest document in tokens; None looks, where the batches
            can be looked at without being used up. A document counts for the positions (or offsets) that it has.
        bos_is_lead: whether a BOS token at the beginning of a document is its lead token. False leaves BOS out of
            every average, and the first token of text leads; as a source it stays, at position 0.
        memory_budget: bytes for the accumulators; more takes several passes. The results of all passes are then held
            together, on the CPU. Beside them stand what a batch needs: with `rank_shift` or `experts="selected"` its
            scores, tokens x senders x receivers x experts, so make batches small then. With a streamed model the budget
            is also for what the batches of a group hold between two layers; less makes smaller groups, which are read
            for more often.
        batch_size: documents run at once, of texts and of tokens given as one tensor. Where memory runs out at a
            batch, of whatever kind, it is run some documents at a time, which changes numbers by rounding only and is
            said in the log (`moe_lens.out_of_memory`); of a streamed model fewer batches go through the layers together
            then, and none is divided.
        allow_incomplete: measure also where the senders are not what the routers read, because hooks edit the stream
            between components; `completeness_error` and `rounding_ratio` then say by how much.
        state: a file in which the run's state is kept; a call with the same arguments goes on from it, and gives the
            same numbers, bit by bit on the CPU (on a GPU, sums whose order is not fixed may differ in the last digit).
        save_every: seconds between savings of the state, which is saved after a batch, or with a streamed model after
            a group of them. It is also saved when an interrupt or an error ends the run.
        shards: measure the corpus in shards, kept in a folder, with whatever other processes work there: see
            `moe_lens.routing.shards`. The result is then that of rank 0, and None at the others.
        verbose: print the plan and show a progress bar: of batches, or with a streamed model of layers times batches.

    Returns:
        Means over documents with their standard errors, lead token and rest apart; for several granularities, a dict
        of them.

    Raises:
        ValueError: a receiver that is no MoE layer; an unknown granularity, expert or setting; no batches; a row
            without a token; a score that is not finite; senders that do not sum to the logits; a state of another run;
            batches that can be gone through only once, or are others each time, where several passes are needed; ranks
            that see different runs; values that are others the second time, where a streamed model takes two readings.
        RankLost: another rank has ended.
        NotEnoughMemory: one document alone does not fit, or of a streamed model one batch; or memory ran out when part
            of a batch had been added: to accumulators of more than a quarter of a GiB, or in the second reading of a
            streamed model's layers. The state that is kept is of batches before.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-13.
    """
    corpus = corpus_of(model, batches_or_texts, attention_mask, batch_size)
    granularities = [check_granularity(name) for name in ([by] if isinstance(by, str) else by)]
    if "source" in granularities and max_positions is None:
        max_positions = corpus.longest()
    max_positions = None if max_positions is None else operator.index(max_positions)
    if max_positions is not None and max_positions < 1:
        raise ValueError(f"max_positions={max_positions} must be positive")
    listed = check_experts(model, experts, rank_shift=rank_shift)
    n_sources = max_positions or 0
    if isinstance(model, StreamedMoE):
        held = Held(
            model.cfg,
            tuple(granularities),
            check_receivers(model, receivers),
            model.cfg.n_experts if listed is None else len(listed),
            selected=isinstance(experts, str) and experts == "selected",
            rank_shift=rank_shift,
            n_checked=NEURON_CHECKS,
        )
        plan = StreamedPlan.of(model, corpus, held, memory_budget, n_sources)
    else:
        plan = Plan.make(model, granularities, receivers, memory_budget, rank_shift, n_sources)
    settings: dict[str, Any] = dict(
        by=granularities,
        experts=experts if listed is None else list(listed),
        rank_shift=rank_shift,
        source_axis=source_axis,
        max_positions=max_positions,
        left_out=None if bos_is_lead else bos_id(model),
    )
    if len(plan.chunks) > 1 and not corpus.can_be_repeated:
        raise ValueError(
            f"{plan.bytes_needed:,} bytes of accumulators are over memory_budget={memory_budget:,}, so the corpus must "
            f"be passed {len(plan.chunks)} times; give a list or TokenBatches rather than an iterator, or a larger "
            f"budget, or fewer receivers"
        )
    if state is not None and shards is not None:
        raise ValueError("a run in shards keeps them instead of a state: give one of state and shards")
    if verbose and (shards is None or shards.ranks.first):
        print(plan.describe(corpus))
    if shards is not None:
        whole = ShardedRun(model, corpus, plan, settings, shards, allow_incomplete, verbose).results()
        return whole[granularities[0]] if whole is not None and isinstance(by, str) else whole
    run = Run(
        model,
        corpus,
        plan,
        settings,
        None if state is None else Path(state),
        save_every,
        allow_incomplete,
        verbose,
    )
    results = run.results()
    return results[granularities[0]] if isinstance(by, str) else results


def corpus_of(model: HookedMoE, given: Batches, mask: Mask | None, batch_size: int) -> Corpus:
    """Whatever a caller gave to be run, as batches of (tokens, mask).

    Raises:
        ValueError: it is no text, no tokens and no batches; a mask that goes with nothing; `batch_size` below 1.
    """
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if mask is not None and not isinstance(given, Tensor):
        raise ValueError(
            "attention_mask goes with tokens given as one tensor; a batch is a tuple (tokens, mask)"
        )
    if isinstance(given, Tensor):
        real = real_tokens(given, mask)
        batches = list(zip(given.split(batch_size), real.split(batch_size), strict=True))
        return Corpus(batches, True, f"{given.shape[0]} rows of tokens given by the caller")
    refuse_bare_pair(given)
    if isinstance(given, str) or (isinstance(given, Sequence) and given and isinstance(given[0], str)):
        texts = [given] if isinstance(given, str) else list(given)
        strange = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if strange:
            raise ValueError(f"texts must all be strings, and there is one of type {strange[0]}")
        documents = [Document(f"text {i}", "", text) for i, text in enumerate(texts)]  # type: ignore[arg-type]
        given = token_batches(
            model,
            documents,
            batch_size=batch_size,
            prepend_bos=bos_by_default(model),
            description=f"{len(documents)} texts given by the caller",
        )
    if isinstance(given, TokenBatches):
        return Corpus(given, True, given.description)
    if isinstance(given, Mapping):
        raise ValueError(
            f"texts, tokens or batches of tokens are wanted, not {type(given).__name__}; of a tokenizer's output give "
            f"the 'input_ids', and the 'attention_mask' as attention_mask="
        )
    if not isinstance(given, Iterable):
        raise ValueError(f"texts, tokens or batches of tokens are wanted, not {type(given).__name__}")
    return Corpus(given, iter(given) is not given, "batches of tokens given by the caller")


def bos_id(model: HookedMoE) -> int:
    """The token that `bos_is_lead=False` leaves out.

    Raises:
        ValueError: there is none.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.bos_token_id is None:
        raise ValueError(
            f"bos_is_lead=False needs a BOS token, and {model.cfg.model_name} has no tokenizer with one"
        )
    return int(tokenizer.bos_token_id)

"""`routing_contributions` of a model in nnsight: a corpus is measured where the model runs, and only moments come back.

See `moe_lens.routing.contributions`, whose function this is the counterpart of.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Int
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from moe_lens.interop.nnsight.contribution_results import Total, result_bytes, results_of
from moe_lens.interop.nnsight.jobs import Analysis, Job, Remote, Step, host_of, run
from moe_lens.interop.nnsight.model import edits_of, facts_of, inputs_of, structure_of, tokens_of
from moe_lens.interop.nnsight.shipped.contributions import LEAD, LEFT_OUT, REST, measure_batch
from moe_lens.interop.nnsight.shipped.moments import merge_results
from moe_lens.routing import contributions as counterpart
from moe_lens.routing.contributions import Batches, bos_id, corpus_of
from moe_lens.routing.documents import position_classes
from moe_lens.routing.provenance import TokenDigest, weights_fingerprint
from moe_lens.routing.readout import Experts, check_experts, check_receivers
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.runs import Mask
from moe_lens.routing.senders import Senders, check_granularity, senders_before

GRANULARITIES = ("layer", "head", "expert")

Results = RoutingContributions | dict[str, RoutingContributions]


def contributions_analysis(
    lm: TransformersModel,
    batches_or_texts: Batches,
    *,
    by: str | Sequence[str] = "layer",
    receivers: Sequence[int] | None = None,
    experts: Experts = "all",
    attention_mask: Mask | None = None,
    bos_is_lead: bool = True,
    batch_size: int = 8,
    batches_per_job: int = 8,
    allow_incomplete: bool = False,
    state: str | Path | None = None,
    ran: str | None = None,
    **others: Any,
) -> Analysis[Results]:
    """See `routing_contributions`. `ran` says where it will; None where nothing will, and it is only planned."""
    _refuse(others)
    structure = structure_of(lm)
    granularities = _granularities(by)
    chosen = check_receivers(structure, receivers)
    listed = check_experts(structure, experts, rank_shift=False)
    left_out = None if bos_is_lead else bos_id(structure)
    if operator.index(batches_per_job) < 1:
        raise ValueError(f"batches_per_job={batches_per_job} must be positive")
    corpus = corpus_of(structure, batches_or_texts, attention_mask, batch_size)
    batches = [tokens_of(structure, tokens, mask) for tokens, mask in corpus]
    steps = [_step(tokens, mask, left_out) for tokens, mask in batches]
    if not any(bool((step.arguments["classes"] == LEAD).any()) for step in steps):
        raise ValueError("there were no batches, so there is nothing to average over")

    cfg = structure.cfg
    senders = {name: senders_before(cfg, chosen[-1], name) for name in granularities}
    firsts = {name: first_receivers(of, chosen) for name, of in senders.items()}
    asked = {
        "receivers": list(chosen),
        "experts": None if listed is None else list(listed),
        "selected": isinstance(experts, str) and experts == "selected",
        "groups": {
            name: {
                group.component: [group.kind, len(group), first]
                for group, first in zip(of.groups, firsts[name], strict=True)
            }
            for name, of in senders.items()
        },
    }
    jobs = [
        Job(
            function=measure_batch,
            arguments={"facts": facts_of(cfg), "asked": asked},
            steps=steps[start : start + batches_per_job],
            result_bytes=result_bytes(asked, cfg.dtype),
            fold=merge_results,
        )
        for start in range(0, len(steps), batches_per_job)
    ]
    model_and_settings = {
        "model": cfg.model_name,
        "revision": cfg.revision,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "weights": None if ran is None else _weights(lm, ran),
        "ran": ran,
        "edited": edits_of(lm),
        "experts": experts if listed is None else list(listed),
        "source_axis": None,
        "lead_token": "the first token of a document"
        if left_out is None
        else f"the first token after BOS (token {left_out}), which is left out",
        "moe_lens": version("moe-lens"),
    }
    identity = {
        **model_and_settings,
        "by": granularities,
        "receivers": list(chosen),
        "batches_per_job": batches_per_job,
        "batches": _fingerprint(batches),
    }
    total = Total(None if state is None else Path(state), identity, allow_incomplete)

    def finish(_: list[list[Any]]) -> Results:
        assert total.result is not None
        digest = TokenDigest()
        for tokens, mask in batches:
            digest.add(tokens, mask)
        provenance = {
            **model_and_settings,
            # As it ran: a server may hold the model in another precision than its config says.
            "dtype": total.result["dtype"],
            "corpus": [corpus.description],
            "fingerprints": [digest.hexdigest()],
        }
        results = results_of(total.result, senders, firsts, chosen, provenance)
        return results[granularities[0]] if isinstance(by, str) else results

    # The total holds what these gave.
    kept: dict[int, list[Any]] = {number: [] for number in range(total.n_jobs)}
    return Analysis("routing_contributions", jobs, finish, kept, total.add)


@overload
def routing_contributions(
    lm: TransformersModel, batches_or_texts: Batches, *, by: str = "layer", **settings: Any
) -> RoutingContributions: ...
@overload
def routing_contributions(
    lm: TransformersModel, batches_or_texts: Batches, *, by: Sequence[str], **settings: Any
) -> dict[str, RoutingContributions]: ...
def routing_contributions(  # pyright: ignore[reportInconsistentOverload]
    lm: TransformersModel,
    batches_or_texts: Batches,
    *,
    by: str | Sequence[str] = "layer",
    receivers: Sequence[int] | None = None,
    experts: Experts = "all",
    attention_mask: Mask | None = None,
    bos_is_lead: bool = True,
    batch_size: int = 8,
    batches_per_job: int = 8,
    allow_incomplete: bool = False,
    state: str | Path | None = None,
    remote: Remote = False,
    verbose: bool = False,
    **others: Any,
) -> Results:
    """Run a corpus and measure how much each sender moves each later router, where the model runs.

        by_expert = routing_contributions(lm, texts, by="expert", remote=True)

    What comes back of a job is one mean and one spread for each measure, sender and receiver, so that its size does not
    depend on the corpus. Where the model runs, a batch takes tokens x senders at a token x receivers x 20 bytes, summed
    over its components, beside the model's own activations; with `experts="selected"` also what all senders write. Make
    batches small where that is too much.

    Args:
        lm: an nnsight `TransformersModel` of one of the five families; its weights need not be here where it runs
            remotely.
        batches_or_texts: a text or several (one document each); tokens `[batch, pos]`, with `attention_mask`; what
            `corpus.token_batches` gives; or any iterable of batches, each tokens `[batch, pos]` or a tuple of tokens,
            the mask of real ones (or None), and whatever else, which is not read. Every row is one document.
        by: `"layer"`, `"head"` or `"expert"` (see `moe_lens.routing.senders`); several give a dict of results from one
            run.
        receivers: MoE layers; None is all of them.
        experts: measured over all experts of a receiver, over those that it `"selected"` at the token, or over a list.
        attention_mask: of tokens given as one tensor.
        bos_is_lead: whether a BOS token at the beginning of a document is its lead token. False leaves BOS out of every
            average, and the first token of text leads.
        batch_size: documents run at once, of texts and of tokens given as one tensor.
        batches_per_job: forward passes of one job: of one request, where it runs remotely.
        allow_incomplete: measure also where the senders are not what the routers read; `completeness_error` and
            `rounding_ratio` then say by how much.
        state: a file in which what was measured is kept after each job; the same call goes on from it, and gives the
            same numbers, bit by bit on the CPU.
        remote: `False`, `True`, `"local"` or a URL; see `moe_lens.interop.nnsight.jobs`.
        verbose: print the plan first.
        others: what the counterpart alone has: `rank_shift` and such. They are refused.

    Returns:
        What `moe_lens.routing.contributions.routing_contributions` gives of a HookedMoE. `provenance["ran"]` says where
        it ran, `provenance["dtype"]` in which precision, `provenance["edited"]` which edits of nnsight (`lm.edit`) were
        made of the model meanwhile: the source of each, and a digest of it with its values; hooks of torch, that the
        model in this process may have, are not known of. `provenance["weights"]` is a fingerprint where it ran in this
        process, of the parameters as
        transformers names them; of weights on a server none can be made, and it says by which name and revision they
        were asked for. Results of different corpora can be added where these agree. The sender `rounding` is there in
        half precision, and so it is where a model in float32 runs under autocast; if its experts run in half precision
        then, theirs, which are computed again in float32, may miss what was written by more than `closes` allows.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these; a setting that nothing has.
        ValueError: a receiver that is no MoE layer; an unknown granularity, expert or setting, or one that is served
            only by HookedMoE; no batches; a row without a token; a score that is not finite; senders that do not sum to
            the logits; a state of another run; a wrong `remote`.
        FileNotFoundError: the folder of `state` does not exist.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-13.
    """
    host = host_of(remote)
    analysis = contributions_analysis(
        lm,
        batches_or_texts,
        by=by,
        receivers=receivers,
        experts=experts,
        attention_mask=attention_mask,
        bos_is_lead=bos_is_lead,
        batch_size=batch_size,
        batches_per_job=batches_per_job,
        allow_incomplete=allow_incomplete,
        state=state,
        ran=HERE if host is None else f"in nnsight, at {host}",
        **others,
    )
    return run(lm, analysis, remote, verbose=verbose)


HERE = "in nnsight, in this process"


def _refuse(others: dict[str, Any]) -> None:
    known = inspect.signature(counterpart.routing_contributions).parameters
    for name in others:
        if name not in known:
            raise TypeError(f"routing_contributions has no setting {name!r}")
        raise ValueError(
            f"{name} is not served in nnsight; moe_lens.routing.contributions.routing_contributions has it, of a "
            f"HookedMoE"
        )


def _granularities(by: str | Sequence[str]) -> list[str]:
    names: list[str] = [check_granularity(name) for name in ([by] if isinstance(by, str) else by)]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"by={by!r} must name granularities, each once")
    for name in names:
        if name not in GRANULARITIES:
            raise ValueError(
                f"by={name!r} is not served in nnsight, where there are {', '.join(map(repr, GRANULARITIES))}; "
                f"moe_lens.routing.contributions.routing_contributions has it, of a HookedMoE"
            )
    return names


def first_receivers(senders: Senders, receivers: Sequence[int]) -> list[int]:
    """For each group of senders, the place of the first receiver that it reaches: an MLP writes after its router."""
    return [
        0
        if group.layer is None
        else next(i for i, r in enumerate(receivers) if r >= group.layer + group.component.startswith("M"))
        for group in senders.groups
    ]


def _step(tokens: Int[Tensor, "batch pos"], mask: Mask, left_out: int | None) -> Step:
    """The forward pass of a batch."""
    real = mask.bool()
    of = position_classes(tokens, real, left_out)
    classes = torch.zeros_like(tokens, dtype=torch.int8)
    for members, what in ((real, LEFT_OUT), (of["lead"], LEAD), (of["rest"], REST)):
        classes.masked_fill_(members, what)
    return Step(inputs_of(tokens, real), {"shape": list(tokens.shape), "classes": classes})


def _fingerprint(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Of batches with their padding: other batches of the same documents give numbers that differ in the last digit."""
    digest = hashlib.sha256()
    for tokens, mask in batches:
        digest.update(repr(tuple(tokens.shape)).encode())
        digest.update(tokens.numpy().tobytes() + mask.numpy().tobytes())
    return digest.hexdigest()


def _weights(lm: TransformersModel, ran: str) -> str:
    """A fingerprint of weights that are here; of others, the name by which they are asked for."""
    if ran == HERE and not lm.dispatched:
        lm.dispatch()
    module: Any = lm._module
    if ran == HERE and not any(parameter.is_meta for parameter in module.parameters()):
        return weights_fingerprint(module)
    return f"not read: those of {lm.repo_id}, revision {lm.revision or 'not given'}"

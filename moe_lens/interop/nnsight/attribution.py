"""`router_logit_attrs` and `logit_attrs` of a model in nnsight: scores are made in the trace, and only these come
back."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Int
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from moe_lens.interop.nnsight.jobs import Analysis, Job, Remote, Step, run
from moe_lens.interop.nnsight.model import attention_facts, facts_of, inputs_of, structure_of, tokens_of
from moe_lens.interop.nnsight.shipped.scores import router_scores, token_scores
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.text import Text
from moe_lens.routing.attribution import (
    RouterLogitAttrs,
    check_dense,
    relative_error,
    require_finite,
    sender_hooks,
    with_rounding,
)
from moe_lens.routing.logit_attribution import (
    FEWER,
    LogitAttrs,
    Positions,
    Tokens,
    columns_of,
    sum_error,
    token_ids,
)
from moe_lens.routing.readout import check_receiver
from moe_lens.routing.rounding import stream_rounds
from moe_lens.routing.senders import Senders, senders_before, senders_of_all

# ---- routers ----


def router_logit_attrs_analysis(
    lm: TransformersModel,
    text: Text | Int[Tensor, "batch pos"],
    *,
    receiver: int,
    by: str = "layer",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Analysis[RouterLogitAttrs]:
    """See `router_logit_attrs`."""
    structure = structure_of(lm)
    receiver = check_receiver(structure, receiver)
    tokens, mask = tokens_of(structure, text, attention_mask, prepend_bos)
    senders = senders_before(structure.cfg, receiver, by, n_sources=tokens.shape[1])
    n_places, n_experts = tokens.numel(), structure.cfg.n_experts
    check_dense(
        len(senders) * n_places * n_experts,
        by,
        f"routing_contributions(lm, texts, by={by!r}) measures them as a stream",
    )
    job = Job(
        function=router_scores,
        arguments={
            "facts": _facts(structure, by, mask),
            "groups": plain_groups(structure, senders),
            "receiver": receiver,
            "shape": list(tokens.shape),
        },
        steps=[Step(inputs_of(tokens, mask))],
        result_bytes=_result_bytes(structure, senders, n_places, n_experts),
    )

    def finish(results: list[list[Any]]) -> RouterLogitAttrs:
        found = results[0][0]
        sent, logits = found["values"], found["logits"]
        real = mask.to(sent.device)
        require_finite(sent[:, real], f"the scores at layer {receiver}")
        require_finite(logits[real], f"the router's logits at layer {receiver}")
        return RouterLogitAttrs(
            values=sent,
            senders=with_rounding(senders) if "rounding_ratio" in found else senders,
            logits=logits,
            completeness_error=relative_error(sent[:, real].sum(dim=0), logits[real]),
            rounding_ratio=_rounding_ratio(found, real),
            model_logit_difference=float(found["model_logit_difference"][real].max()),
            receiver=receiver,
            by=by,
        )

    return Analysis("router_logit_attrs", [job], finish)


def router_logit_attrs(
    lm: TransformersModel,
    text: Text | Int[Tensor, "batch pos"],
    *,
    receiver: int,
    by: str = "layer",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    remote: Remote = False,
    verbose: bool = False,
) -> RouterLogitAttrs:
    """Divide the logits of one router among the components that wrote into the stream it reads.

    The scores are made in the trace, in float32 with autocast off; the forward pass ends at the router.

    Args:
        lm: an nnsight `TransformersModel` of one of the five families; its weights need not be here where it runs
            remotely.
        text: one or several, padded on the right as HookedMoE pads them; or tokens `[batch, pos]`.
        receiver: the MoE layer whose router is explained.
        by: how finely: `"layer"`, `"head"`, `"source"` (head and source token; the pattern is computed again, and held
            against what the model made of it), `"expert"` or `"neuron"`.
        attention_mask: of tokens, `[batch, pos]`, 1 where they are real; padding may lie on either side.
        prepend_bos: as in `HookedMoE.tokenize`.
        remote: `False`, `True`, `"local"` or a URL; see `moe_lens.interop.nnsight.jobs`.
        verbose: print the plan first.

    Returns:
        What `moe_lens.routing.router_logit_attrs` makes of HookedMoE's cache of the same tokens: scores `[sender,
        batch, pos, expert]` in router logits, on the CPU where it ran remotely, with the error of their sum. Padded
        positions have scores that mean nothing, and the errors are of the real ones. `rounding` is a sender in half
        precision, and also where a model in float32 runs under a half-precision autocast; experts' outputs are
        computed without it, so that `rounding_ratio` may then be above 1.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these.
        ValueError: the receiver is no MoE layer; an unknown granularity; tokens that make no sense; more than
            `moe_lens.routing.attribution.DENSE_LIMIT` scores; a wrong `remote`: all before anything runs. A value
            at a real position that is not finite.
        RuntimeError: a pattern that, computed again, does not make the model's z; on a server that gives this key no
            weights, neurons, and an output bias in half precision (nnsight's RemoteError carries it).

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 8-11.
    """
    analysis = router_logit_attrs_analysis(
        lm, text, receiver=receiver, by=by, attention_mask=attention_mask, prepend_bos=prepend_bos
    )
    return run(lm, analysis, remote, verbose=verbose)


# ---- logits ----


def logit_attrs_analysis(
    lm: TransformersModel,
    text: Text | Int[Tensor, "batch pos"],
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    by: str = "layer",
    positions: Positions | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Analysis[LogitAttrs]:
    """See `logit_attrs`."""
    structure = structure_of(lm)
    read, mask = tokens_of(structure, text, attention_mask, prepend_bos)
    columns = columns_of(positions, *read.shape)
    real = mask.gather(1, columns)
    if not bool(real.any()):
        raise ValueError(f"positions {positions!r} hold nothing but padding, where scores mean nothing")
    correct = token_ids(structure, tokens, columns.shape, "tokens")
    incorrect = None
    if incorrect_tokens is not None:
        incorrect = token_ids(structure, incorrect_tokens, columns.shape, "incorrect_tokens")
    senders = senders_of_all(structure.cfg, by, n_sources=read.shape[1])
    check_dense(len(senders) * columns.numel(), by, FEWER)
    job = Job(
        function=token_scores,
        arguments={
            "facts": _facts(structure, by, mask),
            "groups": plain_groups(structure, senders),
            "columns": columns.tolist(),
            "tokens": correct.tolist(),
            "incorrect": None if incorrect is None else incorrect.tolist(),
            "shape": list(read.shape),
        },
        steps=[Step(inputs_of(read, mask))],
        result_bytes=_result_bytes(structure, senders, columns.numel(), 1),
    )

    def finish(results: list[list[Any]]) -> LogitAttrs:
        found = results[0][0]
        sent, logits = found["values"], found["logits"]
        there = real.to(sent.device)
        require_finite(sent[:, there], "the scores")
        require_finite(logits[there], "the logits")
        return LogitAttrs(
            values=sent,
            senders=with_rounding(senders) if "rounding_ratio" in found else senders,
            logits=logits,
            tokens=correct.to(sent.device),
            incorrect_tokens=None if incorrect is None else incorrect.to(sent.device),
            positions=columns.to(sent.device),
            completeness_error=sum_error(sent[:, there], logits[there]),
            rounding_ratio=_rounding_ratio(found, there),
            model_logit_difference=float(found["model_logit_difference"][there].max()),
            by=by,
        )

    return Analysis("logit_attrs", [job], finish)


def logit_attrs(
    lm: TransformersModel,
    text: Text | Int[Tensor, "batch pos"],
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    by: str = "layer",
    positions: Positions | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    remote: Remote = False,
    verbose: bool = False,
) -> LogitAttrs:
    """Divide the logits of some tokens, or their difference from those of others, among the components that wrote
    them.

    The scores are made in the trace, in float32 with autocast off; the logits of the rest of the vocabulary are not.

    Args:
        lm, text: as in `router_logit_attrs`.
        tokens, incorrect_tokens, positions: as in `moe_lens.routing.logit_attrs`: tokens as text (a single token each)
            or ids, for all places, each text, each position asked for, or each place; positions are columns of the
            tokens that run, None all of them.
        by: how finely: `"layer"`, `"head"`, `"source"`, `"expert"` or `"neuron"`.
        attention_mask, prepend_bos, remote, verbose: as in `router_logit_attrs`.

    Returns:
        What `moe_lens.routing.logit_attrs` makes of HookedMoE's cache of the same tokens: scores `[sender, batch, pos]`
        in logits, on the CPU where it ran remotely, with the error of their sum; padding and `rounding` as in
        `router_logit_attrs`. `model_logit_difference` is the distance to the model's own final norm, times the
        unembedding.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these; tokens or positions that are no integers.
        ValueError: an unknown granularity; tokens or positions that make no sense, or hold nothing but padding; more
            than `moe_lens.routing.attribution.DENSE_LIMIT` scores; a wrong `remote`: all before anything runs. A value
            at a real position that is not finite.
        RuntimeError: a pattern that, computed again, does not make the model's z; on a server that gives this key no
            weights, neurons, and an output bias in half precision (nnsight's RemoteError carries it).

    Source: TransformerLens's `ActivationCache.logit_attrs`; "Interpretability in the Wild" (arXiv:2211.00593).
    """
    analysis = logit_attrs_analysis(
        lm,
        text,
        tokens,
        incorrect_tokens,
        by=by,
        positions=positions,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    return run(lm, analysis, remote, verbose=verbose)


# ---- both ----


def _facts(structure: HookedMoE, by: str, mask: Bool[Tensor, "batch pos"]) -> dict[str, Any]:
    """What the shipped functions have to know; for sources, what a pattern is made of too."""
    facts = facts_of(structure.cfg)
    return {**facts, **attention_facts(structure.cfg, mask)} if by == "source" else facts


def plain_groups(structure: HookedMoE, senders: Senders) -> list[dict[str, Any]]:
    """The groups of senders as shipped functions take them."""
    return [
        {
            "layer": group.layer,
            "kind": group.kind,
            "written_at": group.written_at,
            "hooks": sender_hooks(structure, Senders([group])),
        }
        for group in senders.groups
    ]


def _result_bytes(structure: HookedMoE, senders: Senders, n_places: int, n_rows: int) -> int:
    """Scores, their logits, and one number or two of each place, all in float32."""
    rounds = stream_rounds(structure.cfg.dtype)
    return 4 * n_places * (n_rows * (len(senders) + rounds + 1) + 1 + rounds)


def _rounding_ratio(found: dict[str, Tensor], real: Bool[Tensor, "batch pos"]) -> float | None:
    """The largest at a real position; None where nothing rounds."""
    ratio = found.get("rounding_ratio")
    return None if ratio is None else float(ratio[real].max())

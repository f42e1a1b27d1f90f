"""Why one router took one expert at one token, or left it out: `explain`."""

from __future__ import annotations

import operator

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few
from moe_lens.routing.decision import Decision
from moe_lens.routing.explanation import Explanation, PresentSender, explanation_of
from moe_lens.routing.one_token import OneToken
from moe_lens.routing.readout import check_receiver
from moe_lens.routing.senders import check_granularity

__all__ = ["Explanation", "explain"]


def explain(
    model: HookedMoE,
    text_or_tokens: str | Int[Tensor, "one pos"] | Int[Tensor, " pos"],
    pos: int | str,
    router: int,
    expert: int,
    by: str = "layer",
    *,
    attention_mask: Bool[Tensor, "one pos"] | Int[Tensor, "one pos"] | None = None,
    prepend_bos: bool | None = None,
    against: int | None = None,
) -> Explanation:
    """Why, at one token, the router of a layer chose an expert or left it out.

    The expert is compared with its boundary: a chosen one with the best left out (rank K+1), one left out with the
    worst chosen (rank K), by exact logits. Under group-limited routing the best left out is that of the eligible
    groups, as long as they hold more than K experts; and an expert outside of them may have a higher logit than its
    boundary, which the summary then says.

    Args:
        model: run once, up to that layer, without gradients. Hooks that it carries act. In half precision this run
            computes attention step by step, as any run does whose patterns are looked at, and may differ by rounding
            from one that is not.
        text_or_tokens: one text, or the tokens of one.
        pos: the token's column, negative from the end; or its text, where it occurs exactly once (spaces around it
            may be left away).
        router: an MoE layer.
        expert: one of its experts.
        by: `"layer"`, `"head"`, `"source"`, `"expert"` or `"neuron"` (see `moe_lens.routing.senders`).
        attention_mask: true where tokens are real.
        prepend_bos: of a text; see `model.tokenize`.
        against: the expert to compare with, instead of the boundary.

    Returns:
        The contributions of all senders, in router logits; `drill` divides them further.

    Raises:
        ValueError: not one text; no such position, or padding there; no MoE layer, expert or granularity; a router
            that chooses all its experts, so that nothing is left out; logits that are not finite; by source, a hook
            that has the token attend to what it cannot see.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-11.
    """
    check_receiver(model, router)
    granularity = check_granularity(by)
    expert = _checked_expert(model, expert, "expert")
    against = None if against is None else _checked_expert(model, against, "against")
    if prepend_bos is not None and isinstance(text_or_tokens, Tensor):
        raise ValueError("prepend_bos goes with text; tokens are taken as they are")
    tokens, mask = model.tokens_and_mask(text_or_tokens, attention_mask, prepend_bos=prepend_bos)
    if len(tokens) != 1:
        raise ValueError(f"explain takes one text at a time, not {len(tokens)}")
    ids = tokens[0].tolist()
    strings = tuple(str(i) if model.tokenizer is None else str(model.to_string(i)) for i in ids)
    column = _column(pos, strings)
    if mask is not None and not bool(mask[0, column]):
        real = mask[0].nonzero()[:, 0].tolist()
        raise ValueError(f"position {column} is padding; real tokens are at {few(real)}")

    token = OneToken.run(model, tokens, mask, router, column)
    decision = Decision.of(token, expert, against)
    groups = token.groups(granularity)
    senders = [PresentSender(name, group, i) for group in groups for i, name in enumerate(token.names(group))]
    rounding, ratio = token.rounding(groups) if decision.rounds else (None, None)
    return explanation_of(
        decision,
        senders,
        scores=torch.cat([token.scores(group, decision.rows) for group in groups]) / decision.scale,
        wanted=decision.rows @ token.at_receiver("hook_resid_mid").float() / decision.scale,
        rounding=rounding,
        rounding_ratio=ratio,
        by=granularity,
        of=None,
        n_absent=sum(map(len, groups)) - len(senders),
        tokens=strings,
    )


def _checked_expert(model: HookedMoE, expert: object, name: str) -> int:
    try:
        index = -1 if isinstance(expert, (bool, np.bool_)) else operator.index(expert)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    if not 0 <= index < model.cfg.n_experts:
        raise ValueError(
            f"{name}={expert!r} is no expert; {model.cfg.model_name} has experts 0 to {model.cfg.n_experts - 1}"
        )
    return index


def _column(pos: int | str, tokens: tuple[str, ...]) -> int:
    """A position, given as a column, a negative one from the end, or a token's text."""
    if isinstance(pos, str):
        same = [i for i, token in enumerate(tokens) if token == pos]
        same = same or [i for i, token in enumerate(tokens) if token.strip() == pos.strip() != ""]
        if len(same) == 1:
            return same[0]
        if same:
            raise ValueError(f"the token {pos!r} occurs at positions {few(same)}; give one of them")
        raise ValueError(f"there is no token {pos!r}; the tokens are {few([*map(repr, tokens)])}")
    try:
        column = None if isinstance(pos, (bool, np.bool_)) else operator.index(pos)
    except TypeError:
        column = None
    if column is None or not -len(tokens) <= column < len(tokens):
        raise ValueError(f"there is no position {pos!r} among the {len(tokens)} tokens")
    return column % len(tokens)

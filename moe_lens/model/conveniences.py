"""What people reach for first: where tokens were routed, and by how much one answer beats another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from moe_lens.model.hooked_moe import HookedMoE
    from moe_lens.model.text import Text


def routing_table(
    model: HookedMoE,
    tokens_or_text: Int[Tensor, "batch pos"] | Text,
    *,
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
) -> pd.DataFrame:
    """Which experts each token chose: one row per (document, position, layer, chosen expert).

    Args:
        tokens_or_text: tokens, or one or more texts.
        attention_mask: true where tokens are real; padding gets no rows.

    Returns:
        Columns `document`, `position`, `token` (text, or the id where there is no tokenizer), `layer`,
        `rank` (1 is the heaviest), `expert`, `routing_weight` (as applied), `probability` (over all experts,
        before top-k) and `router_logit`. `position` counts real tokens of its document from 0.
    """
    if not model.cfg.moe_layers:
        raise ValueError(f"{model.cfg.model_name} has no MoE layer, so nothing is routed")
    tokens, mask = model.tokens_and_mask(tokens_or_text, attention_mask)
    points = ("hook_router_logits", "hook_expert_weights", "hook_expert_indices", "hook_routing_weights")
    names = [f"blocks.{layer}.mlp.{point}" for layer in model.cfg.moe_layers for point in points]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names, return_type=None)

    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    document = real.nonzero(as_tuple=True)[0].tolist()
    position = (real.long().cumsum(dim=1) - 1)[real].tolist()
    ids = tokens[real].tolist()
    text = ids if model.tokenizer is None else [model.to_string(i) for i in ids]

    frames = []
    for layer in model.cfg.moe_layers:
        logits, probabilities, indices, weights = (
            cache[f"blocks.{layer}.mlp.{p}"][real].cpu() for p in points
        )
        k = indices.shape[-1]
        # By weight, not by slot: forced experts keep the caller's order.
        ranks = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
        frames.append(
            pd.DataFrame(
                {
                    "document": torch.tensor(document).repeat_interleave(k),
                    "position": torch.tensor(position).repeat_interleave(k),
                    "token": [t for t in text for _ in range(k)],
                    "layer": layer,
                    "rank": ranks.flatten(),
                    "expert": indices.flatten(),
                    "routing_weight": weights.float().flatten(),
                    "probability": probabilities.gather(-1, indices).float().flatten(),
                    "router_logit": logits.gather(-1, indices).float().flatten(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True).sort_values(
        ["document", "position", "layer", "rank"], ignore_index=True
    )


def logit_difference(
    model: HookedMoE,
    prompts: Int[Tensor, "batch pos"] | Text,
    correct: str | int | list[str] | list[int] | Int[Tensor, " batch"],
    incorrect: str | int | list[str] | list[int] | Int[Tensor, " batch"],
    *,
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, " batch"]:
    """logit(correct) - logit(incorrect) at the last real token of every prompt, in logits.

    Args:
        prompts: tokens, or one or more texts.
        correct, incorrect: one token (text or id) for all prompts, or one for each.

    Raises:
        ValueError: an answer that is not one token, or as many answers as there are no prompts.
    """
    tokens, mask = model.tokens_and_mask(prompts, attention_mask, prepend_bos=prepend_bos)
    answers = [_answer_tokens(model, answer, tokens.shape[0]) for answer in (correct, incorrect)]
    logits = model(tokens, attention_mask=mask)
    if mask is None:
        last = torch.full((tokens.shape[0],), tokens.shape[1] - 1, device=tokens.device)
    else:
        last = torch.arange(tokens.shape[1], device=tokens.device).masked_fill(~mask, -1).amax(dim=1)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return logits[rows, last, answers[0]] - logits[rows, last, answers[1]]


def _answer_tokens(
    model: HookedMoE, answer: str | int | list[str] | list[int] | Tensor, n_prompts: int
) -> Int[Tensor, " batch"]:
    if isinstance(answer, Tensor):
        ids = answer.flatten().tolist()
    else:
        answers = [answer] if isinstance(answer, (str, int)) else list(answer)
        ids = [model.to_single_token(a) if isinstance(a, str) else a for a in answers]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"an answer is one token, as text or as an integer id, not {ids}")
    if len(ids) == 1:
        ids = ids * n_prompts
    if len(ids) != n_prompts:
        raise ValueError(f"{len(ids)} answers for {n_prompts} prompts; give one for all, or one for each")
    outside = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if outside:
        raise ValueError(f"answer token {outside[0]} lies outside the vocabulary of {model.cfg.d_vocab}")
    return torch.tensor(ids, device=model.cfg.device)

"""Text generation with a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.attend import Attend, KeyValueCache
from moe_lens.model.observers import Run

if TYPE_CHECKING:
    from moe_lens.model.hooked_moe import HookedMoE


@torch.no_grad()
def generate_tokens(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | None,
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | list[int] | None,
    seed: int | None,
) -> Int[Tensor, "batch longer"]:
    """Extend every row by up to `max_new_tokens`.

    After the token that ended it, a row is filled with the padding token (with that token where the checkpoint
    names none); generation stops when all rows have ended. Positions count real tokens only, so that left
    padding changes nothing.
    """
    _check_sampling(max_new_tokens, do_sample, temperature, top_k, top_p, model.cfg.d_vocab)
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("generate needs rows that end in a real token: pad on the left")
    if max_new_tokens == 0:
        return tokens
    end_ids = torch.tensor(
        [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    )
    end_ids = end_ids.to(tokens.device, torch.long)
    generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(seed)

    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
    next_position = real.sum(dim=1)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    past = KeyValueCache()
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    pad = model.cfg.pad_token_id
    fill = None if not len(end_ids) else end_ids[0] if pad is None else end_ids.new_tensor(pad)
    out, step, step_mask = tokens, tokens, real
    for _ in range(max_new_tokens):
        attend = Attend(
            model.cfg.rotary,
            (step.shape[0], step.shape[1]),
            step.device,
            attention_mask=step_mask,
            positions=positions,
            past=past,
        )
        with model.observed(Run(step_mask, 0, model.cfg.n_layers, step, n_past=out.shape[1] - step.shape[1])):
            residual = model.run_blocks(model.hook_embed(model.embed(step)), attend)
        logits = model.unembed(model.ln_final(residual[:, -1:]))[:, -1].float()
        chosen = _choose(logits, do_sample, temperature, top_k, top_p, generator)
        if fill is not None:
            chosen = torch.where(ended, fill, chosen)
            ended = ended | torch.isin(chosen, end_ids)
        out = torch.cat((out, chosen[:, None]), dim=1)
        if fill is not None and bool(ended.all()):
            break
        step, step_mask = chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool)
        positions = next_position[:, None]
        next_position = next_position + 1
    return out


def _check_sampling(
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    d_vocab: int,
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("temperature, top_k and top_p only act when do_sample=True")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; do_sample=False is greedy")
    if top_k is not None and not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k must lie in 1..{d_vocab}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " batch"]:
    """The next token of every row: the likeliest, or a sample from the tempered, truncated distribution."""
    if not do_sample:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # The nucleus is the smallest set that reaches top_p: a token stays if those before it do not.
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

"""Transformers with hooks on its modules: the obvious side on which the reference interventions are checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.reference_interventions import SHARED, Place

Change = Callable[[Place, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Each family, and those that choose or weigh in another way: groups with a factor, renormalised with shared experts.
VARIANTS = (
    "olmoe",
    "olmoe_gqa_clip",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "qwen3_moe",
    "mixtral",
)
WITH_SHARED = ("qwen2_moe", "qwen2_moe_no_bias", "deepseek_v2", "deepseek_v2_groups")
PLACES = [(0, 3), (0, 5), (1, 4)]  # real with either padding


@contextmanager
def forward_hooks(*hooks: tuple[Any, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on transformers' modules, as pairs (module, hook), taken off at the end."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transformers_logits(model: Any, tokens: Tensor, mask: Tensor, *hooks: Any) -> Tensor:
    """Its own logits, `[token, vocabulary]` of the real tokens, under hooks."""
    with forward_hooks(*hooks), torch.no_grad():
        return model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]


def on_gate(model: Any, layer: int, tokens: Tensor, places: Collection[Place], change: Change) -> Any:
    """A hook on a router: at these places `change(place, probabilities, weights, experts)` says weights and experts."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        logits, weights, experts = output
        weights, order = weights.sort(-1, descending=True)
        experts, probabilities = experts.gather(-1, order), logits.float().softmax(-1)
        answers = []
        for token in range(len(logits)):
            place = divmod(token, tokens.shape[1])
            answer = weights[token], experts[token]
            answers.append(change(place, probabilities[token], *answer) if place in places else answer)
        width = max(len(answer[0]) for answer in answers)
        new_weights, new_experts = (
            weights.new_zeros(len(logits), width),
            experts.new_zeros(len(logits), width),
        )
        for token, (some_weights, some_experts) in enumerate(answers):
            new_weights[token, : len(some_weights)] = some_weights
            new_experts[token, : len(some_experts)] = some_experts
        return logits, new_weights, new_experts

    return model.model.layers[layer].mlp.gate, hook


def expert_alone(mlp: Any, x: Tensor, expert: int) -> Tensor:
    """What transformers gives for one expert at one token, or for the shared experts and their gate."""
    x = x.unsqueeze(0)
    if expert != SHARED:
        return mlp.experts.forward(x, torch.tensor([[expert]]), torch.ones(1, 1))[0]
    if hasattr(mlp, "shared_expert"):
        return (mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x))[0]
    return mlp.shared_experts(x)[0]

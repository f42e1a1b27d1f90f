"""What the tests of interventions share: runs of both sides, and positions with the places that they stand for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from moe_lens.interventions import Receipt, expert_reference, intervene
from moe_lens.interventions.expert_reference import prefix_hashes
from tests.families import prompts
from tests.reference import assert_same
from tests.reference_interventions import Place, Run
from tests.transformers_hooks import PLACES, VARIANTS, WITH_SHARED

__all__ = ["PLACES", "POSITIONS", "VARIANTS", "WITH_SHARED"]

MASK = torch.zeros(2, 9, dtype=torch.bool)
for _place in PLACES:
    MASK[_place] = True

# Real with either padding of `prompts`; None stands for all real tokens.
POSITIONS: dict[str, tuple[Any, Collection[Place] | None]] = {
    "one": (4, {(0, 4), (1, 4)}),
    "one from the end": (-5, {(0, 4), (1, 4)}),
    "one per row": ((5, -6), {(0, 5), (1, 3)}),
    "mask": (MASK, set(PLACES)),
    "all": (None, None),
}


def cheap(name: str) -> bool:
    """A hook point at which one may listen without another rounding of attention."""
    return not name.endswith(("hook_attn_scores", "hook_pattern", "hook_result"))


@torch.no_grad()
def run(model: Any, tokens: Tensor, mask: Tensor | None, *specs: Any) -> tuple[Tensor, Any, Receipt]:
    """Logits, cache and receipt of a run under interventions."""
    with intervene(model, *specs) as receipt:
        logits, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=cheap)
    return logits, cache, receipt


@torch.no_grad()
def clean_run(model: Any, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
    return model.run_with_cache(tokens, attention_mask=mask, names_filter=cheap)


def by_expert(cache: Any, layer: int, n_experts: int = 8) -> Tensor:
    """Routing weights `[b, p, expert]`, whatever the order of the slots; 0 where an expert is not active."""
    weights = cache[f"blocks.{layer}.mlp.hook_routing_weights"]
    indices = cache[f"blocks.{layer}.mlp.hook_expert_indices"]
    return torch.zeros(*weights.shape[:2], n_experts).scatter_add(-1, indices, weights)


def assert_like(actual: Any, expected: Run, mask: Tensor | None, *, tolerance: float = 1e-5) -> None:
    """The same logits, routing weights and layer outputs at real tokens."""
    logits, cache = actual[:2]
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    for name, value in expected[1].items():
        if name.endswith(("hook_mlp_out", "hook_router_logits", "hook_resid_post")):
            assert_same(cache[name][real], value[real], name, tolerance=tolerance)
        if name.endswith("hook_expert_indices"):
            layer = int(name.split(".")[1])
            ours, theirs = by_expert(cache, layer), by_expert(expected[1], layer)
            assert_same(ours[real], theirs[real], f"weights of layer {layer}", tolerance=tolerance)
    assert_same(logits[real], expected[0][real], "logits", tolerance=tolerance)


def reference_of(model: Any, **arguments: Any) -> Any:
    """An `ExpertReference` in which every expert of the tiny models is met."""
    return expert_reference(model, prompts(seed=77, batch=8, length=24)[0], n_samples=4, **arguments)


def stand_ins(reference: Any, tokens: Tensor, mask: Tensor, layer: int, seed: int) -> Any:
    """Means and other outputs, as `ablation_edits` takes them, for every place and expert of one layer."""
    experts = [*range(8), *([-1] if reference.has_shared else [])]
    hashes = prefix_hashes(tokens, mask.bool())
    means = {(layer, e): reference.mean[layer][e] for e in experts}
    others = {
        (row, column, e): reference.resampled_output(
            layer, torch.tensor([e]), hashes[row, column][None], seed
        )[0]
        for row, column in mask.nonzero().tolist()
        for e in experts
    }
    return dict(means=means, others=others)

"""Slow, obvious implementation of the router's rule: who is chosen for one token, and with which weights.

    facts = facts_of(hf_model)
    chosen = choose(probabilities, facts, excluded=[6])  # the router may not choose expert 6
    weights = applied(probabilities, chosen, facts)

Probabilities are those of one token, `[expert]`. Nothing of moe_lens is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What a model's config says about who is chosen and with which weight."""

    n_experts: int
    top_k: int
    renormalise: bool  # the chosen probabilities are divided by their sum
    scaling: float  # and multiplied by this
    n_groups: int  # experts are chosen within
    groups_chosen: int  # so many of so many groups of equal size
    moe_layers: tuple[int, ...]
    shared: bool  # there are experts that see every token


def facts_of(hf_model: Any) -> Facts:
    """The rule, read from the config and, where the name of a field is not the same everywhere, from the model."""
    config, layers = hf_model.config, hf_model.model.layers
    moe_layers = tuple(index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts"))
    some_mlp = layers[moe_layers[0]].mlp
    deepseek = config.model_type == "deepseek_v2"
    grouped = getattr(config, "topk_method", "greedy") == "group_limited_greedy"
    return Facts(
        n_experts=some_mlp.gate.weight.shape[0],
        top_k=config.num_experts_per_tok,
        renormalise=not deepseek and (config.model_type == "mixtral" or config.norm_topk_prob),
        scaling=config.routed_scaling_factor if deepseek else 1.0,
        n_groups=config.n_group if grouped else 1,
        groups_chosen=config.topk_group if grouped else 1,
        moe_layers=moe_layers,
        shared=hasattr(some_mlp, "shared_expert") or hasattr(some_mlp, "shared_experts"),
    )


def highest_first(values: Sequence[float], among: Iterable[int]) -> list[int]:
    """Some indices, from the highest value to the lowest; of equal values the lower index comes first."""
    return sorted(among, key=lambda index: (-values[index], index))


def choose(
    probabilities: Tensor,
    facts: Facts,
    *,
    k: int | None = None,
    excluded: Iterable[int] = (),
    forced: Iterable[int] = (),
) -> list[int]:
    """The k experts (the model's own number if None) that one token's probabilities `[expert]` choose, heaviest first.

    Excluded experts are taken out before groups are formed and experts chosen. Forced ones are always in, also
    from outside the groups that are chosen; the other places go to the highest of those that may be chosen.
    """
    values, k = probabilities.tolist(), facts.top_k if k is None else k
    excluded, forced = set(excluded), set(forced)
    assert not excluded & forced, f"both excluded and forced: {sorted(excluded & forced)}"
    assert len(forced) <= k, f"{len(forced)} experts are forced into {k} places"

    size = facts.n_experts // facts.n_groups
    best_of_group: dict[int, float] = {}
    for expert in range(facts.n_experts):
        if expert not in excluded:
            group = expert // size
            best_of_group[group] = max(values[expert], best_of_group.get(group, 0.0))
    groups = sorted(best_of_group, key=lambda group: (-best_of_group[group], group))[: facts.groups_chosen]
    eligible = [e for e in range(facts.n_experts) if e // size in groups and e not in excluded]

    others = [expert for expert in highest_first(values, eligible) if expert not in forced]
    chosen = [*forced, *others[: k - len(forced)]]
    assert len(chosen) == k, f"only {len(chosen)} experts may be chosen, not {k}"
    return highest_first(values, chosen)


def applied(probabilities: Tensor, chosen: Sequence[int], facts: Facts) -> Tensor:
    """`[len(chosen)]`: the weights with which the outputs of the chosen experts are added, as the family has it."""
    weights = torch.stack([probabilities[expert] for expert in chosen])
    if facts.renormalise:
        weights = weights / weights.sum()
    return weights * facts.scaling


def ranking(probabilities: Tensor, chosen: Sequence[int], facts: Facts) -> list[int]:
    """All experts, rank 1 first: those chosen, heaviest first; then those that might have been chosen, of the groups
    that are; then those of other groups.

    Without groups this is the order of the probabilities.
    """
    values = probabilities.tolist()
    size = facts.n_experts // facts.n_groups
    best_of_group = [max(values[group * size : (group + 1) * size]) for group in range(facts.n_groups)]
    groups = highest_first(best_of_group, range(facts.n_groups))[: facts.groups_chosen]
    left = [expert for expert in range(facts.n_experts) if expert not in chosen]
    eligible = [expert for expert in left if expert // size in groups]
    others = [expert for expert in left if expert not in eligible]
    return highest_first(values, chosen) + highest_first(values, eligible) + highest_first(values, others)

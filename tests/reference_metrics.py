"""The slow, obvious population metrics: lists of what every token did, gone through expert by expert.

`metrics_of` reads the hook values of whole runs, `reference_metrics` makes those with transformers (`reference_run`).
`released_metrics` hooks transformers' own modules, padding and all, as the released scripts of the audit do. Nothing of
moe_lens is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.reference import Cache, reference_cache
from tests.transformers_hooks import expert_alone, forward_hooks

Batch = tuple[Tensor, Tensor]
Table = dict[str, dict[tuple[int, int], float]]
"""By metric, then by (layer, expert)."""


class Active(NamedTuple):
    """One expert at one token that selected it."""

    document: int
    weight: float
    output: np.ndarray
    gap: np.ndarray
    gate_entropy: float


class Token(NamedTuple):
    """One real token: its document, and the router's probabilities."""

    document: int
    probabilities: list[float]


def reference_metrics(hf_model: Any, batches: Sequence[Batch]) -> tuple[Table, Table]:
    """Values and standard errors, from transformers."""
    caches = [reference_cache(hf_model, tokens, mask) for tokens, mask in batches]
    return metrics_of(caches, [mask for _, mask in batches], weights_of(hf_model))


def weights_of(hf_model: Any) -> dict[int, dict[str, Tensor]]:
    """Of each MoE layer: gate, up and down matrices of all experts, and the router."""
    found = {}
    for index, layer in enumerate(hf_model.model.layers):
        if hasattr(layer.mlp, "experts"):
            width = layer.mlp.experts.down_proj.shape[-1]
            gate_up = layer.mlp.experts.gate_up_proj.detach()
            found[index] = {
                "gate": gate_up[:, :width],
                "up": gate_up[:, width:],
                "down": layer.mlp.experts.down_proj.detach(),
                "router": layer.mlp.gate.weight.detach(),
            }
    return found


def metrics_of(
    caches: Sequence[Cache], masks: Sequence[Tensor], weights: dict[int, dict[str, Tensor]]
) -> tuple[Table, Table]:
    """Values and standard errors; NaN where there is none."""
    values: Table = {}
    errors: Table = {}
    for layer, matrices in weights.items():
        tokens, active = tokens_of(caches, masks, layer)
        n_experts = len(matrices["down"])
        means = {e: np.mean([a.output for a in active[e]], axis=0) for e in range(n_experts) if active[e]}
        for expert in range(n_experts):
            uses = active[expert]
            documents = [token.document for token in tokens]
            norms = [norm(a.output) for a in uses]
            gaps = [norm(a.gap) for a in uses]
            probabilities = [token.probabilities[expert] for token in tokens]

            # Means: the value at each token that counts, and the token's document.
            of_active = {
                "activation_norm": norms,
                "mean_routing_weight": [a.weight for a in uses],
                "router_weighted_activation_norm": [a.weight * norm(a.output) for a in uses],
                "mean_squared_activation_norm": [value**2 for value in norms],
                "gate_entropy": [a.gate_entropy for a in uses],
            }
            # Over all tokens: 0 at those without the expert, each in its document.
            of_tokens = {
                "utilization_rate": [1.0] * len(uses),
                "mean_gap_norm": gaps,
                "total_activation_norm": norms,
                "weighted_utilization": [a.weight for a in uses],
            }
            found = {name: clustered(v, [a.document for a in uses]) for name, v in of_active.items()}
            for name, list_of in of_tokens.items():
                idle = list(documents)
                for use in uses:
                    idle.remove(use.document)
                found[name] = clustered(list_of + [0.0] * len(idle), [use.document for use in uses] + idle)
            found["soft_routing_count"] = clustered(probabilities, documents)

            nan = float("nan")
            shares = [p / sum(probabilities) for p in probabilities]
            others = [other for other in means if other != expert]
            found |= {
                "activation_std": (float(np.std(norms, ddof=1)) if len(norms) > 1 else nan, nan),
                "max_activation": (max((float(np.abs(a.output).max()) for a in uses), default=nan), nan),
                "routing_entropy": (
                    -sum(q * math.log(q) for q in shares) - math.log(len(tokens)),
                    nan,
                ),
                "output_similarity": (
                    float(np.mean([cosine(means[expert], means[other]) for other in others]))
                    if expert in means and others
                    else nan,
                    nan,
                ),
                "router_row_norm": (norm(matrices["router"][expert]), nan),
                "down_projection_norm": (norm(matrices["down"][expert]), nan),
                "expert_weight_norm": (
                    math.sqrt(sum(norm(matrices[name][expert]) ** 2 for name in ("gate", "up", "down"))),
                    nan,
                ),
            }
            for name, (value, error) in found.items():
                values.setdefault(name, {})[layer, expert] = value
                errors.setdefault(name, {})[layer, expert] = error
    return values, errors


def tokens_of(
    caches: Sequence[Cache], masks: Sequence[Tensor], layer: int
) -> tuple[list[Token], dict[int, list[Active]]]:
    """Every real token, and for each expert the tokens that selected it."""
    tokens: list[Token] = []
    n_experts = caches[0][f"blocks.{layer}.mlp.hook_expert_weights"].shape[-1]
    active: dict[int, list[Active]] = {expert: [] for expert in range(n_experts)}
    first = 0
    for cache, mask in zip(caches, masks, strict=True):
        of = {
            name: cache[f"blocks.{layer}.mlp.hook_{name}"].detach()
            for name in (
                "expert_weights",
                "expert_indices",
                "routing_weights",
                "expert_out",
                "expert_contrib",
            )
        }
        for row, column in mask.nonzero().tolist():
            probabilities = of["expert_weights"][row, column].double().tolist()
            tokens.append(Token(first + row, probabilities))
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            for slot, expert in enumerate(of["expert_indices"][row, column].tolist()):
                active[expert].append(
                    Active(
                        first + row,
                        float(of["routing_weights"][row, column, slot]),
                        of["expert_out"][row, column, slot].double().numpy(),
                        of["expert_contrib"][row, column, slot].double().numpy(),
                        entropy,
                    )
                )
        first += len(mask)
    return tokens, active


def clustered(values: Sequence[float], documents: Sequence[int]) -> tuple[float, float]:
    """The mean, and its standard error with documents as clusters."""
    if not values:
        return float("nan"), float("nan")
    mean = sum(values) / len(values)
    groups = sorted(set(documents))
    if len(groups) < 2:
        return mean, float("nan")
    total = 0.0
    for group in groups:
        total += sum(v - mean for v, d in zip(values, documents, strict=True) if d == group) ** 2
    return mean, math.sqrt(len(groups) / (len(groups) - 1) * total) / len(values)


def norm(vector: Any) -> float:
    return math.sqrt(float(np.sum(np.square(np.asarray(vector, dtype=np.float64)))))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other) / (norm(one) * norm(other))


# --- as the released code does it -----------------------------------------------------------------------------


def released_metrics(hf_model: Any, batches: Sequence[Batch], whose: str, pad: int) -> Table:
    """The four metrics of each layer, as the script for one model computes them, from transformers' own modules.

    `olmoe` and `deepseek_v2` pad all texts at once to the longest, on the right and on the left, and run four or two at
    a time; `qwen2_moe` runs every text alone, without padding.
    """
    texts = [row[real.bool()] for tokens, mask in batches for row, real in zip(tokens, mask, strict=True)]
    if whose == "qwen2_moe":
        batches = [(text[None], torch.ones_like(text[None])) for text in texts]
    else:
        width = max(len(text) for text in texts)
        rows, masks = [], []
        for text in texts:
            filling, none = [pad] * (width - len(text)), [0] * (width - len(text))
            real = [1] * len(text)
            rows.append([*text.tolist(), *filling] if whose == "olmoe" else [*filling, *text.tolist()])
            masks.append([*real, *none] if whose == "olmoe" else [*none, *real])
        tokens, mask = torch.tensor(rows), torch.tensor(masks)
        size = 4 if whose == "olmoe" else 2
        batches = list(zip(tokens.split(size), mask.split(size), strict=True))
    table: Table = {}
    for layer, block in enumerate(hf_model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        runs = [watched(hf_model, block.mlp, tokens, mask) for tokens, mask in batches]
        found = {"olmoe": released_olmoe, "deepseek_v2": released_deepseek, "qwen2_moe": released_qwen}[
            whose
        ](runs, hf_model.config.num_experts_per_tok)
        for name, of_experts in found.items():
            for expert, value in enumerate(of_experts):
                table.setdefault(name, {})[layer, expert] = value
    return table


class Watched(NamedTuple):
    """A layer in one run: what each position has, padding too."""

    logits: np.ndarray
    chosen: list[list[int]]
    weights: list[list[float]]
    output: Callable[[int, int], np.ndarray]


@torch.no_grad()
def watched(hf_model: Any, mlp: Any, tokens: Tensor, mask: Tensor) -> Watched:
    seen: dict[str, Any] = {}
    with forward_hooks(
        (mlp, lambda module, args, out: seen.update(x=args[0].flatten(0, 1))),
        (mlp.gate, lambda module, args, out: seen.update(gate=out)),
    ):
        hf_model(tokens, attention_mask=mask, use_cache=False)
    logits, weights, chosen = seen["gate"]
    return Watched(
        logits.flatten(0, -2).double().numpy(),
        chosen.tolist(),
        weights.tolist(),
        lambda position, expert: expert_alone(mlp, seen["x"][position], expert).detach().double().numpy(),
    )


def outputs_of(runs: Sequence[Watched], expert: int) -> list[np.ndarray]:
    return [
        run.output(position, expert)
        for run in runs
        for position, chosen in enumerate(run.chosen)
        if expert in chosen
    ]


def norms_and_spread(outputs: list[np.ndarray]) -> tuple[float, float]:
    norms = torch.tensor([norm(output) for output in outputs])
    return (float(norms.mean()), float(norms.std())) if outputs else (0.0, 0.0)


def released_olmoe(runs: Sequence[Watched], top_k: int) -> dict[str, list[float]]:
    """Raw logits for routing weights; a mask that is true where any position's threshold is reached."""
    logits = np.concatenate([run.logits for run in runs])
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for expert in range(logits.shape[1]):
        of_expert = logits[:, expert]
        mask = np.zeros(len(of_expert), dtype=bool)
        for position in logits:
            mask |= of_expert >= np.sort(position)[-top_k]
        mean, spread = norms_and_spread(outputs_of(runs, expert))
        weight = float(of_expert[mask].mean()) if mask.any() else 0.0
        for name, value in zip(NAMES, (float(of_expert.mean()), mean, weight, spread), strict=True):
            found[name].append(value)
    return found


def released_deepseek(runs: Sequence[Watched], top_k: int) -> dict[str, list[float]]:
    """Weights of the chosen scattered into zeros; what is above 0 counts as selected."""
    n_experts = runs[0].logits.shape[1]
    scattered = np.zeros((sum(len(run.chosen) for run in runs), n_experts))
    position = 0
    for run in runs:
        for chosen, weights in zip(run.chosen, run.weights, strict=True):
            for expert, weight in zip(chosen, weights, strict=True):
                scattered[position, expert] = weight
            position += 1
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for expert in range(n_experts):
        of_expert = scattered[:, expert]
        selected = of_expert > 0
        mean, spread = norms_and_spread(outputs_of(runs, expert))
        weight = float(of_expert[selected].mean()) if selected.any() else 0.0
        for name, value in zip(NAMES, (float(selected.mean()), mean, weight, spread), strict=True):
            found[name].append(value)
    return found


def released_qwen(runs: Sequence[Watched], top_k: int) -> dict[str, list[float]]:
    """Texts of 4 tokens or more; norms over the first 30 of all texts; 32 coordinates pooled."""
    used = [run for run in runs if len(run.chosen) >= 4]
    with_norms = [run for run in runs[:30] if len(run.chosen) >= 4]
    n_experts = runs[0].logits.shape[1]
    counts, weights = np.zeros(n_experts), {expert: [] for expert in range(n_experts)}
    for run in used:
        for logits in run.logits:
            probabilities = np.exp(logits) / np.exp(logits).sum()
            for expert in np.argsort(probabilities)[::-1][:top_k]:
                counts[expert] += 1
                weights[int(expert)].append(probabilities[expert])
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for expert in range(n_experts):
        outputs = outputs_of(with_norms, expert)
        values = (
            counts[expert] / counts.sum(),
            float(np.mean([norm(output) for output in outputs])) if outputs else 0.0,
            float(np.mean(weights[expert])) if weights[expert] else 0.0,
            float(np.std([v for output in outputs for v in output[:32]])) if outputs else 0.0,
        )
        for name, value in zip(NAMES, values, strict=True):
            found[name].append(value)
    return found


NAMES = ("utilization_rate", "activation_norm", "mean_routing_weight", "activation_std")

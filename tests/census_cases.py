"""What the tests of replay, of sequence scope and of the census share: documents, references, and rows made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_lens.interventions.branches import Change
from moe_lens.interventions.expert_reference import ExpertReference, expert_reference, prefix_hashes
from tests.families import prompts
from tests.reference_census import Row, census_rows, expert_means
from tests.reference_choice import facts_of
from tests.reference_interventions import SHARED

# Each family: grouped queries and clipping, a dense layer between, groups and latent attention, heads' norms.
VARIANTS = ("olmoe_gqa_clip", "qwen2_moe_no_bias", "deepseek_v2_groups", "qwen3_moe", "mixtral")
MORE_VARIANTS = (*VARIANTS, "olmoe", "deepseek_v2", "qwen3_moe_dense_bias")
WITH_SHARED = ("qwen2_moe_no_bias", "deepseek_v2_groups", "deepseek_v2")
SEED = 3
TOLERANCE = 2e-5

Loaded = Callable[[str], Any]


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Two documents of six columns, of which one and three are padding."""
    tokens, mask = prompts(padding, length=6)
    return tokens, mask.bool()


def of_corpus() -> tuple[Tensor, Tensor]:
    """What references are gathered over."""
    tokens, mask = prompts("right", seed=1, batch=4, length=16)
    return tokens, mask.bool()


@cache
def reference_of(hooked: Loaded, variant: str) -> ExpertReference:
    tokens, mask = of_corpus()
    return expert_reference(hooked(variant), tokens, attention_mask=mask, n_samples=4)


def change_of(hooked: Loaded, variant: str, how: str) -> Change:
    reads = how in ("mean", "resample")
    return Change(how, reference_of(hooked, variant) if reads else None, SEED)  # type: ignore[arg-type]


@cache
def means_of(hf: Loaded, variant: str) -> dict[tuple[int, int], Tensor]:
    """Gathered from transformers."""
    tokens, mask = of_corpus()
    return expert_means(hf(variant), tokens, mask, facts_of(hf(variant)).moe_layers)


@cache
def others_of(hooked: Loaded, variant: str, padding: str) -> dict[int, dict[tuple[int, int, int], Tensor]]:
    """Of every layer, what stands in for each expert at each token of `batch(padding)`."""
    (tokens, mask), reference = batch(padding), reference_of(hooked, variant)
    prefixes = prefix_hashes(tokens, mask)
    others: dict[int, dict[tuple[int, int, int], Tensor]] = {}
    for layer in reference.layers:
        others[layer] = {}
        for expert in range(SHARED if reference.has_shared else 0, reference.n_experts):
            vectors = reference.resampled_output(layer, torch.full_like(tokens, expert), prefixes, SEED)
            for row, column in mask.nonzero().tolist():
                others[layer][row, column, expert] = vectors[row, column]
    return others


def replacements(hf: Loaded, hooked: Loaded, variant: str, padding: str, how: str) -> dict[str, Any]:
    """What the references of interventions need beside `how`."""
    if how == "mean":
        return {"means": means_of(hf, variant)}
    return {"others": others_of(hooked, variant, padding)} if how == "resample" else {}


@cache
@torch.no_grad()
def rows_of_transformers(
    hf: Loaded,
    hooked: Loaded,
    variant: str,
    padding: str,
    how: str,
    scope: str = "token",
    layers: tuple[int, ...] | None = None,
    shared: bool = False,
) -> list[Row]:
    """`census_rows` of `batch(padding)`, made once a session."""
    given = replacements(hf, hooked, variant, padding, how)
    if "others" in given:
        wanted = facts_of(hf(variant)).moe_layers if layers is None else layers
        given = {"others": {layer: given["others"][layer] for layer in wanted}}
    tokens, mask = batch(padding)
    return census_rows(hf(variant), tokens, mask, layers=layers, how=how, scope=scope, shared=shared, **given)


def close(actual: float, expected: float, what: str) -> None:
    """To 2e-5 of the larger, or of 1."""
    assert abs(actual - expected) <= TOLERANCE * max(1.0, abs(expected)), f"{what}: {actual}, not {expected}"


def first_and_last(model: Any) -> tuple[int, int]:
    layers: Sequence[int] = model.cfg.moe_layers
    return layers[0], layers[-1]


def same_rows(actual: Sequence[Mapping[str, Any]], expected: Sequence[Row], names: Mapping[str, str]) -> None:
    """Row for row: the same keys, and the same numbers under the names `{actual: expected}`."""
    assert len(actual) == len(expected) > 0
    for row, reference in zip(actual, expected, strict=True):
        key = {name: reference[name] for name in ("document", "position", "layer", "expert", "rank")}
        assert {name: int(row[name]) for name in key} == key
        for name, other in names.items():
            if reference[other] != reference[other]:
                assert row[name] != row[name], f"{name} of {key}: {row[name]}, not NaN"
            else:
                close(float(row[name]), reference[other], f"{name} of {key}")

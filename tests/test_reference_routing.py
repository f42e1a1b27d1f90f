"""The slow routing analyses against transformers, against edited runs, and against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import OlmoeConfig

from tests.families import FAMILIES, prompts
from tests.reference import Edits, reference_run
from tests.reference_rank_shift import (
    average_ranks,
    chosen_experts,
    eligible_experts,
    probabilities_of,
    rank_shift_of,
    rank_shifts,
    ranks_of,
    spearman,
    weights_of,
)
from tests.reference_routing import (
    GRANULARITIES,
    by_source_offset,
    by_source_position,
    dense_scores,
    document_means,
    document_rows,
    measures_of,
    readout_logits,
    real_columns,
    scaled_norms,
    sender_active,
    sender_hooks,
    sender_vectors,
    source_active,
    source_rows,
    token_measures,
)

VARIANTS = (
    *FAMILIES,
    "qwen2_moe_no_bias",
    "qwen3_moe_dense_bias",
    "deepseek_v2_groups",
    "deepseek_v2_bias",
    "olmoe_bias_odd_width",
)

Load = Callable[[str], Any]


def values_of(model: Any, padding: str = "left", edits: Edits | None = None) -> dict[str, Tensor]:
    tokens, mask = prompts(padding)
    with torch.no_grad():
        return reference_run(model, tokens, mask, edits)[1]


def receivers_of(model: Any) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def assert_close(actual: np.ndarray, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Equal relative to the largest of what is expected."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, what
    size = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size, err_msg=what)


def what_the_gates_say(model: Any, tokens: Tensor, mask: Tensor) -> dict[int, dict[str, np.ndarray]]:
    """By layer: the stream that transformers hands to the router, and what its router says."""
    seen: dict[int, dict[str, np.ndarray]] = {}

    def keep(layer: int, key: str, value: Tensor) -> None:
        seen.setdefault(layer, {})[key] = value.view(*tokens.shape, -1).numpy().copy()

    def norm_hook(layer: int) -> Any:
        return lambda module, args, output: keep(layer, "stream", args[0])

    def gate_hook(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            for key, value in zip(("logits", "weights", "indices"), output, strict=True):
                keep(layer, key, value)

        return hook

    handles = []
    for layer in receivers_of(model):
        block = model.model.layers[layer]
        handles.append(block.post_attention_layernorm.register_forward_hook(norm_hook(layer)))
        handles.append(block.mlp.gate.register_forward_hook(gate_hook(layer)))
    with torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_senders_sum_to_what_transformers_computes(hf: Load, variant: str, by: str) -> None:
    """Vectors to the stream before the norm, scores to the logits that the gate returns, at every real token."""
    model = hf(variant)
    tokens, mask = prompts("left")
    values, real = values_of(model), mask.bool().numpy()
    gates = what_the_gates_say(model, tokens, mask)
    for receiver in receivers_of(model):
        vectors = sender_vectors(model, values, receiver, by)
        total = sum(vectors.values())
        assert_close(total, values[f"blocks.{receiver}.hook_resid_mid"], f"stream at {receiver}")
        assert_close(total[real], gates[receiver]["stream"][real], f"transformers' stream at {receiver}")
        scores = dense_scores(model, values, receiver, by)
        assert list(scores) == list(vectors)
        total = sum(scores.values())
        assert_close(total, readout_logits(model, values, receiver), f"exact logits at {receiver}")
        assert_close(total[real], gates[receiver]["logits"][real], f"transformers' logits at {receiver}")


@pytest.mark.parametrize(
    "variant", ["olmoe_bias_odd_width", "qwen2_moe", "deepseek_v2", "deepseek_v2_groups"]
)
def test_parts_sum_to_their_wholes(hf: Load, variant: str) -> None:
    """Heads to attention layers, sources to heads, experts to MoE layers, neurons to experts and dense layers."""
    model, values = hf(variant), values_of(hf(variant))
    at = {by: sender_vectors(model, values, 2, by) for by in GRANULARITIES}
    assert list(at["layer"]) == list(sender_hooks(3, 2))
    for name, hook in sender_hooks(3, 2).items():
        assert_close(at["layer"][name], values[hook], name)

    def assert_sum(parts: dict[str, np.ndarray], prefix: str, whole: np.ndarray) -> None:
        mine = [vector for name, vector in parts.items() if name.startswith(prefix)]
        assert len(mine) > 1, prefix
        assert_close(sum(mine), whole, prefix)

    for name, whole in at["layer"].items():
        kind = at["head"] if name.startswith("A") else at["expert"]
        if name not in kind:
            assert_sum(kind, name, whole)
    for name, whole in at["head"].items():
        if "H" in name:
            assert_sum(at["source"], name + "<-", whole)
            assert_close(
                whole,
                values[f"blocks.{name[1]}.attn.hook_result"][:, :, int(name[3:])],
                name,
            )
    for name, whole in at["expert"].items():
        if name.startswith("M"):
            assert_sum(at["neuron"], name + "N", whole)


def test_names_and_their_order(hf: Load) -> None:
    """In the order in which the stream adds them, with a bias where there is one."""
    model, values = hf("qwen3_moe_dense_bias"), values_of(hf("qwen3_moe_dense_bias"))
    heads = [f"H{head}" for head in range(4)]
    sources = [f"H{head}<-{source}" for head in range(4) for source in range(9)]
    assert list(sender_vectors(model, values, 1, "head")) == [
        "embed",
        *("A0" + part for part in [*heads, "bias"]),
        "M0",
        *("A1" + part for part in [*heads, "bias"]),
    ]
    assert list(sender_vectors(model, values, 1, "source")) == [
        "embed",
        *("A0" + part for part in [*sources, "bias"]),
        "M0",
        *("A1" + part for part in [*sources, "bias"]),
    ]
    experts = [f"M1E{expert}" for expert in range(8)]
    assert list(sender_vectors(model, values, 2, "expert")) == [
        *("embed", "A0", "M0", "A1"),
        *experts,
        "A2",
    ]
    assert list(sender_vectors(model, values, 2, "neuron")) == [
        *("embed", "A0", *(f"M0N{neuron}" for neuron in range(96)), "A1"),
        *(f"{expert}N{neuron}" for expert in experts for neuron in range(32)),
        "A2",
    ]
    model, values = hf("qwen2_moe"), values_of(hf("qwen2_moe"))
    assert list(sender_vectors(model, values, 1, "expert"))[-3:] == ["M0E7", "M0S", "A1"]
    neurons = list(sender_vectors(model, values, 1, "neuron"))
    assert neurons[-50:] == ["M0E7N31", *(f"M0SN{neuron}" for neuron in range(48)), "A1"]


# --- each sender is the one that its name says --------------------------------------------------------------


def without(index: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        value[index] = 0
        return value

    return edit


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bias", "qwen3_moe_dense_bias", "mixtral"])
def test_a_part_taken_out_of_the_run_is_missing_by_its_vector(hf: Load, variant: str) -> None:
    """Editing one activation to zero changes what the layer writes by minus the senders named after it."""
    model, values = hf(variant), values_of(hf(variant))
    sources, experts, neurons = (
        sender_vectors(model, values, len(model.model.layers) - 1, by)
        for by in ("source", "expert", "neuron")
    )
    heads = sender_vectors(model, values, 1, "head")

    def lost(hook: str, edit: Callable[[Tensor], Tensor], written: str) -> np.ndarray:
        edited = values_of(model, edits={hook: edit})
        return (values[written] - edited[written]).double().numpy()

    whole = (slice(None), slice(None))
    hook = "blocks.1.attn.hook_z"
    assert_close(lost(hook, without((*whole, 3)), "blocks.1.hook_attn_out"), heads["A1H3"], "A1H3")

    hook = "blocks.1.attn.hook_pattern"
    for head, source in [(0, 3), (3, 5)]:
        name = f"A1H{head}<-{source}"
        edit = without((slice(None), head, slice(None), source))
        assert_close(lost(hook, edit, "blocks.1.hook_attn_out"), sources[name], name)

    for layer in range(len(model.model.layers) - 1):
        at, written = f"blocks.{layer}.mlp.", f"blocks.{layer}.hook_mlp_out"
        if at + "hook_post" in values:
            gone = lost(at + "hook_post", without((*whole, 17)), written)
            assert_close(gone, neurons[f"M{layer}N17"], f"M{layer}N17", 1e-4)
            continue
        indices = values[at + "hook_expert_indices"]
        expert = int(indices[0, -1, 0])
        name = f"M{layer}E{expert}"
        gone = lost(at + "hook_routing_weights", without((indices == expert,)), written)
        assert_close(gone, experts[name], name)

        everyone = sum(neurons[f"M{layer}E{expert}N11"] for expert in range(8))
        gone = lost(at + "hook_expert_post", without((..., 11)), written)
        assert_close(gone, everyone, f"M{layer}E*N11", 1e-4)
        if at + "hook_shared_post" in values:
            gone = lost(at + "hook_shared_post", without((*whole, 40)), written)
            assert_close(gone, neurons[f"M{layer}SN40"], f"M{layer}SN40", 1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_active_senders(hf: Load, padding: str) -> None:
    """Inactive at a real token means that nothing is written there; active experts and sources write something."""
    model, values = hf("qwen2_moe"), values_of(hf("qwen2_moe"), padding)
    mask = prompts(padding)[1]
    real = mask.bool().numpy()
    for by in ("source", "expert", "neuron"):
        for name, vectors in sender_vectors(model, values, 2, by).items():
            active = sender_active(values, name, mask)
            writes = (vectors != 0).any(axis=-1)
            assert active.shape == real.shape
            np.testing.assert_array_equal(active, writes & real, err_msg=name)
    experts = [sender_active(values, f"M1E{expert}", mask) for expert in range(8)]
    np.testing.assert_array_equal(sum(active.astype(int) for active in experts), 3 * real)
    sources = [sender_active(values, f"A0H1<-{source}", mask) for source in range(9)]
    seen = np.cumsum(real, axis=1) * real  # a query sees the real tokens up to itself
    np.testing.assert_array_equal(sum(active.astype(int) for active in sources), seen)


# --- measures -----------------------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    assert measures_of(np.array([1.0, -2.0, 4.0, 1.0])) == (4.5, 1.5, -0.5)

    scores = np.array([[[1.0, -2.0, 4.0, 1.0], [0.0, 0.0, 0.0, 8.0]]])
    values = {"blocks.1.mlp.hook_expert_indices": torch.tensor([[[2, 1], [3, 0]]])}
    everyone = {"variance": [[4.5, 12]], "aps": [[1.5, 2]], "ans": [[-0.5, 0]], "mean": [[1, 2]]}
    some = {"variance": [[2.25, 0]], "aps": [[0.5, 0]], "ans": [[-1, 0]], "mean": [[-0.5, 0]]}
    chosen = {"variance": [[9, 16]], "aps": [[2, 4]], "ans": [[-1, 0]], "mean": [[1, 4]]}
    for experts, expected in [(None, everyone), ([1, 0], some), ("selected", chosen)]:
        got = token_measures(scores, values, 1, experts)
        assert list(got) == list(expected)
        for measure, value in expected.items():
            np.testing.assert_allclose(got[measure], value)


def test_norms_are_of_what_the_router_reads(hf: Load) -> None:
    """The whole stream's would be the norm of the normalised stream times the gain; parts by themselves."""
    model, values = hf("mixtral"), values_of(hf("mixtral"))
    gain = model.model.layers[1].post_attention_layernorm.weight.detach()
    scale = values["blocks.1.ln2.hook_scale"]
    norms = scaled_norms(model, values, 1, "expert")
    vectors = sender_vectors(model, values, 1, "expert")
    assert list(norms) == list(vectors)
    for name, vector in vectors.items():
        expected = (gain * torch.from_numpy(vector) / scale).norm(dim=-1)
        assert_close(norms[name], expected, name)


def test_measures_are_those_of_the_scores(hf: Load) -> None:
    """`variance` is numpy's; the mean is APS and ANS together, for whichever experts."""
    model, values = hf("olmoe"), values_of(hf("olmoe"))
    scores = dense_scores(model, values, 1, "head")["A1H2"]
    for experts in (None, [5, 0, 2], "selected"):
        got = token_measures(scores, values, 1, experts)
        np.testing.assert_allclose(got["mean"], got["aps"] + got["ans"], atol=1e-12)
    np.testing.assert_allclose(token_measures(scores, values, 1)["variance"], scores.var(axis=-1))
    few = token_measures(scores, values, 1, [5, 0, 2])["variance"]
    np.testing.assert_allclose(few, scores[..., [0, 2, 5]].var(axis=-1))


# --- documents ----------------------------------------------------------------------------------------------

# Four documents of 4, 3, 1 and 2 real tokens; 9 stands where padding is.
PER_TOKEN = np.array([[1.0, 2, 4, 6], [9, 3, 5, 7], [9, 9, 9, 8], [2, 6, 9, 9]])
REAL = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])
ACTIVE = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)


@pytest.mark.parametrize(
    ("position", "options", "expected"),
    [
        ("lead", {}, [1, 3, 8, 2]),
        ("rest", {}, [4, 6, 6]),
        ("lead", {"active": ACTIVE}, [1, 0, 0, 2]),
        ("rest", {"active": ACTIVE}, [4 / 3, 3.5, 0]),
        ("lead", {"active": ACTIVE, "active_only": True}, [1, 2]),
        ("rest", {"active": ACTIVE, "active_only": True}, [4, 7]),
        ("lead", {"skip_bos": True}, [2, 5, 6]),
        ("rest", {"skip_bos": True}, [5, 7]),
        ("lead", {"skip_bos": True, "active": ACTIVE}, [0, 0, 0]),
        ("rest", {"skip_bos": True, "active": ACTIVE}, [2, 7]),
        ("lead", {"skip_bos": True, "active": ACTIVE, "active_only": True}, []),
        ("rest", {"skip_bos": True, "active": ACTIVE, "active_only": True}, [4, 7]),
    ],
)
def test_document_rows_by_hand(position: str, options: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(document_rows(PER_TOKEN, REAL, position, **options), expected)


def test_document_means_are_of_measures() -> None:
    scores = np.stack([PER_TOKEN, -PER_TOKEN, 0 * PER_TOKEN], axis=-1)
    got = document_means(scores, REAL, "rest")
    size = document_rows(PER_TOKEN, REAL, "rest")
    square = document_rows(PER_TOKEN**2, REAL, "rest")
    np.testing.assert_allclose(got, np.stack([2 * square / 3, size / 3, -size / 3], axis=1))


# --- sources over a corpus ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bias"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_sources_by_position_and_by_offset_sum_to_heads(hf: Load, variant: str, padding: str) -> None:
    model, values = hf(variant), values_of(hf(variant), padding)
    mask = prompts(padding)[1]
    sources, heads = (dense_scores(model, values, 2, by) for by in ("source", "head"))
    for row, n_tokens in enumerate(mask.sum(1).tolist()):
        columns = real_columns(mask, row)
        assert len(columns) == n_tokens < 9
        by_position, by_offset = by_source_position(sources, mask, row), by_source_offset(sources, mask, row)
        assert "A2H3<-0" in by_position
        assert f"A2H3<-{n_tokens - 1}" in by_position
        assert f"A2H3<-{n_tokens}" not in by_position
        assert f"A2H3<-q-{n_tokens - 1}" in by_offset
        assert f"A2H3<-q-{n_tokens}" not in by_offset
        for name, scores in heads.items():
            expected = scores[row, columns]
            if "H" not in name:
                np.testing.assert_array_equal(by_position[name], expected)
                np.testing.assert_array_equal(by_offset[name], expected)
                continue
            for parts in (by_position, by_offset):
                mine = [part for part_name, part in parts.items() if part_name.startswith(name + "<-")]
                assert len(mine) == n_tokens
                assert_close(sum(mine), expected, name)
        for name, scores in [*by_position.items(), *by_offset.items()]:
            np.testing.assert_array_equal((scores != 0).any(-1), source_active(name, n_tokens), err_msg=name)


def test_sources_by_hand() -> None:
    """One head, three columns, the first of them padding in the first document; a number for each token."""
    pattern = np.array(
        [
            [[1, 0, 0], [0, 2, 0], [0, 3, 4]],
            [[5, 0, 0], [6, 7, 0], [8, 9, 10]],
        ]
    )  # [document, query, source]
    senders = {f"A0H1<-{source}": pattern[:, :, source] for source in range(3)}
    senders["M0"] = np.array([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])

    def listed(document: dict[str, np.ndarray]) -> dict[str, list[float]]:
        return {name: value.tolist() for name, value in document.items()}

    positions = [by_source_position(senders, mask, row) for row in range(2)]
    assert listed(positions[0]) == {"A0H1<-0": [2, 3], "A0H1<-1": [0, 4], "M0": [2, 3]}
    assert listed(positions[1]) == {
        **{"A0H1<-0": [5, 6, 8], "A0H1<-1": [0, 7, 9], "A0H1<-2": [0, 0, 10]},
        "M0": [4, 5, 6],
    }
    offsets = [by_source_offset(senders, mask, row) for row in range(2)]
    assert listed(offsets[0]) == {"A0H1<-q-0": [2, 4], "A0H1<-q-1": [0, 3], "M0": [2, 3]}
    assert listed(offsets[1]) == {
        **{"A0H1<-q-0": [5, 7, 10], "A0H1<-q-1": [0, 6, 9], "A0H1<-q-2": [0, 0, 8]},
        "M0": [4, 5, 6],
    }

    def rows(
        documents: list[dict[str, np.ndarray]], name: str, position: str, **options: bool
    ) -> list[float]:
        return source_rows(documents, name, position, **options).tolist()

    assert rows(positions, "A0H1<-0", "lead") == [2, 5]
    assert rows(positions, "A0H1<-1", "lead") == [
        0,
        0,
    ]  # both documents have a token 1; token 0 cannot see it
    assert rows(positions, "A0H1<-1", "lead", active_only=True) == []
    assert rows(positions, "A0H1<-2", "rest") == [5]  # the first document has no token 2
    assert rows(positions, "A0H1<-2", "rest", active_only=True) == [10]
    assert rows(offsets, "A0H1<-q-1", "rest", skip_bos=True) == [9]
    assert rows(offsets, "A0H1<-q-2", "rest") == [4]
    assert rows(offsets, "A0H1<-q-2", "rest", active_only=True) == [8]
    assert rows(offsets, "M0", "lead", skip_bos=True) == [3, 5]


# --- rank shift ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, "deepseek_v2_two_dense", "olmoe_gqa_clip"])
def test_the_choice_is_transformers(hf: Load, variant: str) -> None:
    """Unperturbed logits give the experts that its router chose, and the weights that it gave them."""
    model = hf(variant)
    tokens, mask = prompts("left")
    values, gates = values_of(model), what_the_gates_say(model, tokens, mask)
    for receiver in receivers_of(model):
        logits = readout_logits(model, values, receiver)
        for row, position in mask.nonzero().tolist():
            exact = logits[row, position].tolist()
            chosen = gates[receiver]["indices"][row, position].tolist()
            assert sorted(chosen_experts(exact, model.config)) == sorted(chosen)
            expected = np.zeros(len(exact))
            expected[chosen] = gates[receiver]["weights"][row, position]
            assert_close(np.array(weights_of(exact, model.config)), expected, "weights")
            slots = values[f"blocks.{receiver}.mlp.hook_expert_indices"][row, position].tolist()
            assert chosen_experts(exact, model.config) == slots


def config(**changes: Any) -> Any:
    return OlmoeConfig(**{"num_experts_per_tok": 2, "norm_topk_prob": False, **changes})


def test_ranks_break_ties_by_the_lower_index() -> None:
    assert ranks_of([1.0, 3.0, 3.0, -1.0, 3.0]) == [4, 1, 2, 5, 3]
    assert chosen_experts([1.0, 3.0, 3.0, -1.0, 3.0], config()) == [1, 2]
    assert chosen_experts([0.0] * 4, config(num_experts_per_tok=3)) == [0, 1, 2]


def test_rank_shift_by_hand() -> None:
    logits = [4.0, 3.0, 2.0, 1.0]  # ranks 1 2 3 4, chosen 0 and 1
    assert rank_shift_of(logits, [0, 0, 0, 0], config()) == (0, 1, 0)
    assert rank_shift_of(logits, [5, 5, 5, 5], config()) == pytest.approx((0, 1, 0), abs=1e-15)
    # Left: -1 3 2 1, ranks 4 1 2 3: expert 0 falls by 3, expert 1 rises by 1, and 2 takes the place of 0.
    aarv, overlap, change = rank_shift_of(logits, [5, 0, 0, 0], config())
    assert (aarv, overlap) == (2, 0.5)
    before, after = probabilities_of(logits), probabilities_of([-1.0, 3.0, 2.0, 1.0])
    assert change == pytest.approx(before[0] + abs(before[1] - after[1]) + after[2])
    # Left: 2 3 2 1: 0 ties with 2 and keeps the better rank; ranks 2 1 3 4.
    assert rank_shift_of(logits, [2, 0, 0, 0], config())[:2] == (1, 1)
    # Left: 4 3 3 3: all ties go to the lower index, nothing moves.
    assert rank_shift_of(logits, [0, 0, -1, -2], config())[:2] == (0, 1)
    # Left: 3 3 4 4: 2 and 3 come first, 0 and 1 keep their order.
    assert rank_shift_of(logits, [1, 0, -2, -3], config())[:2] == (2, 0)


def test_weights_are_as_applied() -> None:
    logits = [4.0, 3.0, 2.0, 1.0]
    probabilities = probabilities_of(logits)
    np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum())
    assert weights_of(logits, config()) == [*probabilities[:2], 0, 0]
    share = 1 / (1 + math.exp(-1))
    renormalised = weights_of(logits, config(norm_topk_prob=True))
    assert renormalised == pytest.approx([share, 1 - share, 0, 0])
    # Renormalised weights of two experts that swap with two others change by 2, the most there is.
    change = rank_shift_of(logits, [9, 9, 0, 0], config(norm_topk_prob=True))[2]
    assert change == pytest.approx(2)


def test_groups_limit_the_choice(hf: Load) -> None:
    """Four groups of two, of which the best two may be chosen from, and three experts are."""
    grouped = hf("deepseek_v2_groups").config
    assert (grouped.n_group, grouped.topk_group, grouped.num_experts_per_tok) == (4, 2, 3)
    logits = [5.0, -9.0, 4.0, 3.5, 4.0, 3.9, 0.0, 0.0]  # best of groups 5, 4, 4, 0: a tie for the second
    assert eligible_experts(probabilities_of(logits), grouped) == [0, 1, 2, 3]
    assert chosen_experts(logits, grouped) == [0, 2, 3]
    # Among all experts 0 has rank 1, 2 and 4 share the next, 5 is before 3: ranks know nothing of groups.
    assert ranks_of(logits) == [1, 8, 2, 5, 3, 4, 6, 7]
    # Without 1 on expert 2, group 2 is better than group 1.
    aarv, overlap, change = rank_shift_of(logits, [0, 0, 1, 0, 0, 0, 0, 0], grouped)
    assert aarv == pytest.approx((0 + 3 + 1) / 3)
    assert overlap == pytest.approx(1 / 3)
    assert 0 < change < 2 * grouped.routed_scaling_factor


def test_rank_shifts_of_a_model(hf: Load) -> None:
    """Taking off what one expert wrote, for the token that it was taken off; and no shift where it wrote nothing."""
    model, values = hf("mixtral"), values_of(hf("mixtral"))
    shifts = rank_shifts(model, values, 1, "expert")
    scores = dense_scores(model, values, 1, "expert")
    assert list(shifts) == list(scores)
    for name in ("M0E3", "A1"):
        for measure, neutral in [("aarv", 0), ("overlap", 1), ("weight_change", 0)]:
            got = shifts[name][measure]
            assert got.shape == scores[name].shape[:2]
            np.testing.assert_array_equal(got[(scores[name] == 0).all(-1)], neutral)
    assert max(float(shift["aarv"].max()) for shift in shifts.values()) > 0.5
    indices = values["blocks.1.mlp.hook_expert_indices"]
    left = readout_logits(model, values, 1) - scores["A1"]
    for row, position in np.ndindex(*left.shape[:2]):
        kept = set(indices[row, position].tolist()) & set(np.argsort(-left[row, position])[:2].tolist())
        assert shifts["A1"]["overlap"][row, position] == len(kept) / 2


# --- rank correlation ---------------------------------------------------------------------------------------


def test_spearman_is_scipy_s() -> None:
    assert average_ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    generator = np.random.default_rng(0)
    for n in (2, 3, 10, 40):
        x, y = generator.normal(size=n), generator.normal(size=n)
        tied_x, tied_y = generator.integers(0, 4, n + 3), generator.integers(0, 4, n + 3)
        for a, b in [(x, y), (tied_x, tied_y), (x, -x)]:
            assert spearman(a.tolist(), b.tolist()) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)

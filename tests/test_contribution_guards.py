"""What `routing_contributions` refuses, and what it says of a run: weights, tokens, edits, checks, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.corpus import Document, token_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.provenance import TokenDigest, weights_fingerprint
from moe_lens.routing.runs import Plan
from tests.families import prompts

Load = Callable[[str], HookedMoE]


@pytest.fixture
def own(checkpoint: Callable[[str], Path]) -> HookedMoE:
    """A model whose weights a test may change."""
    return HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.float32, device="cpu", verbose=False)


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [prompts("right", seed=seed) for seed in range(n)]


def counting(model: HookedMoE, point: str = "hook_embed") -> tuple[Any, list[tuple[int, ...]]]:
    seen: list[tuple[int, ...]] = []
    return model.hooks([(point, lambda value, hook: seen.append(tuple(value.shape)))]), seen


# ---- what is given ----


def test_a_bare_pair_is_refused(model_of: Load) -> None:
    tokens, mask = prompts("right")
    for second in (mask, mask.bool()):
        with pytest.raises(ValueError, match=r"\[\(tokens, mask\)\]"):
            routing_contributions(model_of("olmoe"), (tokens, second))


def test_a_tensor_is_run_in_batches(model_of: Load) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("right", batch=7)
    listening, seen = counting(model)
    with listening:
        got = routing_contributions(model, tokens, attention_mask=mask, batch_size=3)
    assert [shape[0] for shape in seen] == [3, 3, 1]
    whole = routing_contributions(model, [(tokens, mask)])
    assert got.n_documents == whole.n_documents
    np.testing.assert_allclose(got.variance["rest"], whole.variance["rest"], rtol=1e-5)
    with pytest.raises(ValueError, match="batch_size=0"):
        routing_contributions(model, tokens, batch_size=0)


def test_texts_of_which_one_is_no_text(model_of: Load) -> None:
    with pytest.raises(ValueError, match="texts must all be strings, and there is one of type int"):
        routing_contributions(model_of("olmoe"), ["a text", 3])  # type: ignore[list-item]


def test_numpy_integers_are_integers(model_of: Load, tmp_path: Path) -> None:
    model = model_of("olmoe")
    settings = dict(
        by="source", receivers=np.array([1, 2]), experts=np.array([1, 4]), max_positions=np.int64(9)
    )
    got = routing_contributions(model, batches(), state=tmp_path / "state", save_every=0, **settings)
    assert got.receivers == ("M1", "M2")
    assert got.provenance["experts"] == [1, 4]
    assert got.receiver_index(np.int64(2)) == 1  # type: ignore[arg-type]
    again = routing_contributions(model, batches(), state=tmp_path / "state", **settings)
    np.testing.assert_array_equal(got.variance["rest"], again.variance["rest"])


# ---- which run it was ----


def test_a_fingerprint_sees_every_number(own: HookedMoE) -> None:
    first = weights_fingerprint(own)
    assert weights_fingerprint(own) == first
    weight = own.blocks[1].mlp.experts.W_down
    seen = {first}
    with torch.no_grad():
        for place in ((0, 5, 7), (7, 31, 63), (3, 0, 1)):
            weight[place] += 1e-3
            seen.add(weights_fingerprint(own))
        weight[[0, 1]] = weight[[1, 0]].clone()  # the same numbers, in other places
        seen.add(weights_fingerprint(own))
    assert len(seen) == 5


def test_other_weights_are_another_run(own: HookedMoE, tmp_path: Path) -> None:
    half = routing_contributions(own, batches(1), state=tmp_path / "state", save_every=0)
    with torch.no_grad():
        own.blocks[0].mlp.experts.W_down[:, 5] = 0.0
    with pytest.raises(ValueError, match="is of another run: weights was"):
        routing_contributions(own, batches(2), state=tmp_path / "state")
    with pytest.raises(ValueError, match="cannot be added: weights is"):
        half + routing_contributions(own, batches(2)[1:])


def ablated(value: Tensor, hook: Any) -> Tensor:
    return 0 * value


def test_an_edited_run_says_so_and_is_another_run(model_of: Load, tmp_path: Path) -> None:
    model, state = model_of("olmoe"), tmp_path / "state"
    plain = routing_contributions(model, batches(1), state=state, save_every=0)
    assert plain.provenance["edited"] == []
    with model.hooks([("blocks.0.hook_mlp_out", ablated)]):
        edited = routing_contributions(model, batches(2)[1:])
        assert edited.provenance["edited"] == ["blocks.0.hook_mlp_out"]
        with pytest.raises(ValueError, match=r"hooks edited nothing, and now .*hook_mlp_out"):
            routing_contributions(model, batches(2), state=state)
    with pytest.raises(ValueError, match="cannot be added: edited is"):
        plain + edited
    # Looking is no edit, and an edit in place is one.
    with model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value)]):
        assert routing_contributions(model, batches(1)).provenance["edited"] == []

    def in_place(value: Tensor, hook: Any) -> None:
        value.mul_(0.5)

    with model.hooks([("blocks.0.hook_mlp_out", in_place)]):
        assert routing_contributions(model, batches(1)).provenance["edited"] == ["blocks.0.hook_mlp_out"]


def test_an_edited_run_goes_on_as_it_was(model_of: Load, tmp_path: Path) -> None:
    model, state = model_of("olmoe"), tmp_path / "state"
    with model.hooks([("blocks.0.hook_mlp_out", ablated)]):
        whole = routing_contributions(model, batches(3))
        routing_contributions(model, batches(1), state=state, save_every=0)
        resumed = routing_contributions(model, batches(3), state=state)
    assert resumed.provenance == whole.provenance
    np.testing.assert_array_equal(whole.variance["rest"], resumed.variance["rest"])
    with pytest.raises(ValueError, match=r"hooks edited .*hook_mlp_out.*, and now nothing"):
        routing_contributions(model, batches(4), state=state)


def test_the_same_tokens_in_other_batches_are_the_same_tokens(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens, mask = prompts("left", batch=4)
    together = routing_contributions(model, [(tokens, mask)])
    apart = routing_contributions(model, [(tokens[:1], mask[:1]), (tokens[1:], mask[1:])])
    assert together.provenance["fingerprints"] == apart.provenance["fingerprints"]
    with pytest.raises(ValueError, match="both hold the same tokens"):
        together + apart
    corpus = token_batches(
        model, [Document("a", "", "the store"), Document("b", "", "a drink")], batch_size=2
    )
    assert routing_contributions(model, corpus).provenance["fingerprints"] == [corpus.fingerprint]


def test_a_digest_tells_padding_from_a_token() -> None:
    tokens = torch.tensor([[5, 0, 0]])
    hexes = set()
    for mask in ([1, 0, 0], [1, 1, 0], [1, 1, 1]):
        digest = TokenDigest()
        digest.add(tokens, torch.tensor([mask]))
        hexes.add(digest.hexdigest())
    assert len(hexes) == 3


# ---- passes and memory ----


class Shuffled(list):
    """Batches that are others each time."""

    def __iter__(self) -> Iterator[Any]:
        self.reverse()
        return super().__iter__()


@pytest.mark.parametrize("by", ["layer", "expert"])
def test_passes_over_other_tokens_raise(model_of: Load, by: str) -> None:
    model = model_of("olmoe")
    budget = Plan.make(model, [by], [2], 2**40, False, 0).bytes_needed
    with pytest.raises(ValueError, match="pass 2 of 2 met other tokens than the first"):
        routing_contributions(model, Shuffled(batches(3)), by=by, receivers=[1, 2], memory_budget=budget)


def test_the_plan_counts_what_is_held(model_of: Load) -> None:
    """A mean and a spread in float64, of five measures, for lead and rest, all and active: 320 bytes for each sender
    (and rounding's place); of neurons a float32 table besides."""
    model = model_of("olmoe")
    for by, n_senders, table in (("expert", 3 + 1 + 2 * 8, 0), ("neuron", 3 + 1 + 2 * 8 * 32, 5 * 4)):
        plan = Plan.make(model, [by], [2], 2**40, False, 0)
        assert plan.bytes_needed == plan.largest == (n_senders + 1) * (320 + table)
        assert plan.chunks == [(2,)]


def test_no_later_layer_is_run(model_of: Load) -> None:
    model = model_of("olmoe")
    listening, seen = counting(model, "blocks.1.hook_resid_mid")
    with listening:
        routing_contributions(model, batches(1), receivers=[0])
        assert not seen
        routing_contributions(model, batches(1), receivers=[1])
        assert len(seen) == 1


def test_a_table_holds_the_frames(model_of: Load, tmp_path: Path) -> None:
    got = routing_contributions(model_of("deepseek_v2"), batches(), by="expert")
    table = pd.read_parquet(got.write_table(tmp_path / "table.parquet"))
    for tokens, frame in (("all", got.to_frame()), ("active", got.to_frame(when_active=True))):
        rows = table[table["tokens"] == tokens].drop(columns="tokens")
        keys = ["position", "sender", "receiver"]
        pd.testing.assert_frame_equal(
            rows.sort_values(keys, ignore_index=True), frame.sort_values(keys, ignore_index=True)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_reprs_are_short(model_of: Load) -> None:
    got = routing_contributions(model_of("olmoe"), batches(1))
    assert repr(got).startswith("<RoutingContributions by layer: 6 senders at 3 receivers, 2 documents")
    assert len(repr(got)) < 200


# ---- checks ----


def test_the_largest_error_is_kept(model_of: Load) -> None:
    """An edit of the stream in the first batch, before the first of several routers, shows in the end."""
    model = model_of("olmoe")
    calls: list[int] = []

    def once(value: Tensor, hook: Any) -> Tensor | None:
        calls.append(1)
        return value + 0.5 if len(calls) == 1 else None

    with model.hooks([("blocks.0.hook_resid_mid", once)]):
        got = routing_contributions(model, batches(3), allow_incomplete=True)
    assert got.completeness_error > 1e-2
    assert not got.closes


def test_passes_keep_the_largest_error(model_of: Load) -> None:
    model = model_of("olmoe")
    budget = Plan.make(model, ["layer"], [2], 2**40, False, 0).bytes_needed
    for point, whose in (("blocks.0.hook_resid_mid", [0, 2]), ("blocks.2.hook_resid_mid", [0, 2])):
        with model.hooks([(point, lambda value, hook: value + 0.5)]):
            got = routing_contributions(
                model, batches(2), receivers=whose, memory_budget=budget, allow_incomplete=True
            )
        assert got.completeness_error > 1e-2


def test_a_fault_at_the_last_token_of_a_neuron_run_is_seen(model_of: Load) -> None:
    model = model_of("qwen2_moe")

    def last(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[-1, -1] *= 1.5
        return value

    tokens, _ = prompts()
    with (
        model.hooks([("blocks.0.hook_mlp_out", last)]),
        pytest.raises(ValueError, match="senders by neuron are not what the routers read"),
    ):
        routing_contributions(model, tokens, by="neuron")


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_what_is_not_finite_raises(model_of: Load, by: str) -> None:
    model = model_of("olmoe")
    tokens, _ = prompts(batch=4, length=12)  # more tokens than are checked of neurons

    def spoil(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[1, 3, 0, 2] = torch.inf
        return value

    hooks = [
        ("blocks.0.mlp.hook_expert_post", spoil),
        ("blocks.0.mlp.hook_expert_out", lambda value, hook: value.nan_to_num(0, 0, 0)),
    ]
    with model.hooks(hooks):
        if by == "layer":
            assert routing_contributions(model, tokens).closes
        else:
            with pytest.raises(ValueError, match="not finite"):
                routing_contributions(model, tokens, by=by)


def test_the_gate_s_own_arithmetic_is_reported(model_of: Load) -> None:
    model = model_of("olmoe")
    assert routing_contributions(model, batches(1)).model_logit_difference < 1e-4
    assert routing_contributions(model, batches(1), experts=[1, 3]).model_logit_difference < 1e-4
    with model.hooks([("blocks.1.mlp.hook_router_logits", lambda value, hook: value + 0.25)]):
        got = routing_contributions(model, batches(1))
    assert got.model_logit_difference == pytest.approx(0.25, abs=1e-4)
    assert got.provenance["edited"] == ["blocks.1.mlp.hook_router_logits"]


def test_selected_experts_of_uneven_numbers_raise(model_of: Load) -> None:
    model = model_of("olmoe")
    with (
        model.hooks([("blocks.1.mlp.hook_expert_indices", lambda value, hook: value[..., :2])]),
        pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_expert_indices chooses 2 experts"),
    ):
        routing_contributions(model, batches(1), experts="selected")


def test_attention_that_is_none_is_refused_by_source(model_of: Load) -> None:
    model, (tokens, _) = model_of("olmoe"), prompts()
    edits = {
        "not negative": lambda value, hook: -value,
        "sees no later token": lambda value, hook: torch.full_like(value, 1 / value.shape[-1]),
    }
    for message, edit in edits.items():
        with model.hooks([("blocks.0.attn.hook_pattern", edit)]):
            with pytest.raises(ValueError, match=message):
                routing_contributions(model, tokens, by="source")
            assert routing_contributions(model, tokens, by="head").closes

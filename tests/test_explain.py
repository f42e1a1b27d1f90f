"""One decision explained: against the slow reference, as sums at every depth, and against runs without the sender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.decision import boundary_of
from moe_lens.routing.explain import Explanation, explain
from moe_lens.routing.explanation import PresentSender, explanation_of
from moe_lens.routing.senders import GRANULARITIES, ROUNDING
from tests.families import prompts
from tests.reference import reference_run
from tests.reference_rank_shift import (
    chosen_experts,
    eligible_experts,
    probabilities_of,
    ranks_of,
    weights_of,
)
from tests.reference_routing import dense_scores, readout_logits, sender_vectors

# One of each family, and those whose streams or choices differ in kind: attention biases, dense layers, groups.
VARIANTS = (
    "olmoe",
    "olmoe_bias_odd_width",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "qwen3_moe",
    "mixtral",
)
FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe_dense_bias", "mixtral")
POS = 5
TEXT = "When Mary and John went to the store, John gave a drink to Mary."


def one_text(seed: int = 0) -> tuple[Tensor, Tensor]:
    """One padded row of tokens: the first is padding."""
    return prompts("left", seed=seed, batch=1, length=8)


def last_router(model: HookedMoE) -> int:
    return model.cfg.moe_layers[-1]


@pytest.fixture
def references(hf: Callable[[str], Any]) -> Callable[..., Any]:
    """The reference's hook values of `one_text`, its scores and its logits at `POS`, by variant and granularity."""

    @cache
    def values_of(variant: str) -> Any:
        with torch.no_grad():
            return reference_run(hf(variant), *one_text())[1]

    def scores(variant: str, receiver: int, by: str) -> tuple[dict[str, np.ndarray], list[float]]:
        values = values_of(variant)
        of_senders = {n: s[0, POS] for n, s in dense_scores(hf(variant), values, receiver, by).items()}
        return of_senders, readout_logits(hf(variant), values, receiver)[0, POS].tolist()

    return scores


def at_text(model: HookedMoE, router: int, expert: int, by: str = "layer", **settings: Any) -> Explanation:
    tokens, mask = one_text()
    return explain(model, tokens, POS, router, expert, by, attention_mask=mask, **settings)


def slow_boundary(logits: list[float], expert: int, config: Any) -> int:
    """The last chosen for an expert left out; for a chosen one the first of those left out that could be chosen."""
    chosen = chosen_experts(logits, config)
    in_order = sorted(range(len(logits)), key=lambda e: (-logits[e], e))
    if expert not in chosen:
        return chosen[-1]
    eligible = eligible_experts(probabilities_of(logits), config)
    return next(e for e in in_order if e not in chosen and e in eligible)


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_contributions_are_the_reference_s(
    model_of: Callable[[str], Any],
    hf: Callable[[str], Any],
    references: Callable[..., Any],
    variant: str,
    by: str,
) -> None:
    model, config = model_of(variant), hf(variant).config
    router = last_router(model)
    scores, logits = references(variant, router, by)
    size = max(map(abs, logits))
    chosen = chosen_experts(logits, config)
    left_out = next(e for e in range(len(logits)) if e not in chosen)
    for expert in (chosen[0], left_out):
        got = at_text(model, router, expert, by)
        boundary = slow_boundary(logits, expert, config)
        assert (got.boundary, got.rank) == (boundary, ranks_of(logits)[expert])
        assert got.boundary_rank == ranks_of(logits)[boundary]
        assert got.selected == got.chosen_by_model == (expert in chosen)
        assert got.routing_weight == pytest.approx(weights_of(logits, config)[expert], rel=1e-4)
        assert got.logit_difference == pytest.approx(logits[expert] - logits[boundary], abs=2e-5 * size)
        assert (got.router, got.pos, got.by, got.of) == (router, POS, by, None)

        assert list(got.senders) == [name for name in scores if name in got.senders]
        assert got.n_absent == len(scores) - len(got.senders)
        for name, score in scores.items():
            if name in got.senders:
                i = got.senders.index(name)
                wanted = [score[expert], score[boundary]]
                np.testing.assert_allclose(got.scores[i], wanted, atol=2e-5 * size, err_msg=name)
                np.testing.assert_allclose(
                    got.contributions[i], wanted[0] - wanted[1], atol=2e-5 * size, err_msg=name
                )
            else:
                assert not score.any(), name
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is None
        assert got.margin == got.logit_difference or abs(got.margin - got.logit_difference) < 1e-5 * size
        assert got.contributions.sum() == pytest.approx(got.margin, abs=1e-5 * size)
        assert got.model_logit_difference <= 1e-5 * size


@pytest.mark.parametrize("variant", VARIANTS)
def test_drills_sum_to_what_they_divide(model_of: Callable[[str], Any], variant: str) -> None:
    """All the way down, without another pass; and parts are what the finer granularity calls them."""
    model = model_of(variant)
    router = last_router(model)
    whole = {by: at_text(model, router, 2, by) for by in GRANULARITIES}
    size = abs(whole["layer"].logit_difference) + 1

    def check(parts: Explanation, parent: Explanation, sender: str) -> None:
        contribution = parent.contributions[parent.senders.index(sender)]
        assert parts.of == sender
        assert parts.margin == pytest.approx(contribution, abs=1e-5 * size)
        assert parts.contributions.sum() == pytest.approx(contribution, abs=1e-5 * size)
        assert parts.completeness_error <= 1e-5
        assert parts.logit_difference == parent.logit_difference
        finer = whole[parts.by]
        for name, value in zip(parts.senders, parts.contributions, strict=True):
            expected = finer.contributions[finer.senders.index(name)]
            assert value == pytest.approx(expected, abs=1e-5 * size), name

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("another forward pass was made")

    model.forward = forbidden
    try:
        divided = []
        for sender in whole["layer"].senders[1:]:
            parts = whole["layer"].drill(sender)
            check(parts, whole["layer"], sender)
            divided.append(parts.by)
            for part in parts.senders:
                if (parts.by == "head" and not part.endswith("bias")) or parts.by == "expert":
                    check(parts.drill(part), parts, part)
                else:
                    with pytest.raises(ValueError, match=f"'{part}' has no parts; "):
                        parts.drill(part)
        dense = [layer for layer in range(router) if layer not in model.cfg.moe_layers]
        assert divided.count("neuron") == len(dense)
        # The same division, from an explanation that was finer to begin with.
        head, expert = whole["head"].senders[1], next(s for s in whole["expert"].senders if "E" in s)
        check(whole["head"].drill(head), whole["head"], head)
        check(whole["expert"].drill(expert), whole["expert"], expert)
    finally:
        del model.forward


def test_drilling_twice_and_what_is_absent(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    got = at_text(model, 2, 3).drill("A2").drill("A2H1")
    assert got.senders == tuple(f"A2H1<-{column}" for column in range(1, POS + 1))
    assert got.n_absent == 8 - POS  # the padded column, and those after the token
    experts = at_text(model, 2, 3).drill("M1")
    assert len(experts.senders) == model.cfg.router.top_k
    assert experts.n_absent == model.cfg.n_experts - model.cfg.router.top_k
    assert experts.drill(experts.senders[0]).n_absent == 0
    assert "more are not listed" in experts.summary()
    assert "more are not listed" not in at_text(model, 2, 3).summary()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", FAMILIES)
def test_half_precision_has_rounding_as_a_sender(
    checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype
) -> None:
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=dtype, verbose=False)
    router = last_router(model)

    def check(got: Explanation) -> None:
        assert got.senders[-1] == ROUNDING
        assert got.senders.count(ROUNDING) == 1
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is not None
        assert got.rounding_ratio <= 1
        assert got.contributions.sum() == pytest.approx(got.margin, abs=1e-4)

    for by in GRANULARITIES:
        got = at_text(model, router, 1, by)
        check(got)
        assert got.model_logit_difference > 0
    layers = at_text(model, router, 1)
    for sender in layers.senders[1:-1]:
        parts = layers.drill(sender)
        check(parts)
        assert parts.margin == pytest.approx(layers.contributions[layers.senders.index(sender)], abs=1e-5)
        if parts.by in ("head", "expert"):
            check(parts.drill(parts.senders[0]))
    with pytest.raises(ValueError, match=r"'rounding' has no parts; what can be divided here: A0, M0"):
        layers.drill(ROUNDING)
    # Without its rounding the stream is the sum of what was written: the exact logits less what it scores.
    row = layers.verify(ROUNDING).iloc[0]
    assert row["logit_difference_frozen"] == pytest.approx(
        layers.logit_difference - layers.contributions[-1], abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checks_can_fail(checkpoint: Callable[[str], Path], dtype: torch.dtype) -> None:
    """A stream that holds more than was written is seen, and a layer that writes more than its heads."""
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=dtype, verbose=False)

    def seen(got: Explanation) -> bool:
        if dtype == torch.float32:
            return got.completeness_error > 1e-4
        return got.rounding_ratio is not None and got.rounding_ratio > 1

    expert = next(s for s in at_text(model, 2, 3, "expert").senders if s.startswith("M1E"))
    assert not seen(at_text(model, 2, 3))
    for name, explained in (
        ("blocks.2.hook_resid_mid", lambda: at_text(model, 2, 3)),
        ("blocks.2.hook_attn_out", lambda: at_text(model, 2, 3).drill("A2")),
        ("blocks.1.mlp.hook_expert_contrib", lambda: at_text(model, 2, 3, "expert").drill(expert)),
    ):
        assert not seen(explained()), name
        point = model.hook_dict[name]
        true_forward = point.forward
        point.forward = lambda value, forward=true_forward: 1.1 * forward(value)  # type: ignore[method-assign]
        assert seen(explained()), name
        point.forward = true_forward  # type: ignore[method-assign]


# ---- counterfactuals ----


@pytest.mark.parametrize("by", ["layer", "head", "source", "expert"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_frozen_is_the_logits_less_the_score(
    model_of: Callable[[str], Any],
    hf: Callable[[str], Any],
    references: Callable[..., Any],
    variant: str,
    by: str,
) -> None:
    model, config = model_of(variant), hf(variant).config
    router = last_router(model)
    scores, logits = references(variant, router, by)
    got = at_text(model, router, 2, by)
    table = got.verify()
    assert table["sender"].tolist() == list(got.senders)
    for row in table.to_dict("records"):
        left = [logit - score for logit, score in zip(logits, scores[row["sender"]], strict=True)]
        assert row["rank_frozen"] == ranks_of(left)[2]
        assert row["selected_frozen"] == (2 in chosen_experts(left, config))
        assert row["weight_frozen"] == pytest.approx(weights_of(left, config)[2], abs=1e-4)
        expected = got.logit_difference - row["contribution"]
        assert row["logit_difference_frozen"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_recomputed_is_a_run_without_the_vector(
    model_of: Callable[[str], Any], hf: Callable[[str], Any], variant: str
) -> None:
    model = model_of(variant)
    router = last_router(model)
    tokens, mask = one_text()
    with torch.no_grad():
        _, values = reference_run(hf(variant), tokens, mask)
    for by in ("layer", "head", "source", "neuron"):
        vectors = sender_vectors(hf(variant), values, router, by)
        got = at_text(model, router, 1, by)
        some = list(got.senders[:: max(1, len(got.senders) // 6)])
        for row in got.verify(some).to_dict("records"):
            vector = torch.tensor(vectors[row["sender"]][0, POS], dtype=torch.float32)
            logits, indices, weights = hooked_run(model, router, vector)
            expected = float(logits[1] - logits[got.boundary])
            assert row["logit_difference_recomputed"] == pytest.approx(expected, abs=1e-4)
            assert row["rank_recomputed"] == ranks_of(logits.tolist())[1]
            assert row["selected_recomputed"] == (1 in indices)
            assert row["weight_recomputed"] == pytest.approx(weights.get(1, 0.0), abs=1e-4)
            for quantity in ("rank", "logit_difference", "weight"):
                gap = row[f"{quantity}_recomputed"] - row[f"{quantity}_frozen"]
                assert row[f"{quantity}_gap"] == pytest.approx(gap, abs=1e-5)


def hooked_run(model: HookedMoE, router: int, vector: Tensor) -> tuple[Tensor, list[int], dict[int, float]]:
    """Logits, choice and weights of a whole forward pass that takes a vector from the stream before the router."""
    seen: dict[str, Tensor] = {}

    def without(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[0, POS] = (value[0, POS].float() - vector).to(value.dtype)
        return value

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name.split("hook_")[-1]] = value[0, POS].detach()

    at = f"blocks.{router}."
    points = ("router_logits", "expert_indices", "routing_weights")
    tokens, mask = one_text()
    hooks = [(f"{at}mlp.hook_{point}", keep) for point in points]
    # Patterns are listened to as they were in the explained run: in half precision that rounds attention otherwise.
    hooks += [(f"blocks.{layer}.attn.hook_pattern", lambda value, hook: None) for layer in range(router + 1)]
    with torch.no_grad():
        model.run_with_hooks(
            tokens, attention_mask=mask, fwd_hooks=[*hooks, (f"{at}hook_resid_mid", without)]
        )
    indices = seen["expert_indices"].tolist()
    weights = dict(zip(indices, seen["routing_weights"].float().tolist(), strict=True))
    return seen["router_logits"].float(), indices, weights


@pytest.mark.parametrize("variant", FAMILIES)
def test_recomputed_in_half_precision(checkpoint: Callable[[str], Path], variant: str) -> None:
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, verbose=False)
    router = last_router(model)
    got = at_text(model, router, 1)
    tokens, mask = one_text()
    with torch.no_grad():
        _, store = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=lambda n: n.endswith(("_out", "pattern", "hook_embed"))
        )
    for sender, hook in (("embed", "hook_embed"), ("A0", "blocks.0.hook_attn_out")):
        logits, _, _ = hooked_run(model, router, store[hook][0, POS].float())
        row = got.verify(sender).iloc[0]
        expected = float(logits[1] - logits[got.boundary])
        tolerance = 4 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
        assert row["logit_difference_recomputed"] == pytest.approx(expected, abs=tolerance)


def test_verify_takes_one_several_or_all(model_of: Callable[[str], Any]) -> None:
    got = at_text(model_of("mixtral"), 1, 4, "neuron")
    assert got.verify("embed")["sender"].tolist() == ["embed"]
    two = [got.senders[-1], "embed"]
    assert got.verify(two)["sender"].tolist() == two
    assert len(got.verify()) == len(got.senders)
    pd.testing.assert_frame_equal(got.verify().iloc[[0]], got.verify("embed"), atol=1e-5)
    # A drilled explanation's senders are taken from the same decision.
    whole, drilled = (
        at_text(model_of("mixtral"), 1, 4, "head"),
        at_text(model_of("mixtral"), 1, 4).drill("A0"),
    )
    pd.testing.assert_frame_equal(whole.verify("A0H2"), drilled.verify("A0H2"), atol=1e-5)
    with pytest.raises(ValueError, match="there is no sender 'M7' here; there are embed, A0"):
        got.verify("M7")
    with pytest.raises(ValueError, match="no sender to verify"):
        got.verify([])


@pytest.mark.parametrize(
    ("point", "edit"),
    [
        ("mlp.hook_router_logits", lambda value, hook: plus(value, (0, 4, 0), 5.0)),
        ("mlp.hook_router_logits", lambda value, hook: plus(value, (0, 7, 0), 5.0)),
        ("mlp.hook_expert_indices", lambda value, hook: torch.arange(value.shape[-1]).expand_as(value)),
        ("mlp.hook_expert_indices", lambda value, hook: 7 - torch.arange(value.shape[-1]).expand_as(value)),
        ("ln2.hook_normalized", lambda value, hook: plus(value, (0, 7), 1.0)),
        ("mlp.hook_expert_weights", lambda value, hook: 0 * value),
    ],
)
def test_hooks_do_not_act_in_the_recompute(
    model_of: Callable[[str], Any], point: str, edit: Callable[..., Tensor]
) -> None:
    """Streams are no positions: a hook that edits one of those must not edit one of the streams."""
    model = model_of("olmoe")
    tokens, _ = one_text()
    for by in ("layer", "expert"):
        plain = explain(model, tokens, 4, 2, 0, by)
        with model.hooks([(f"blocks.2.{point}", edit)]):
            got = explain(model, tokens, 4, 2, 0, by)
            under_hooks, one = got.verify(), got.verify("M1" if by == "layer" else "embed")
        for table in (under_hooks, got.verify()):
            pd.testing.assert_frame_equal(table, plain.verify())
        same = under_hooks[under_hooks["sender"].isin(one["sender"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(one, same, atol=1e-5)


def plus(value: Tensor, place: tuple[int, ...], amount: float) -> Tensor:
    value = value.clone()
    value[place] += amount
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recompute_is_the_model_s_own_arithmetic(
    checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype
) -> None:
    """Of the stream as it is: the logits, the choice and the weights of the run."""
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=dtype, verbose=False)
    router = last_router(model)
    token = at_text(model, router, 0)._decision.token
    stream = token.at_receiver("hook_resid_mid").float()
    logits, chosen, weights = token.routed(stream[None].repeat(3, 1))
    of_run = hooked_run(model, router, torch.zeros_like(stream))
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    size = float(of_run[0].abs().max())
    for row in range(3):
        torch.testing.assert_close(logits[row], of_run[0], atol=tolerance * size, rtol=0)
        if len(set(logits[row].tolist())) == len(logits[row]):  # in half precision, two may tie
            assert chosen[row].nonzero()[:, 0].tolist() == sorted(of_run[1])
            for expert, weight in of_run[2].items():
                assert float(weights[row, expert]) == pytest.approx(weight, rel=4 * tolerance)
        assert (weights[row] > 0).equal(chosen[row])
        as_applied = torch.float32 if model.cfg.router.float32_weights else dtype
        assert weights[row].to(as_applied).float().equal(weights[row])


def test_weights_changed_since_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), verbose=False)
    got = at_text(model, 2, 3)
    got.drill("M1"), got.verify("M1")
    output = model.blocks[0].attn.o_proj
    with torch.no_grad():
        output.weight.mul_(2)
    for read in (lambda: got.drill("M1"), lambda: got.verify("M1")):
        with pytest.raises(ValueError, match="weights have been changed since this was explained"):
            read()
    again = at_text(model, 2, 3)
    assert again.drill("A0").closes
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    with pytest.raises(ValueError, match="weights have been changed"):
        again.drill("A0")
    with torch.inference_mode():
        output.weight = torch.nn.Parameter(output.weight.clone(), requires_grad=False)
    assert at_text(model, 2, 3).drill("A0").closes


# ---- sums that do not close ----


def test_a_stream_that_was_edited_is_said(checkpoint: Callable[[str], Path]) -> None:
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.float32, verbose=False)
    good = at_text(model, 2, 3)
    assert good.closes
    assert "do not add up" not in good.summary() + repr(good)
    with model.hooks([("blocks.1.hook_resid_pre", lambda value, hook: 1.5 * value)]):
        got = at_text(model, 2, 3)
    assert got.completeness_error > 1e-4
    assert not got.closes
    assert "The senders do not add up to the stream: they miss" in got.summary()
    assert repr(got).endswith("senders, which do not add up>")
    with model.hooks([("blocks.1.hook_attn_out", lambda value, hook: 1.5 * value)]):
        whole = at_text(model, 2, 3)
    parts = whole.drill("A1")
    assert whole.closes
    assert not parts.closes
    assert "The parts do not add up to what A1 wrote: they miss" in parts.summary()
    assert not replace(good, completeness_error=float("nan")).closes


def test_a_half_precision_stream_that_was_replaced_is_said(checkpoint: Callable[[str], Path]) -> None:
    """Its sums close whatever it holds: `rounding` takes all the rest, and is too large for one."""
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16, verbose=False)
    good = at_text(model, 2, 3)
    assert good.closes
    assert "do not add up" not in good.summary() + repr(good)
    with model.hooks([("blocks.1.hook_resid_pre", lambda value, hook: torch.randn_like(value))]):
        got = at_text(model, 2, 3)
    assert got.completeness_error <= 1e-4
    assert got.rounding_ratio is not None
    assert got.rounding_ratio > 1
    assert not got.closes
    assert f"what is missing is {got.rounding_ratio:.2g} times the most that rounding can be" in got.summary()
    assert "do not add up" in repr(got)


def test_completeness_is_of_both_experts_and_their_difference(model_of: Callable[[str], Any]) -> None:
    """What is missing from both alike does not show in the difference."""
    decision = at_text(model_of("olmoe"), 2, 3)._decision
    group = decision.token.groups("layer")[0]
    scores = torch.tensor([[1.0, 2.0, -1.0]])
    largest = float(decision.logits.abs().max())
    for missing in ([0.5, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]):
        got = explanation_of(
            decision,
            [PresentSender("embed", group, 0)],
            scores=scores,
            wanted=scores[0] + torch.tensor(missing),
            rounding=None,
            rounding_ratio=None,
            by="layer",
            of=None,
            n_absent=0,
            tokens=("a",) * 8,
        )
        assert got.completeness_error == pytest.approx(0.5 / largest)
        assert not got.closes


@pytest.mark.parametrize("column", [0, 7])
def test_a_pattern_that_sees_the_unseen_has_no_sources(model_of: Callable[[str], Any], column: int) -> None:
    """Padding (column 0), and what comes after the token (column 7)."""
    model = model_of("olmoe")

    def attend(value: Tensor, hook: Any) -> Tensor:
        return plus(value, (0, 1, POS, column), 0.25)

    said = rf"in layer 1 the token at 5 attends to positions {column}, which come after it or are padding"
    with model.hooks([("blocks.1.attn.hook_pattern", attend)]):
        with pytest.raises(ValueError, match=said):
            at_text(model, 2, 3, "source")
        heads = at_text(model, 2, 3, "head")
    assert heads.closes  # what a head wrote is what it read, wherever
    with pytest.raises(ValueError, match=said):
        heads.drill("A1H1")
    assert heads.drill("A0H1").closes


# ---- the boundary ----


def test_boundaries_with_ties_and_without_anything_left_out(model_of: Callable[[str], Any]) -> None:
    router = model_of("mixtral").cfg.router  # two of eight
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, -1.0, 2.0, -2.0])
    assert [boundary_of(logits, e, router) for e in range(8)] == [2, 3, 3, 2, 2, 2, 2, 2]
    everything = replace(router, top_k=8)
    with pytest.raises(ValueError, match=r"chooses all of its 8 experts.*against="):
        boundary_of(logits, 0, everything)


def test_groups_decide_the_boundary(model_of: Callable[[str], Any]) -> None:
    router = model_of("deepseek_v2_groups").cfg.router  # three of eight; four groups, two of them eligible
    # Groups 0 and 2 are eligible, and expert 6 is not, although its logit is the third best.
    logits = torch.tensor([5.0, 0.0, 1.0, 0.5, 4.0, 2.0, 3.0, -1.0])
    assert boundary_of(logits, 0, router) == boundary_of(logits, 4, router) == 1
    assert boundary_of(logits, 6, router) == boundary_of(logits, 1, router) == 5
    # As many eligible experts as are chosen: the best of all that were left out.
    assert boundary_of(logits, 0, replace(router, top_k=4)) == 6


def test_a_group_that_is_not_eligible_is_said(
    model_of: Callable[[str], Any], hf: Callable[[str], Any]
) -> None:
    model, config = model_of("deepseek_v2_groups"), hf("deepseek_v2_groups").config
    said = 0
    for seed in range(3):
        tokens, _ = one_text(seed)
        for expert in range(8):
            got = explain(model, tokens, POS, 1, expert)
            logits = got._decision.logits.tolist()
            assert got.boundary == slow_boundary(logits, expert, config)
            ineligible = expert not in eligible_experts(probabilities_of(logits), config)
            assert ("is not eligible" in got.summary()) == ineligible
            said += ineligible
    assert said > 0


def test_fallback_boundary_is_said(model_of: Callable[[str], Any]) -> None:
    model = model_of("deepseek_v2_groups")
    cfg, block = model.cfg, model.blocks[1]
    wide = replace(cfg.router, top_k=4)
    model.cfg, block.mlp.cfg = replace(cfg, router=wide), wide
    try:
        chosen = next(e for e in range(8) if at_text(model, 1, e).selected)
        text = at_text(model, 1, chosen).summary()
        assert "could not have been chosen: its group" in text
        assert "the best that was left out." in text
    finally:
        model.cfg, block.mlp.cfg = cfg, cfg.router


def test_against_another_expert(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen3_moe")
    got = at_text(model, 2, 3, against=6)
    assert got.boundary == 6
    assert got.logit_difference == pytest.approx(-at_text(model, 2, 6, against=3).logit_difference)
    assert "with which it was to be compared" in got.summary()
    with pytest.raises(ValueError, match="cannot be compared with itself"):
        at_text(model, 2, 3, against=3)
    with pytest.raises(ValueError, match=r"against=8 is no expert; .* has experts 0 to 7"):
        at_text(model, 2, 3, against=8)


def test_edited_runs_are_explained_too(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    left_out = next(e for e in range(8) if not at_text(model, 2, e).selected)

    def force(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[0, POS, -1] = left_out
        return value

    with model.hooks([("blocks.2.mlp.hook_expert_indices", force)]):
        got = at_text(model, 2, left_out)
    assert not got.selected
    assert got.chosen_by_model
    assert "In the run the gate chose it" in got.summary()
    with model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
        got = at_text(model, 2, 3)
    assert got.completeness_error <= 1e-5
    assert got.contributions[got.senders.index("M0")] == 0


# ---- reading it ----


def test_table_and_summary(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_moe")
    got = explain(model, TEXT, -3, 2, 1)
    table = got.table()
    assert table.columns.tolist() == [
        "sender",
        "contribution",
        "expert_score",
        "boundary_score",
        "share",
        "cumulative",
    ]
    assert (table["contribution"].abs().diff().dropna() <= 0).all()
    assert table["share"].sum() == pytest.approx(1)
    assert table["cumulative"].iloc[-1] == pytest.approx(1)
    np.testing.assert_allclose(
        table["contribution"], table["expert_score"] - table["boundary_score"], atol=1e-5
    )
    assert got.table(2).equals(table.head(2))
    assert got.table(np.int64(2)).equals(table.head(2))  # type: ignore[arg-type]
    for wanted in (got.table, got.waterfall):
        with pytest.raises(ValueError, match="n=0 must be positive"):
            wanted(0)
        for wrong in (2.5, 2.0, True, "2"):
            with pytest.raises(TypeError, match=f"n={wrong!r} must be a positive integer"):
                wanted(wrong)  # type: ignore[arg-type]

    text = got.summary()
    assert f"At token {got.pos} ({got.token!r}) the router of layer 2" in text
    assert f"rank {got.rank} of 8, and 3 are chosen" in text
    assert f"{abs(got.logit_difference):.3f}" in text
    assert f"expert {got.boundary} (rank {got.boundary_rank})" in text
    largest = table.iloc[0]
    assert f"{largest['sender']} ({largest['contribution']:+.3f})" in text
    shares = np.sort(np.abs(got.contributions))[::-1].cumsum() / np.abs(got.contributions).sum()
    fewest = next(n for n, share in enumerate(shares, start=1) if share >= 0.8)
    assert 1 < fewest < len(got.senders)
    assert f"{fewest} senders of {len(got.senders)} made up 80% of all pushing, either way." in text
    assert ("with routing weight" in text) == got.selected
    drilled = got.drill("A1")
    assert f"A1 adds {drilled.margin:+.3f} to the difference" in drilled.summary()
    assert "A1 in expert 1" in repr(drilled)
    assert repr(got).startswith("<Explanation by layer: expert 1 ")


def test_sources_show_their_tokens(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    got = explain(model, TEXT, 6, 1, 2)
    drilled = got.drill("A1").drill("A1H0")
    assert drilled.labels[2] == f"A1H0<-2 {got.tokens[2]!r}"
    table = drilled.table()
    for sender, token in zip(table["sender"], table["source_token"], strict=True):
        assert token == got.tokens[int(sender.split("<-")[1])]
    mixed = explain(model, TEXT, 6, 1, 2, "source").table()
    assert mixed.loc[mixed["sender"] == "embed", "source_token"].item() == ""
    assert "source_token" not in got.table()


def test_waterfall(model_of: Callable[[str], Any]) -> None:
    got = explain(model_of("olmoe"), TEXT, 6, 2, 2, "source")
    figure = got.waterfall(n=5)
    assert isinstance(figure, go.Figure)
    assert "router of layer 2" in figure.layout.title.text
    trace = figure.data[0]
    drawn = str(trace.to_plotly_json())
    assert got.table(1)["sender"].item().split("<-")[0] in drawn
    assert isinstance(got.drill("M0").waterfall(), go.Figure)


# ---- what is given ----


def test_positions_and_texts(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    tokens = model.to_tokens(TEXT)
    strings = model.to_str_tokens(TEXT)
    by_text = explain(model, TEXT, -1, 2, 3)
    by_tokens = explain(model, tokens[0], len(strings) - 1, 2, 3)
    assert by_text.tokens == by_tokens.tokens == tuple(strings)
    assert by_text.token == strings[-1]
    np.testing.assert_array_equal(by_text.contributions, by_tokens.contributions)
    once = next(s for s in strings if strings.count(s) == 1 and s.strip() == s)
    assert explain(model, TEXT, once, 2, 3).pos == strings.index(once)
    spaced = next(
        s for s in strings if s.startswith(" ") and [t.strip() for t in strings].count(s.strip()) == 1
    )
    assert explain(model, TEXT, spaced.strip(), 2, 3).pos == strings.index(spaced)
    with_bos = explain(model, TEXT, -1, 2, 3, prepend_bos=True)
    assert with_bos.tokens == ("<s>", *strings)
    assert explain(model, tokens, np.int64(3), 2, np.int64(3)).pos == 3  # type: ignore[arg-type]

    twice = next(s for s in strings if strings.count(s) > 1)
    with pytest.raises(ValueError, match=r"occurs at positions \d+, \d+"):
        explain(model, TEXT, twice, 2, 3)
    with pytest.raises(ValueError, match="there is no token 'xylophone'; the tokens are"):
        explain(model, TEXT, "xylophone", 2, 3)
    for wrong in (len(strings), -len(strings) - 1, True, 1.5, None):
        with pytest.raises(ValueError, match="there is no position"):
            explain(model, TEXT, wrong, 2, 3)  # type: ignore[arg-type]


def test_without_a_tokenizer_tokens_are_ids(model_of: Callable[[str], Any]) -> None:
    model = model_of("mixtral")
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        got = explain(model, torch.tensor([[5, 9, 33]]), "33", 1, 0)
    finally:
        model.tokenizer = tokenizer
    assert got.tokens == ("5", "9", "33")
    assert got.pos == 2


def test_padding_does_not_matter(model_of: Callable[[str], Any]) -> None:
    model = model_of("deepseek_v2")
    tokens, mask = one_text()
    alone = explain(model, tokens[:, 1:], POS - 1, 2, 3, "expert")
    padded = at_text(model, 2, 3, "expert")
    assert alone.senders == padded.senders
    np.testing.assert_allclose(alone.contributions, padded.contributions, atol=1e-4)
    with pytest.raises(ValueError, match=r"position 0 is padding; real tokens are at 1, 2"):
        explain(model, tokens, 0, 2, 3, attention_mask=mask)


def test_clear_errors(model_of: Callable[[str], Any]) -> None:
    model = model_of("deepseek_v2")  # layer 0 is dense
    tokens, _ = one_text()
    with pytest.raises(ValueError, match=r"receiver 0 is no MoE layer.*1, 2"):
        explain(model, tokens, 1, 0, 3)
    with pytest.raises(ValueError, match=r"by='neurons' is no granularity"):
        explain(model, tokens, 1, 1, 3, "neurons")
    for wrong in (-1, 8, True, "M1E3", 2.0):
        with pytest.raises(ValueError, match=r"is no expert; .* has experts 0 to 7"):
            explain(model, tokens, 1, 1, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one text at a time, not 2"):
        explain(model, tokens.repeat(2, 1), 1, 1, 3)
    with pytest.raises(ValueError, match="prepend_bos goes with text"):
        explain(model, tokens, 1, 1, 3, prepend_bos=True)
    with (
        model.hooks([("hook_embed", lambda value, hook: value * float("nan"))]),
        pytest.raises(ValueError, match="layer 1 hold values that are not finite"),
    ):
        explain(model, tokens, 1, 1, 3)
    got = explain(model, tokens, 4, 2, 3)
    with pytest.raises(
        ValueError, match="'embed' has no parts; what can be divided here: A0, M0, A1, M1, A2"
    ):
        got.drill("embed")
    with pytest.raises(ValueError, match="there is no sender 'M2' here"):
        got.drill("M2")
    sources = got.drill("A1").drill("A1H0")
    with pytest.raises(ValueError, match="'A1H0<-1' has no parts; nothing here can be divided"):
        sources.drill("A1H0<-1")
    absent = next(f"M1E{e}" for e in range(8) if f"M1E{e}" not in got.drill("M1").senders)
    with pytest.raises(ValueError, match=r"an expert that the token did not choose.* is zero and not listed"):
        got.drill("M1").drill(absent)

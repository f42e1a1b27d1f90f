"""Replay against full forward passes: of transformers by the reference census, and of HookedMoE with plain hooks."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.interventions.branches import Change, heaviest_slots, single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.replay import Branches, Replayed, replay
from moe_lens.interventions.replay_plan import ReplayPlan, branch_bytes, fast_enough
from moe_lens.interventions.spec import Ablate
from moe_lens.model.block import Block
from tests.census_cases import (
    MORE_VARIANTS,
    SEED,
    VARIANTS,
    WITH_SHARED,
    batch,
    change_of,
    close,
    reference_of,
    replacements,
    rows_of_transformers,
)
from tests.checkpoints import change_config
from tests.families import prompts
from tests.reference_census import cumulative_rows, gap_norm, losses_of
from tests.reference_interventions import SHARED, ablated_run, reference_run

HOWS = ("zero", "renormalize", "reroute", "mean", "resample")
BUDGET = 2**30


def clean_runs(model: Any, padding: str) -> list[CleanRun]:
    tokens, mask = batch(padding)
    return [CleanRun.of(model, *document) for document in zip(tokens, mask, strict=True)]


def each_slot(model: Any, layers: Any = None, shared: bool = False) -> list[Branches]:
    """A branch for each slot of these layers, and one for the shared experts."""
    removed = single_slots(model.cfg.top_k)
    if not shared:
        return [Branches(layer, removed) for layer in layers or model.cfg.moe_layers]
    removed = torch.cat((removed, torch.zeros_like(removed[:1])))
    shared_removed = torch.arange(len(removed)) == len(removed) - 1
    return [Branches(layer, removed, shared_removed) for layer in layers or model.cfg.moe_layers]


def assert_equal(one: Replayed, other: Replayed, tolerance: float = 0.0) -> None:
    assert torch.equal(one.columns, other.columns)
    assert torch.equal(one.clean_loss, other.clean_loss)
    assert one.outcomes.keys() == other.outcomes.keys()
    for name in one.outcomes:
        for a, b in zip(one.outcomes[name], other.outcomes[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for name in ("gap_norm", "experts"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- against transformers -----------------------------------------------------------------------------------


def check_against_transformers(
    hf: Any, hooked: Any, variant: str, padding: str, how: str, layers: Any
) -> None:
    model = hooked(variant)
    shared = variant in WITH_SHARED and how in ("zero", "mean", "resample")
    layers = tuple(layers or model.cfg.moe_layers)
    expected = rows_of_transformers(hf, hooked, variant, padding, how, "token", layers, shared)
    n_rows = 0
    for document, clean in enumerate(clean_runs(model, padding)):
        branches = each_slot(model, layers, shared)
        result = replay(clean, branches, change=change_of(hooked, variant, how), outcomes=["kl"])
        places = result.columns.tolist()
        for row in expected:
            if row["document"] != document:
                continue
            i, n = layers.index(row["layer"]), places.index(row["position"])
            slot = row["rank"] - 1  # the shared experts, of rank 0, come last
            if row["expert"] != SHARED:
                assert int(result.experts[i][n, slot]) == row["expert"]
            where = f"{variant} {how} {row['layer']} {row['expert']} at {row['position']}"
            close(float(result.clean_loss[n]), row["loss"], where)
            close(float(result.delta_loss[i][n, slot]), row["delta_loss"], where)
            close(float(result.loss[i][n, slot]), row["loss"] + row["delta_loss"], where)
            close(float(result.outcomes["kl"][i][n, slot]), row["kl"], where)
            close(float(result.gap_norm[i][n, slot]), row["gap_norm"], where)
            n_rows += 1
    assert n_rows == len(expected) == 6 * len(layers) * (model.cfg.top_k + shared)


@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_zero_as_transformers(hf: Any, model_of: Any, hooked: Any, variant: str) -> None:
    """Every layer, slot and position, and the shared experts."""
    model_of(variant)
    check_against_transformers(hf, hooked, variant, "left", "zero", None)


@pytest.mark.parametrize("how", HOWS[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_as_transformers(hf: Any, model_of: Any, hooked: Any, variant: str, how: str) -> None:
    """The first layer, after which there are most others."""
    model = model_of(variant)
    check_against_transformers(hf, hooked, variant, "right", how, [model.cfg.moe_layers[0]])


@pytest.mark.parametrize(
    ("variant", "how"),
    [("qwen3_moe", "zero"), ("deepseek_v2_groups", "reroute"), ("olmoe_gqa_clip", "renormalize")],
)
def test_heaviest_together(hf: Any, model_of: Any, variant: str, how: str) -> None:
    model, (tokens, mask) = model_of(variant), batch("left")
    layer = model.cfg.moe_layers[1]
    expected = cumulative_rows(hf(variant), tokens, mask, layers=[layer], how=how)
    results = [
        replay(clean, [Branches(layer, heaviest_slots(model.cfg.top_k))], change=Change(how))  # type: ignore[arg-type]
        for clean in clean_runs(model, "left")
    ]
    for row in expected:
        result = results[row["document"]]
        at = result.columns.tolist().index(row["position"]), row["removed"] - 1
        close(float(result.delta_loss[0][at]), row["delta_loss"], str(row))
        close(float(result.gap_norm[0][at]), row["gap_norm"], str(row))
    assert len(expected) == 6 * (model.cfg.top_k - 1)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", ["deepseek_v2_groups", "qwen3_moe"])
def test_any_subsets_of_slots(hf: Any, model_of: Any, hooked: Any, variant: str, how: str) -> None:
    """Other sets at every position, several `Branches` of one layer, and layers in no order."""
    model, (tokens, mask) = model_of(variant), batch("left")
    layers = model.cfg.moe_layers
    k, generator = model.cfg.top_k, torch.Generator().manual_seed(5)
    given = replacements(hf, hooked, variant, "left", how)
    with torch.no_grad():
        clean_logits, clean_cache = reference_run(hf(variant), tokens, mask)
    clean_losses = losses_of(clean_logits, tokens, mask)
    for document, clean in enumerate(clean_runs(model, "left")):
        n = int(clean.has_next.sum())
        branches = []
        for layer, n_branches in ((layers[2], 1), (layers[0], 2), (layers[1], 1), (layers[0], 1)):
            removed = torch.rand(n, n_branches, k, generator=generator) < 0.6
            removed[..., int(torch.randint(k, (), generator=generator))] = False
            if how == "reroute" and variant == "deepseek_v2_groups":  # its groups leave one expert to spare
                removed &= removed.long().cumsum(dim=-1) == 1
            branches.append(Branches(layer, removed))
        result = replay(clean, branches, change=change_of(hooked, variant, how))
        checked = [(i, p, b) for i, of in enumerate(branches) for p in range(n) for b in range(of.n_branches)]
        for i, p, b in checked[:: 3 if document == 0 else 2]:
            of, column = branches[i], int(result.columns[p])
            experts = result.experts[i][p, of.removed[p, b]].tolist()
            if how == "resample":
                given = {"others": replacements(hf, hooked, variant, "left", how)["others"][of.layer]}
            removed = {(document, column, expert) for expert in experts}
            logits, cache = ablated_run(hf(variant), tokens, mask, of.layer, removed, how, **given)
            change = losses_of(logits, tokens, mask) - clean_losses
            where = f"{how} of {experts} at layer {of.layer}, position {column}"
            close(float(result.delta_loss[i][p, b]), float(change[document, column]), where)
            expected_gap = gap_norm(clean_cache, cache, of.layer, document, column)
            close(float(result.gap_norm[i][p, b]), expected_gap, where)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_shared_experts_with_routed_ones(hf: Any, model_of: Any, hooked: Any, how: str) -> None:
    """Together in one branch, which no row of a census is."""
    variant = "qwen2_moe_no_bias"
    model, (tokens, mask) = model_of(variant), batch("right")
    layer, clean = model.cfg.moe_layers[0], clean_runs(model, "right")[0]
    removed = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    branches = [Branches(layer, removed, torch.tensor([True, False, True]))]
    result = replay(clean, branches, change=change_of(hooked, variant, how))
    with torch.no_grad():
        clean_losses = losses_of(reference_run(hf(variant), tokens, mask)[0], tokens, mask)
    given = replacements(hf, hooked, variant, "right", how)
    if "others" in given:
        given["others"] = given["others"][layer]
    for p, column in enumerate(result.columns.tolist()):
        for b in range(3):
            experts = result.experts[0][p, removed[b]].tolist() + ([SHARED] if b != 1 else [])
            gone = {(0, column, expert) for expert in experts}
            logits, _ = ablated_run(hf(variant), tokens, mask, layer, gone, how, **given)
            change = losses_of(logits, tokens, mask) - clean_losses
            close(float(result.delta_loss[0][p, b]), float(change[0, column]), f"{experts} at {column}")


# --- against HookedMoE: padding, holes, outcomes ------------------------------------------------------------


def hooked_logits(model: Any, tokens: Tensor, mask: Tensor, layer: int, column: int, slot: int) -> Tensor:
    """Of one document in a full forward pass, one slot's contribution being zero at one token."""

    def zero(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[0, column, slot] = 0
        return value

    hooks = [(f"blocks.{layer}.mlp.hook_expert_contrib", zero)]
    with torch.no_grad():
        return model.run_with_hooks(tokens[None], attention_mask=mask[None], fwd_hooks=hooks)[0].float()


MASKS = {
    "none": [1, 1, 1, 1, 1, 1, 1, 1, 1],
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 0, 0, 0],
    "both": [0, 0, 1, 1, 1, 1, 1, 0, 0],
    "holes": [1, 0, 1, 1, 0, 0, 1, 1, 1],
    "holes and sides": [0, 1, 1, 0, 1, 0, 1, 1, 0],
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2", "qwen2_moe_sparse_step"])
def test_padding_anywhere(model_of: Any, variant: str, padding: str) -> None:
    model = model_of(variant)
    tokens, mask = prompts(length=9)[0][0], torch.tensor(MASKS[padding]).bool()
    clean = CleanRun.of(model, tokens, mask)
    real = mask.nonzero()[:, 0].tolist()
    with_next = [column for column in real if column + 1 in real]
    with torch.no_grad():
        losses = model(tokens[None], attention_mask=mask[None], return_type="loss", loss_per_token=True)[0]
    assert clean.columns.tolist() == real
    assert clean.columns[clean.has_next].tolist() == with_next
    assert clean.columns[~clean.loss.isnan()].tolist() == with_next
    torch.testing.assert_close(clean.loss[clean.has_next], losses[with_next], rtol=1e-6, atol=1e-6)

    result = replay(clean, each_slot(model))
    assert result.columns.tolist() == with_next
    torch.testing.assert_close(result.clean_loss, losses[with_next], rtol=1e-6, atol=1e-6)
    for i, layer in enumerate(model.cfg.moe_layers):
        for p, column in enumerate(with_next):
            for slot in (0, model.cfg.top_k - 1):
                logits = hooked_logits(model, tokens, mask, layer, column, slot)
                loss = -logits[column].log_softmax(-1)[tokens[column + 1]]
                close(float(result.loss[i][p, slot]), float(loss), f"M{layer} slot {slot} at {column}")


def test_what_stands_at_padding_is_nothing(model_of: Any) -> None:
    model, mask = model_of("qwen3_moe"), torch.tensor(MASKS["holes"]).bool()
    tokens = prompts(length=9)[0][0]
    others = torch.where(mask, tokens, 127 - tokens)
    one, other = (replay(CleanRun.of(model, t, mask), each_slot(model)) for t in (tokens, others))
    assert_equal(one, other)


def test_outcomes(model_of: Any) -> None:
    """Several at a time, of each branch."""
    model = model_of("deepseek_v2")
    tokens, mask = (part[0] for part in prompts("left", length=7))
    asked = [LogitDifference(5, 90), "kl", LogitDifference(90, 7, name="second")]
    result = replay(CleanRun.of(model, tokens, mask), each_slot(model), outcomes=asked)
    seen: list[float] = []
    assert list(result.outcomes) == ["loss", "logit_difference", "kl", "second"]
    assert result.null is not None
    with torch.no_grad():
        before = model(tokens[None], attention_mask=mask[None])[0]
    for i, layer in enumerate(model.cfg.moe_layers):
        for p, column in enumerate(result.columns.tolist()):
            for name, (correct, incorrect) in (("logit_difference", (5, 90)), ("second", (90, 7))):
                clean = float(before[column, correct] - before[column, incorrect])
                close(float(result.null[name][i][p]), clean, f"{name} of the null branch")
            assert abs(float(result.null["kl"][i][p])) < 1e-6
            for slot in range(model.cfg.top_k):
                after = hooked_logits(model, tokens, mask, layer, column, slot)[column]
                difference = float(after[5] - after[90])
                close(float(result.outcomes["logit_difference"][i][p, slot]), difference, "difference")
                close(float(result.outcomes["second"][i][p, slot]), float(after[90] - after[7]), "second")
                log_p, log_q = before[column].double().log_softmax(-1), after.double().log_softmax(-1)
                kl = float((log_p.exp() * (log_p - log_q)).sum())
                close(float(result.outcomes["kl"][i][p, slot]), kl, "kl")
                seen.append(kl)
    assert max(seen) > 1e-2


# --- what must not change a number --------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_branches_that_change_nothing(model_of: Any, hooked: Any, how: str) -> None:
    """Like the null branch of their layer, bit for bit, among others that change something; their gap is zero."""
    for variant in ("deepseek_v2_groups", "qwen3_moe"):
        model = model_of(variant)
        removed = torch.eye(model.cfg.top_k, dtype=torch.bool)[:2]
        removed = torch.cat((removed[:1], torch.zeros_like(removed[:1]), removed[1:]))
        clean = clean_runs(model, "left")[0]
        branches = [Branches(layer, removed) for layer in model.cfg.moe_layers]
        result = replay(clean, branches, change=change_of(hooked, variant, how))
        assert result.null is not None
        for i in range(len(branches)):
            assert torch.equal(result.loss[i][:, 1], result.null["loss"][i])
            assert (result.gap_norm[i][:, 1] == 0).all()
            assert (result.gap_norm[i][:, [0, 2]] > 0).all()
            assert (result.delta_loss[i][:, 1] == 0).all()
            assert (result.delta_loss[i][:, [0, 2]] != 0).all()


def test_null_branch(model_of: Any) -> None:
    """It is the clean run to rounding; changes are counted from it where it ran, and it moves no other branch."""
    for variant in VARIANTS:
        model = model_of(variant)
        clean = clean_runs(model, "right")[0]
        branches = each_slot(model)
        with_null = replay(clean, branches, outcomes=["kl"])
        without = replay(clean, branches, outcomes=["kl"], null_branch=False)
        assert without.null is None
        assert_equal(with_null, without, 1e-5)
        assert with_null.null is not None
        for i in range(len(branches)):
            null = with_null.null["loss"][i]
            torch.testing.assert_close(null, clean.loss[clean.has_next], rtol=0, atol=1e-5)
            assert torch.equal(with_null.delta_loss[i], with_null.loss[i] - null[:, None])
            assert torch.equal(without.delta_loss[i], without.loss[i] - clean.loss[clean.has_next][:, None])


def test_any_order_of_branches(model_of: Any) -> None:
    """Each comes back in its own place."""
    model = model_of("qwen3_moe")
    clean = clean_runs(model, "left")[0]
    generator = torch.Generator().manual_seed(1)
    given = [
        Branches(layer, torch.rand(n, 4, generator=generator) < 0.5)
        for layer, n in ((0, 1), (0, 3), (1, 2), (2, 4), (2, 1))
    ]
    expected = [replay(clean, [of], outcomes=["kl"]) for of in given]
    for order in ([4, 2, 0, 3, 1], [1, 0, 3, 4, 2], [3, 4, 2, 1, 0]):
        for budget in (BUDGET, 40 * branch_bytes(model, 5)):
            result = replay(clean, [given[i] for i in order], outcomes=["kl"], memory_budget=budget)
            for place, i in enumerate(order):
                for name in ("loss", "kl"):
                    got, want = result.outcomes[name][place], expected[i].outcomes[name][0]
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
                assert torch.equal(result.gap_norm[place], expected[i].gap_norm[0])
                assert torch.equal(result.experts[place], expected[i].experts[0])


@pytest.mark.parametrize("how", ["zero", "reroute", "resample"])
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups", "qwen2_moe_no_bias"])
def test_any_memory_budget(
    model_of: Any, hooked: Any, monkeypatch: pytest.MonkeyPatch, variant: str, how: str
) -> None:
    """Down to a row and a `Branches` at a time, with masks of their own at every position."""
    module = importlib.import_module(
        "moe_lens.interventions.replay"
    )  # the package has the function by that name
    widths: list[int] = []
    run = module._Suffix.run

    def counted(self: Any, branches: Any, *rest: Any) -> Any:
        n_nulls = len({of.layer for of, _ in branches})
        widths.append(len(self.rows) * (n_nulls + sum(removed.shape[1] for _, removed in branches)))
        return run(self, branches, *rest)

    monkeypatch.setattr(module._Suffix, "run", counted)
    model = model_of(variant)
    clean = CleanRun.of(model, prompts(length=12)[0][0])
    k, generator = model.cfg.top_k, torch.Generator().manual_seed(2)
    removed = torch.rand(3, 11, 3, k, generator=generator) < 0.4
    if variant == "deepseek_v2_groups":  # rerouted, its groups leave one expert to spare
        removed &= removed.long().cumsum(dim=-1) == 1
    branches = [Branches(layer, removed[i]) for i, layer in enumerate((0, 2, 2))]
    arguments: dict[str, Any] = dict(change=change_of(hooked, variant, how), outcomes=["kl"])
    expected = replay(clean, branches, **arguments)
    assert widths == [11 * 11]
    for most in (0, 5, 8, 30, 50, 90):
        widths.clear()
        budget = max(1, most * branch_bytes(model, 12))
        result = replay(clean, branches, memory_budget=budget, **arguments)
        assert_equal(result, expected, 1e-5)
        assert max(widths) <= max(4, most)
        assert len(widths) == (33 if most < 8 else len(widths))
        assert sum(widths) >= 11 * 9


@pytest.mark.parametrize("n_rows", [1, 7, 100])
@pytest.mark.parametrize("affordable", [0, 1, 9, 64, 1000, 10**6])
def test_plan(model_of: Any, affordable: int, n_rows: int) -> None:
    """Every branch once, layers rising, within the budget where one row of one `Branches` is."""
    model = model_of("olmoe")
    rng = np.random.default_rng(0)
    for null in (False, True):
        branches = [
            Branches(int(layer), torch.zeros(int(n), 4, dtype=torch.bool))
            for layer, n in zip(rng.integers(0, 3, 20), rng.integers(1, 8, 20), strict=True)
        ]
        budget = affordable * branch_bytes(model, 50)
        affordable = min(affordable, fast_enough(model, 50))
        sizes = [(of.layer, of.n_branches) for of in branches]
        plan = ReplayPlan.make(model, sizes, n_rows, 50, max(1, budget), null)
        assert sorted(i for group in plan.groups for i in group) == list(range(20))
        layers = [branches[i].layer for group in plan.groups for i in group]
        assert layers == sorted(layers)
        assert 1 <= plan.rows_at_once <= n_rows
        for group in plan.groups:
            width = sum(branches[i].n_branches for i in group)
            width += null * len({branches[i].layer for i in group})
            assert width * plan.rows_at_once <= affordable or plan.rows_at_once == 1
            assert len(group) == 1 or width * n_rows <= affordable
    assert affordable < 9000 or len(plan.groups) == 1


def test_some_rows(model_of: Any) -> None:
    for variant in ("mixtral", "deepseek_v2_groups"):
        model = model_of(variant)
        clean = CleanRun.of(model, *(part[0] for part in prompts("left", length=10)))
        whole = replay(clean, each_slot(model), outcomes=["kl"])
        for chosen in ([0], [8 - 1], [0, 3, 4], [2, 7]):
            part = replay(clean, each_slot(model), rows=torch.tensor(chosen), outcomes=["kl"])
            assert part.columns.tolist() == [1 + row for row in chosen]
            for i in range(len(model.cfg.moe_layers)):
                for name in ("loss", "kl"):
                    want = whole.outcomes[name][i][chosen]
                    torch.testing.assert_close(part.outcomes[name][i], want, rtol=0, atol=1e-5)
                torch.testing.assert_close(part.gap_norm[i], whole.gap_norm[i][chosen], rtol=0, atol=0)
                assert torch.equal(part.experts[i], whole.experts[i][chosen])


def test_resample_is_by_seed(model_of: Any, hooked: Any) -> None:
    model, reference = model_of("olmoe"), reference_of(hooked, "olmoe")
    clean = CleanRun.of(model, prompts(length=8)[0][0])
    losses = [
        replay(clean, each_slot(model), change=Change("resample", reference, seed)).loss[0]
        for seed in (SEED, SEED, SEED + 1)
    ]
    assert torch.equal(losses[0], losses[1])
    assert ((losses[0] - losses[2]).abs() > 1e-4).float().mean() > 0.3


@pytest.mark.parametrize("grad", [True, False])
def test_grad_mode(model_of: Any, grad: bool) -> None:
    model = model_of("qwen2_moe_no_bias")
    expected = replay(CleanRun.of(model, prompts()[0][0]), each_slot(model))
    with torch.set_grad_enabled(grad):
        clean = CleanRun.of(model, prompts()[0][0])
        result = replay(clean, each_slot(model))
        values = clean.moe(0)
        assert torch.is_grad_enabled() == grad
    assert_equal(result, expected)
    for tensor in (clean.final, clean.loss, *clean.keys, values.contrib, *result.loss, *result.gap_norm):
        assert not tensor.requires_grad
    with torch.inference_mode():
        assert_equal(replay(CleanRun.of(model, prompts()[0][0]), each_slot(model)), expected)


# --- the clean run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_clean_run_is_the_models(model_of: Any, variant: str) -> None:
    """Streams, keys, values and what the experts did, as a cache has them; the losses bit for bit."""
    model = model_of(variant)
    tokens = prompts(length=8)[0][:1]
    with torch.no_grad():
        cheap = lambda name: not name.endswith(("scores", "pattern"))  # noqa: E731  attention in another way
        logits, cache = model.run_with_cache(tokens, names_filter=cheap)
        losses = model(tokens, return_type="loss", loss_per_token=True)[0]
    clean = CleanRun.of(model, tokens[0])
    assert torch.equal(clean.loss[:-1], losses)
    assert clean.loss[-1].isnan()
    assert torch.equal(clean.next_tokens[:-1], tokens[0, 1:])
    assert torch.equal(clean.final, cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0])
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        assert torch.equal(clean.resid_mid[layer], cache[at + "hook_resid_mid"][0])
        assert torch.equal(clean.keys[layer], cache[at + "attn.hook_rot_k"][0])
        assert torch.equal(clean.values[layer], cache[at + "attn.hook_v"][0])
    for layer in model.cfg.moe_layers:
        values, at = clean.moe(layer), f"blocks.{layer}.mlp.hook_"
        named = {
            "expert_weights": values.probabilities,
            "expert_indices": values.indices,
            "routing_weights": values.weights,
            "expert_out": values.expert_out,
            "expert_contrib": values.contrib,
        }
        if model.cfg.shared is not None:
            assert values.shared_out is not None
            named["shared_out"] = values.shared_out
            gate = cache[at + "shared_gate"][0, :, 0] if model.cfg.shared.gated else torch.ones(8)
            assert torch.equal(values.shared_gate, gate)
        for name, value in named.items():
            assert torch.equal(value, cache[at + name][0]), name
        assert values.layer == layer
    assert torch.equal(logits[0].argmax(-1), model.unembed(model.ln_final(clean.final[None]))[0].argmax(-1))


def test_on_layer_is_handed_each_layer_once(model_of: Any) -> None:
    model, seen = model_of("qwen3_moe"), []
    clean = CleanRun.of(model, prompts()[0][0])
    replay(clean, each_slot(model)[::-1], on_layer=lambda values: seen.append(values.layer))
    assert seen == [0, 1, 2]


# --- refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, the test fails as soon as a layer is run."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a layer was run")

    def switch_on() -> None:
        monkeypatch.setattr(Block, "forward", refuse)
        monkeypatch.setattr(CleanRun, "moe", refuse)

    return switch_on


def test_what_makes_no_sense(model_of: Any, nothing_runs: Any) -> None:
    model = model_of("qwen2_moe_no_bias")  # its layer 1 is dense
    tokens, mask = prompts(length=6)[0][0], torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    clean, alone = CleanRun.of(model, tokens, mask), CleanRun.of(model, tokens[:1])
    single, k = single_slots(3), 3
    nothing_runs()

    def refused(message: str, *branches: Branches, of: CleanRun = clean, **how: Any) -> None:
        with pytest.raises(ValueError, match=message):
            replay(of, branches, **how)

    refused("no branches")
    refused("no token of this document has a next one", Branches(0, single), of=alone)
    refused("no token of this document has a next", Branches(0, single), rows=torch.tensor([]).long())
    refused("places among the document's 5 tokens", Branches(0, single), rows=torch.tensor([0, 5]))
    refused("places among the document's 5 tokens", Branches(0, single), rows=torch.tensor([-1, 0]))
    refused("places among the document's 5 tokens", Branches(0, single), rows=torch.tensor([[0, 1]]))
    refused("rows must ascend, each once", Branches(0, single), rows=torch.tensor([1, 0]))
    refused("rows must ascend, each once", Branches(0, single), rows=torch.tensor([1, 1]))
    refused("position 2 has no next token", Branches(0, single), rows=torch.tensor([1, 2, 3]))
    refused("position 5 has no next token", Branches(0, single), rows=torch.tensor([4]))
    refused(r"layer 1 has no experts; those that have: \[0, 2\]", Branches(0, single), Branches(1, single))
    refused("layer 3 has no experts", Branches(3, single))
    refused(
        r"removed must be \[branch, 3\] or \[pos, branch, 3\], not \(4, 4\)", Branches(0, single_slots(4))
    )
    refused(r"removed must be .*, not \(3,\)", Branches(0, single[0]))
    refused(r"removed must be .*, not \(0, 3\)", Branches(0, single[:0]))
    refused("removed must be booleans, not torch.int64", Branches(0, single.long()))
    refused("removed is of 5 positions, and 3 are replayed", Branches(0, single.expand(5, 3, 3)))
    whole = torch.ones(1, k, dtype=torch.bool)
    refused("renormalize needs a slot that stays", Branches(0, whole), change=Change("renormalize"))
    refused(
        "how='renormalize' is about the routed experts' weights",
        Branches(0, single, torch.ones(3, dtype=torch.bool)),
        change=Change("renormalize"),
    )
    refused(
        r"shared_removed must be \[3\], one for each branch, not \(2,\)",
        Branches(0, single, torch.ones(2, dtype=torch.bool)),
    )


def test_shared_experts_that_there_are_not(model_of: Any, nothing_runs: Any) -> None:
    model = model_of("olmoe")
    clean = CleanRun.of(model, prompts()[0][0])
    nothing_runs()
    with pytest.raises(ValueError, match="has no shared experts"):
        replay(clean, [Branches(0, single_slots(4), torch.ones(4, dtype=torch.bool))])


def test_too_few_experts_to_reroute(checkpoint: Any, nothing_runs: Any) -> None:
    """Six of eight, of which three are removed: five are left."""
    directory = checkpoint("olmoe")
    copied = shutil.copytree(directory, directory.with_name("olmoe of six"), dirs_exist_ok=True)
    change_config(copied, num_experts_per_tok=6)
    model = HookedMoE.from_pretrained(copied, dtype=torch.float32, device="cpu", verbose=False)
    clean = CleanRun.of(model, prompts(length=4)[0][0])
    fine = replay(clean, [Branches(1, heaviest_slots(6)[:2])], change=Change("reroute"))
    assert (fine.gap_norm[0] > 0).all()
    nothing_runs()
    with pytest.raises(ValueError, match="reroute: 5 experts remain to be chosen from, and 6 are wanted"):
        replay(clean, [Branches(1, heaviest_slots(6)[:3])], change=Change("reroute"))


def test_groups_that_run_out(model_of: Any) -> None:
    """Two groups of two, of which three are chosen: without two of one group and one of the other."""
    model = model_of("deepseek_v2_groups")
    clean, pairs = CleanRun.of(model, prompts(length=12)[0][0]), ~single_slots(3)
    message = r"reroute at layer 0, position 6: without M0E\d, M0E\d 2 experts remain .*, and 3 are wanted"
    with pytest.raises(ValueError, match=message):
        replay(clean, [Branches(0, pairs)], rows=torch.tensor([6]), change=Change("reroute"))


def test_changes_that_make_no_sense(model_of: Any, hooked: Any, nothing_runs: Any) -> None:
    with pytest.raises(ValueError, match="how='drop' must be one of 'zero', 'renormalize', 'reroute'"):
        Change("drop")  # type: ignore[arg-type]
    for how in ("mean", "resample"):
        with pytest.raises(ValueError, match=f"how='{how}' needs reference="):
            Change(how)
    with pytest.raises(ValueError, match="how='zero' reads no reference"):
        Change("zero", reference_of(hooked, "olmoe"))
    model = model_of("qwen3_moe")
    clean = CleanRun.of(model, prompts()[0][0])
    reference = reference_of(hooked, "olmoe")
    own = replace(reference_of(hooked, "qwen3_moe"), layers=(0, 2))
    nothing_runs()
    with pytest.raises(ValueError, match="the reference is of other weights"):
        replay(clean, each_slot(model), change=Change("mean", reference))
    with pytest.raises(ValueError, match=r"the reference lacks layers \[1\]; it is of \[0, 2\]"):
        replay(clean, each_slot(model), change=Change("mean", own))


def test_models_with_hooks(model_of: Any, nothing_runs: Any) -> None:
    model = model_of("olmoe")
    tokens = prompts()[0][0]
    clean = CleanRun.of(model, tokens)
    nothing_runs()
    for start in (lambda: CleanRun.of(model, tokens), lambda: replay(clean, each_slot(model))):
        message = r"without hooks, .*at blocks\.1\.mlp\.hook_expert_out"
        with (
            model.hooks([("blocks.1.mlp.hook_expert_out", lambda value, hook: None)]),
            pytest.raises(ValueError, match=message),
        ):
            start()
        handle = model.hook_dict["blocks.0.hook_resid_mid"].register_forward_pre_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_mid"):
            start()
        handle.remove()
        with pytest.raises(ValueError, match="an open intervene"), model.intervene(Ablate("M1E2")):
            start()
        # Torch's own hooks on a layer: a branch begins at its slots, and would go past them.
        for add in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(model.blocks[1].mlp, add)(lambda *_: None)
            with pytest.raises(ValueError, match=r"without hooks, .*at blocks\.1\.mlp"):
                start()
            handle.remove()
        handle = model.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="at HookedMoE"):
            start()
        handle.remove()


def test_branches_on_a_device() -> None:
    some = Branches(1, single_slots(4), torch.tensor([False, False, True, False]))
    moved = some.to(torch.device("meta"))
    assert moved.layer == 1
    assert moved.shared_removed is not None
    assert {moved.removed.device.type, moved.shared_removed.device.type} == {"meta"}


def test_names_instead_of_tensors(model_of: Any) -> None:
    clean = CleanRun.of(model_of("qwen2_moe"), prompts()[0][0])
    assert (
        repr(clean.moe(1))
        == f"<MoEValues of layer 1: {len(clean.tokens)} tokens, 3 experts each and the shared ones>"
    )
    assert repr(Branches(1, single_slots(3))) == "<Branches: 3 of layer 1>"
    shared = Branches(2, single_slots(3).repeat(5, 1, 1), torch.tensor([False, True, False]))
    assert repr(shared) == "<Branches: 3 of layer 2 at each of 5 positions, 1 of the shared experts>"


# --- NaN and infinity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_of_nan_in_the_clean_run(hooked: Any, value: float) -> None:
    """Where it is chosen first, the clean run says so: place and expert."""
    model = copy.deepcopy(hooked("qwen3_moe"))
    tokens, mask = (part[0] for part in prompts("left", length=8))
    values = CleanRun.of(model, tokens, mask).moe(1)
    expert = int(values.indices[2, 1])
    first = int((values.indices == expert).any(dim=1).nonzero()[0])
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_down[expert] = value
    with pytest.raises(
        FloatingPointError,
        match=rf"the clean loss .* is nan \(from M1E{expert} of layer 1, position {1 + first}\)",
    ):
        CleanRun.of(model, tokens, mask)


def test_a_null_branch_of_nan(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = CleanRun.of(model_of("olmoe"), prompts(length=6)[0][0])
    module = importlib.import_module("moe_lens.interventions.suffix")
    read_outcomes = module.read_outcomes

    def broken(*args: Any) -> dict[str, Tensor]:
        read = read_outcomes(*args)
        read["loss"][2, 0] = torch.nan  # the null branch comes first
        return read

    monkeypatch.setattr(module, "read_outcomes", broken)
    with pytest.raises(FloatingPointError, match="loss is nan at position 2 in the null branch of layer 1"):
        replay(clean, [Branches(1, single_slots(4))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_of_nan_that_comes_by_rerouting(hooked: Any, value: float) -> None:
    """Nowhere chosen in the clean run: the change that brings it is named, with its place."""
    model = copy.deepcopy(hooked("mixtral"))
    for seed in range(10):
        tokens, mask = (part[0] for part in prompts("left", length=4, seed=seed))
        values = CleanRun.of(model, tokens, mask).moe(1)
        third = values.probabilities.argsort(dim=-1, descending=True)[:, 2]
        expert = int(third[1])
        if not (values.indices == expert).any() and third[0] != expert:
            break
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_down[expert] = value
    clean = CleanRun.of(model, tokens, mask)
    assert clean.loss[clean.has_next].isfinite().all()
    gone = int(values.indices[1, 0])
    message = rf"loss is (nan|inf) at position 2 after the change of M1E{gone} at layer 1"
    with pytest.raises(FloatingPointError, match=message):
        replay(clean, each_slot(model, [1]), change=Change("reroute"))
    replay(clean, each_slot(model, [1]))  # without it, nothing is broken


# --- half precision -----------------------------------------------------------------------------------------


def hooked_changes(model: Any, tokens: Tensor, layer: int, experts: Tensor) -> Tensor:
    """`[pos, k]`: by hooked full forward passes, a row of a batch for each of a document's (position, expert)."""
    n, k = experts.shape
    rows = torch.arange(n * k)
    columns, ablated = rows // k, experts.flatten()
    at = f"blocks.{layer}.mlp.hook_"
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Any) -> None:
        seen[:] = [value]

    def zero(value: Tensor, hook: Any) -> Tensor:
        gone = torch.zeros(value.shape[:3], dtype=torch.bool)
        gone[rows, columns] = seen[0][rows, columns] == ablated[:, None]
        return value.masked_fill(gone[..., None], 0)

    arguments: dict[str, Any] = dict(return_type="loss", loss_per_token=True)
    with torch.no_grad():
        before = model(tokens[None], **arguments)[0]
        losses = model.run_with_hooks(
            tokens.repeat(n * k, 1),
            fwd_hooks=[(at + "expert_indices", look), (at + "expert_contrib", zero)],
            **arguments,
        )
    return (losses[rows, columns] - before[columns]).view(n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_criterion_of_half_precision(hooked: Any, dtype: torch.dtype) -> None:
    """The median error against float32 is at most 1.5 times that of hooked full forward passes in the same dtype."""
    errors: dict[str, list[Tensor]] = {"replay": [], "hooked": [], "effect": []}
    for variant in VARIANTS:
        exact = hooked(variant)
        model = copy.deepcopy(exact).to(dtype)
        for tokens in prompts(batch=2, length=14, seed=4)[0]:
            run, exact_run = CleanRun.of(model, tokens), CleanRun.of(exact, tokens)
            half, full = replay(run, each_slot(model)), replay(exact_run, each_slot(model))
            for i, layer in enumerate(model.cfg.moe_layers):
                same = half.experts[i][..., :, None] == full.experts[i][..., None, :]
                chosen, slot = same.any(dim=-1), same.long().argmax(dim=-1)
                truth = full.delta_loss[i].gather(1, slot)
                by_hooks = hooked_changes(model, tokens, layer, half.experts[i])
                errors["replay"].append((half.delta_loss[i] - truth)[chosen].abs())
                errors["hooked"].append((by_hooks - truth)[chosen].abs())
                errors["effect"].append(truth[chosen].abs())
    median = {name: float(torch.cat(parts).median()) for name, parts in errors.items()}
    assert len(torch.cat(errors["replay"])) > 1000
    assert 0 < median["replay"] <= 1.5 * median["hooked"]
    assert median["replay"] < 0.5 * median["effect"]
    assert all(torch.cat(parts).isfinite().all() for parts in errors.values())

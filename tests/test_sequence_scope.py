"""An expert changed at every position, later losses, and predictors: against transformers, document by document."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.interventions.branches import Change, heaviest_slots, single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.first_order import direct, first_order, loss_gradients
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.sequence import everywhere, later_losses
from moe_lens.interventions.spec import Ablate
from tests.census_cases import VARIANTS, WITH_SHARED, batch, change_of, close, rows_of_transformers
from tests.families import prompts
from tests.reference_census import Row, cumulative_rows, direct_rows, first_order_rows
from tests.reference_interventions import SHARED

HOWS = ("zero", "renormalize", "reroute", "mean", "resample")
OF_SHARED = ("zero", "mean", "resample")


def runs(model: Any, padding: str) -> list[CleanRun]:
    tokens, mask = batch(padding)
    return [CleanRun.of(model, *document) for document in zip(tokens, mask, strict=True)]


def rows_with_next(clean: CleanRun) -> Tensor:
    return clean.has_next.nonzero()[:, 0]


def of(rows: list[Row], layer: int, document: int) -> list[Row]:
    found = [row for row in rows if (row["layer"], row["document"]) == (layer, document)]
    assert found
    return found


# --- every position -----------------------------------------------------------------------------------------


def check_everywhere(hf: Any, hooked: Any, variant: str, padding: str, how: str, layers: Any) -> None:
    model = hooked(variant)
    shared = variant in WITH_SHARED and how in OF_SHARED
    layers = tuple(layers)
    expected = rows_of_transformers(hf, hooked, variant, padding, how, "sequence", layers, shared)
    for document, clean in enumerate(runs(model, padding)):
        for layer in layers:
            values, rows = clean.moe(layer), rows_with_next(clean)
            experts = values.indices.unique().flip(0)  # in no order of theirs
            if shared:
                experts = torch.cat((experts[:1], torch.tensor([SHARED]), experts[1:]))
            read, gap = everywhere(
                clean, values, experts, rows, change_of(hooked, variant, how), outcomes=["kl"]
            )
            assert list(read) == ["loss", "kl"]
            places = clean.columns[rows].tolist()
            for row in of(expected, layer, document):
                at = places.index(row["position"]), experts.tolist().index(row["expert"])
                where = f"{variant} {how} M{layer}E{row['expert']} at {row['position']}"
                close(float(read["loss"][at]) - row["loss"], row["delta_loss"], where)
                close(float(read["kl"][at]), row["kl"], where)
                close(float(gap[at]), row["gap_norm"], where)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everywhere_as_transformers(hf: Any, model_of: Any, hooked: Any, variant: str, padding: str) -> None:
    layers = model_of(variant).cfg.moe_layers
    check_everywhere(hf, hooked, variant, padding, "zero", [layers[0 if padding == "left" else -2]])


@pytest.mark.parametrize("how", HOWS[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_everywhere(hf: Any, model_of: Any, hooked: Any, variant: str, how: str) -> None:
    check_everywhere(hf, hooked, variant, "left", how, [model_of(variant).cfg.moe_layers[0]])


def test_it_is_another_experiment(hf: Any, model_of: Any, hooked: Any) -> None:
    """Than the change at one token, but at a document's first."""
    model_of("qwen3_moe")
    token, sequence = (
        rows_of_transformers(hf, hooked, "qwen3_moe", "left", "zero", scope, layers)
        for scope, layers in (("token", None), ("sequence", (0,)))
    )
    same = [
        math.isclose(one["delta_loss"], other["delta_loss"], abs_tol=1e-5)
        for one, other in zip([row for row in token if row["layer"] == 0], sequence, strict=True)
    ]
    assert 0.2 < sum(same) / len(same) < 0.7


@pytest.mark.parametrize("how", ["zero", "reroute", "mean"])
def test_everywhere_in_any_budget(model_of: Any, hooked: Any, how: str) -> None:
    """And an expert that is nowhere active is the clean run, and holds nothing up."""
    for variant in ("olmoe", "deepseek_v2_groups"):
        model = model_of(variant)
        clean = CleanRun.of(model, prompts(length=10)[0][0])
        values, rows = clean.moe(1), rows_with_next(clean)
        experts = torch.cat((values.indices.unique(), torch.tensor([model.cfg.n_experts])))
        change = change_of(hooked, variant, how)
        asked = ["kl", LogitDifference(4, 9)]
        expected, expected_gap = everywhere(clean, values, experts, rows, change, asked)
        for budget in (1, 500_000, 2_000_000):
            read, gap = everywhere(clean, values, experts, rows, change, asked, memory_budget=budget)
            torch.testing.assert_close(gap, expected_gap, rtol=0, atol=1e-5)
            for name, value in read.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(expected["loss"][:, -1], clean.loss[:-1], rtol=0, atol=1e-5)
        assert (expected_gap[:, -1] == 0).all()
        active = (values.indices[rows][..., None] == experts).any(dim=1)
        assert torch.equal(expected_gap > 0, active)
        part, part_gap = everywhere(clean, values, experts, rows[[2, 7]], change)
        torch.testing.assert_close(part_gap, expected_gap[[2, 7]], rtol=0, atol=1e-5)
        torch.testing.assert_close(part["loss"], expected["loss"][[2, 7]], rtol=0, atol=1e-5)


def test_everywhere_over_holes(model_of: Any) -> None:
    """Rotary positions are the columns; against full passes with the same mask."""
    for variant in ("olmoe", "deepseek_v2"):
        model = model_of(variant)
        tokens, mask = prompts(length=9)[0][:1], torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1]]).bool()
        layer = model.cfg.moe_layers[0]
        clean = CleanRun.of(model, tokens[0], mask[0])
        values, rows = clean.moe(layer), rows_with_next(clean)
        assert clean.columns[rows].tolist() == [1, 6, 7]
        experts = values.indices.unique()
        read, _ = everywhere(clean, values, experts, rows, Change())
        for n, expert in enumerate(experts.tolist()):
            with model.intervene(Ablate(expert, layers=layer)), torch.no_grad():
                losses = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)[0]
            torch.testing.assert_close(read["loss"][:, n], losses[clean.columns[rows]], rtol=0, atol=2e-5)


def test_nan_everywhere(hooked: Any) -> None:
    """An expert that comes by rerouting."""
    model = copy.deepcopy(hooked("mixtral"))
    for seed in range(20):
        tokens = prompts(length=4, seed=seed)[0][0]
        values = CleanRun.of(model, tokens).moe(1)
        third = values.probabilities.argsort(dim=-1, descending=True)[:, 2]
        expert = int(third[1])
        if not (values.indices == expert).any() and third[0] != expert:
            break
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_down[expert] = torch.nan
    clean = CleanRun.of(model, tokens)
    gone = values.indices[1, :1]
    message = rf"loss is nan at position [01] after the change of M1E{int(gone)} at every position"
    with pytest.raises(FloatingPointError, match=message):
        everywhere(clean, clean.moe(1), gone, rows_with_next(clean), Change("reroute"))


# --- later losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_later_losses_as_transformers(hf: Any, model_of: Any, hooked: Any, variant: str, how: str) -> None:
    """Of the rows that the tests of replay have made too."""
    model = model_of(variant)
    padding, layer = ("left", None) if how == "zero" else ("right", model.cfg.moe_layers[0])
    layers = model.cfg.moe_layers if layer is None else (layer,)
    shared = variant in WITH_SHARED and how in OF_SHARED
    expected = rows_of_transformers(hf, hooked, variant, padding, how, "token", layers, shared)
    removed = single_slots(model.cfg.top_k)
    shared_removed = None
    if shared:
        removed = torch.cat((removed, torch.zeros_like(removed[:1])))
        shared_removed = torch.arange(len(removed)) == len(removed) - 1
    n_nan = 0
    for document, clean in enumerate(runs(model, padding)):
        places = clean.columns.tolist()
        for layer in layers:
            values = clean.moe(layer)
            of_rows = {
                row: later_losses(
                    clean, values, row, removed, change_of(hooked, variant, how), shared_removed
                )
                for row in rows_with_next(clean).tolist()
            }
            for row in of(expected, layer, document):
                got = float(of_rows[places.index(row["position"])][row["rank"] - 1])
                if math.isnan(row["later_loss"]):
                    assert math.isnan(got)
                    n_nan += 1
                else:
                    close(got, row["later_loss"], str(row))
    assert n_nan == 2 * len(layers) * len(removed)


def test_later_losses_of_several_slots_in_any_budget(hf: Any, model_of: Any) -> None:
    model, (tokens, mask) = model_of("qwen3_moe"), batch("left")
    expected = cumulative_rows(hf("qwen3_moe"), tokens, mask, layers=[1])
    clean = runs(model, "left")[0]
    values, removed = clean.moe(1), heaviest_slots(4)
    for budget in (1, 200_000, 2**30):
        for row in range(3):
            got = later_losses(clean, values, row, removed, Change(), memory_budget=budget)
            want = [r["later_loss"] for r in expected if r["document"] == 0 and r["position"] == 1 + row]
            torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=2e-5)


def test_later_losses_count_the_keys_and_values_that_they_keep(
    model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the end of a long document there is little to run, and all of the past to hold for every branch."""
    model = model_of("olmoe")
    clean = CleanRun.of(model, prompts(length=60)[0][0])
    values, removed = clean.moe(0), heaviest_slots(4)[[0] * 40]
    width, runs = [], model.run_blocks
    monkeypatch.setattr(model, "run_blocks", lambda x, *rest: width.append(len(x)) or runs(x, *rest))
    kept = sum(of[layer].nbytes for of in (clean.keys, clean.values) for layer in (1, 2))
    budget = 20 * kept
    later_losses(clean, values, 58 - 1, removed, Change(), memory_budget=budget)
    assert sum(width) == 40
    assert max(width) * kept <= budget


def test_later_losses_over_holes(model_of: Any) -> None:
    """Of the positions that have a next one; against full passes with the same mask."""
    for variant in ("deepseek_v2", "olmoe"):
        model = model_of(variant)
        tokens, mask = prompts(length=9)[0][:1], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1]]).bool()
        layer = model.cfg.moe_layers[0]
        clean = CleanRun.of(model, tokens[0], mask[0])
        arguments: dict[str, Any] = dict(attention_mask=mask, return_type="loss", loss_per_token=True)
        for row, column in ((0, 1), (1, 2), (2, 4), (3, 5)):

            def zero(value: Tensor, hook: Any, column: int = column) -> Tensor:
                value = value.clone()
                value[0, column, 1] = 0
                return value

            hooks = [(f"blocks.{layer}.mlp.hook_expert_contrib", zero)]
            with torch.no_grad():
                before = model(tokens, **arguments)[0]
                after = model.run_with_hooks(tokens, fwd_hooks=hooks, **arguments)[0]
            want = (after - before)[column + 1 :]
            got = later_losses(clean, clean.moe(layer), row, torch.eye(model.cfg.top_k).bool()[1:2], Change())
            if column == 5:
                assert want.isnan().all()
                assert got.isnan().all()
            else:
                close(float(got), float(want.nanmean()), f"after {column}")
                assert abs(float(got)) > 1e-4


# --- predictors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictors_as_transformers(hf: Any, model_of: Any, variant: str) -> None:
    model, (tokens, mask) = model_of(variant), batch("left")
    shared = variant in WITH_SHARED
    slopes = first_order_rows(hf(variant), tokens, mask, shared=shared)
    directs = direct_rows(hf(variant), tokens, mask, shared=shared)
    for document, clean in enumerate(runs(model, "left")):
        rows = rows_with_next(clean)
        gradients = loss_gradients(clean, rows)
        assert gradients.shape == (model.cfg.n_layers, len(rows), 64)
        places = clean.columns[rows].tolist()
        for layer in model.cfg.moe_layers:
            values = clean.moe(layer)
            for name, expected, (of_slots, of_shared) in (
                ("first_order", slopes, first_order(gradients, values, rows)),
                ("direct", directs, direct(clean, values, rows)),
            ):
                assert (of_shared is None) == (model.cfg.shared is None)
                for row in of(expected, layer, document):
                    n = places.index(row["position"])
                    got = of_shared[n] if row["expert"] == SHARED else of_slots[n, row["rank"] - 1]
                    close(float(got), row[name], f"{name} of {row}")


def test_gradients_are_of_each_loss_alone(model_of: Any) -> None:
    """In any budget, and of some tokens as of all; the model's parameters gather none."""
    for variant in ("olmoe_gqa_clip", "deepseek_v2"):
        model = model_of(variant)
        clean = CleanRun.of(model, *(part[0] for part in prompts("left", length=9)))
        rows = rows_with_next(clean)
        whole = loss_gradients(clean, rows)
        for budget in (1, 10**5, 10**6):
            assert_close = torch.testing.assert_close
            assert_close(loss_gradients(clean, rows, memory_budget=budget), whole, rtol=1e-4, atol=1e-5)
        for some in ([0], [3, 6], [len(rows) - 1]):
            torch.testing.assert_close(
                loss_gradients(clean, rows[some]), whole[:, some], rtol=1e-4, atol=1e-5
            )
        with torch.no_grad():
            assert torch.equal(loss_gradients(clean, rows), whole)
            assert not torch.is_grad_enabled()
        assert not whole.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())

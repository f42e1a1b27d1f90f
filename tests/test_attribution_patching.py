"""Attribution patching: against slow references, against finite differences, and against what it approximates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.interventions.attribution_patching import attribution_patch
from moe_lens.interventions.attribution_result import AttributionPatching
from tests.families import FAMILIES, VOCABULARY, prompts
from tests.reference import Cache, reference_cache, reference_logits
from tests.reference_patching import (
    partly_patched_logits,
    patch_of,
    patched_logits,
    reference_attributions,
)

LENGTH = 6


@dataclass
class Pair:
    """Two batches, padded alike, in both implementations."""

    model: HookedMoE
    hf: Any
    clean: Tensor
    corrupted: Tensor
    mask: Tensor
    clean_values: Cache

    def metric(self, logits: Tensor) -> Tensor:
        """A number that every logit at every real token moves: a fixed random combination of them."""
        weights = torch.randn(*logits.shape, generator=torch.Generator().manual_seed(5))
        return (logits * weights)[self.mask.bool()].sum() / 10

    def run(self, **options: Any) -> AttributionPatching:
        metric = options.pop("metric", self.metric)
        return attribution_patch(
            self.model,
            options.pop("clean", self.clean),
            options.pop("corrupted", self.corrupted),
            metric,
            **{"attention_mask": self.mask, "exact": None, **options},
        )


@pytest.fixture(scope="module")
def pair(hooked: Callable[[str], Any], hf: Callable[[str], Any]) -> Callable[..., Pair]:
    @cache
    def make(variant: str, padding: str | None = None) -> Pair:
        padding = padding or ("left", "right")[FAMILIES.index(variant) % 2]
        clean, mask = prompts(padding, seed=1, length=LENGTH)
        corrupted, _ = prompts(padding, seed=2, length=LENGTH)
        corrupted[:, : LENGTH - 3] = clean[:, : LENGTH - 3]
        clean_values = reference_cache(hf(variant), clean, mask)
        return Pair(hooked(variant), hf(variant), clean, corrupted, mask, clean_values)

    return make


# --- the estimate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["corrupted", "clean"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_sender_is_the_reference_s(model_of: Any, pair: Any, variant: str, direction: str) -> None:
    p = pair(variant)
    model_of(variant)
    tokens = (p.corrupted, p.clean) if direction == "corrupted" else (p.clean, p.corrupted)
    expected = reference_attributions(p.hf, *tokens, p.mask, p.metric)
    result = p.run(direction=direction, by_position=True)
    assert sorted(result.senders) == sorted(expected)
    columns = p.mask.any(dim=0).nonzero()[:, 0].tolist()
    assert result.positions == tuple(columns)
    assert len(columns) < LENGTH
    size = max(float(values.abs().max()) for values in expected.values())
    assert size > 0.1
    for sender, values in zip(result.senders, result.attributions, strict=True):
        np.testing.assert_allclose(
            values, expected[sender][columns].numpy(), rtol=1e-3, atol=2e-5 * size, err_msg=sender
        )
    together = p.run(direction=direction)
    assert together.positions is None
    np.testing.assert_allclose(
        together.attributions, result.attributions.sum(1, keepdims=True), atol=1e-4 * size
    )
    metrics = [float(p.metric(reference_logits(p.hf, t, p.mask))) for t in tokens]
    assert [result.baseline, result.other_metric] == pytest.approx(metrics, abs=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_is_the_slope_of_the_exact_patch(pair: Any, variant: str) -> None:
    """A patch by a small share of the way, forth and back, with the choice of experts held: the slope is the
    attribution."""
    p = pair(variant)
    result = p.run()
    share = 0.02
    compared = 0
    for sender, (attribution,) in zip(result.senders, result.attributions, strict=True):
        if abs(attribution) < 0.2:
            continue
        ends = [
            float(p.metric(partly_patched_logits(p.hf, p.corrupted, p.mask, p.clean_values, sender, s)))
            for s in (share, -share)
        ]
        slope = (ends[0] - ends[1]) / (2 * share)
        assert attribution == pytest.approx(slope, rel=0.02, abs=0.005), sender
        compared += 1
    assert compared > 8


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_is_exact_where_the_metric_is_linear(pair: Any, variant: str) -> None:
    """The last layer's experts reach the logits through the final norm alone; its scale is held here."""
    p = pair(variant)
    last = p.model.cfg.n_layers - 1
    held = [("ln_final.hook_scale", lambda value, hook: torch.full_like(value, 1.5))]
    with p.model.hooks(fwd_hooks=held):
        result = p.run(senders="experts", layers=last, exact="all", by_position=True)
    frame = result.to_frame()
    assert frame["exact"].abs().max() > 0.05
    np.testing.assert_allclose(frame["attribution"], frame["exact"], atol=2e-5)
    errors = result.errors().loc["all"]
    assert errors["relative"] < 1e-4
    assert errors["pearson"] > 0.9999
    # Not so one layer before.
    with p.model.hooks(fwd_hooks=held):
        before = (
            p.run(senders="experts", layers=last - 1, exact="all")
            if last - 1 in p.model.cfg.moe_layers
            else None
        )
    if before is not None:
        assert before.errors()["relative"]["all"] > 0.01


# --- the exact effects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
def test_exact_effects_are_activation_patches(pair: Any, variant: str) -> None:
    p = pair(variant)
    result = p.run(exact="all")
    baseline = float(p.metric(reference_logits(p.hf, p.corrupted, p.mask)))
    for sender, (exact,) in list(zip(result.senders, result.exact, strict=True))[::3]:
        logits = patched_logits(p.hf, p.corrupted, p.mask, p.clean_values, *patch_of(sender))
        assert exact == pytest.approx(float(p.metric(logits)) - baseline, abs=1e-4), sender
    assert set(result.measured.ravel()) <= {"all", "no difference"}
    by_position = p.run(exact=3, by_position=True)
    for row, column in np.argwhere(np.isin(by_position.measured, ("largest", "random"))):
        activation, cell = patch_of(by_position.senders[row])
        cell = {**cell, "pos": by_position.positions[column]}
        logits = patched_logits(p.hf, p.corrupted, p.mask, p.clean_values, activation, cell)
        expected = float(p.metric(logits)) - baseline
        assert by_position.exact[row, column] == pytest.approx(expected, abs=1e-4)


def test_which_are_measured(pair: Any) -> None:
    """The largest, and others at random; those without a difference need no run and count nowhere."""
    p = pair("qwen2_moe")
    result = p.run(exact=4, by_position=True)
    counts = dict(zip(*np.unique(result.measured.astype(str), return_counts=True), strict=True))
    assert counts["largest"] == counts["random"] == 4
    assert counts["no difference"] + counts[""] + 8 == result.exact.size
    size = np.abs(result.attributions)
    assert size[result.measured == "largest"].min() >= size[result.measured != "largest"].max()
    assert np.isnan(result.exact[result.measured == ""]).all()
    nothing = result.measured == "no difference"
    assert (result.exact[nothing] == 0).all()
    assert (result.attributions[nothing] == 0).all()
    # An expert that neither run chose is one of them.
    chosen = [
        values["blocks.1.mlp.hook_expert_indices"]
        for values in (p.clean_values, reference_cache(p.hf, p.corrupted, p.mask))
    ]
    column = LENGTH - 3
    unused = set(range(8)) - {
        int(e) for values in chosen for e in values[p.mask[:, column].bool(), column].flatten()
    }
    assert unused
    for expert in unused:
        row = result.senders.index(f"M1E{expert}")
        assert result.measured[row, result.positions.index(column)] == "no difference"

    # Nor has any head of the first layer where both inputs are still the same.
    early = p.run(senders="heads", layers=np.int64(0), positions=[0, 1], exact="all")
    assert set(early.measured.ravel()) == {"no difference"}

    same, other = p.run(exact=4, by_position=True), p.run(exact=4, by_position=True, seed=1)
    assert np.array_equal(same.measured, result.measured)
    assert not np.array_equal(other.measured, result.measured)
    everything = p.run(exact=10_000, senders="heads")
    assert set(everything.measured.ravel()) == {"largest"}
    nobody = p.run(exact=None)
    assert np.isnan(nobody.exact).all()
    with pytest.raises(ValueError, match="no effect was measured"):
        nobody.errors()
    with pytest.raises(ValueError, match="runs that differ"):
        p.run(corrupted=p.clean, exact="all", senders="heads", layers=0).errors()


def test_errors_are_of_the_estimate(pair: Any) -> None:
    result = pair("olmoe").run(exact=6)
    frame, errors = result.to_frame(), result.errors()
    assert list(errors.index) == ["largest", "random"]
    for reason in errors.index:
        rows, got = frame[frame["measured"] == reason], errors.loc[reason]
        error = rows["attribution"] - rows["exact"]
        assert np.array_equal(error, rows["error"])
        assert got["n"] == 6
        assert got["mean_absolute"] == pytest.approx(error.abs().mean())
        assert got["largest_absolute"] == pytest.approx(error.abs().max())
        assert got["relative"] == pytest.approx(((error**2).sum() / (rows["exact"] ** 2).sum()) ** 0.5)
        assert got["pearson"] == pytest.approx(pearsonr(rows["attribution"], rows["exact"]).statistic)
        assert got["spearman"] == pytest.approx(spearmanr(rows["attribution"], rows["exact"]).statistic)
        assert got["same_sign"] == ((rows["attribution"] > 0) == (rows["exact"] > 0)).mean()
    two = pair("olmoe").run(exact=1).errors()
    assert two["pearson"].isna().all()


def test_frame(pair: Any) -> None:
    p = pair("qwen2_moe")
    frame = p.run().to_frame()
    assert list(frame) == ["sender", "layer", "attribution", "exact", "error", "measured"]
    assert list(frame["sender"][:5]) == ["A0H0", "A0H1", "A0H2", "A0H3", "M0E0"]
    assert frame["sender"].is_unique
    assert len(frame) == 3 * (4 + 8 + 1)
    result = p.run(by_position=True)
    frame = result.to_frame()
    assert list(frame)[:4] == ["sender", "layer", "position", "attribution"]
    row = frame[(frame["sender"] == "M2S") & (frame["position"] == LENGTH - 2)].iloc[0]
    assert row["layer"] == 2
    index = result.senders.index("M2S"), result.positions.index(LENGTH - 2)
    assert row["attribution"] == result.attributions[index] != 0
    assert "39 senders" in repr(result)
    assert "in the corrupted run" in repr(result)


# --- parts of it --------------------------------------------------------------------------------------------


def test_some_layers_kinds_and_positions(pair: Any) -> None:
    p = pair("deepseek_v2")
    whole = p.run(by_position=True).to_frame().set_index(["sender", "position"])["attribution"]
    last_columns = p.mask.bool() & (torch.arange(LENGTH) >= LENGTH - 2)
    for options in (
        {"layers": [2]},
        {"layers": 0},
        {"senders": "heads", "layers": [1, 2]},
        {"senders": ("experts",)},
        {"positions": last_columns},
    ):
        part = p.run(by_position=True, **options).to_frame().set_index(["sender", "position"])["attribution"]
        assert 0 < len(part) < len(whole)
        np.testing.assert_allclose(part, whole[part.index], rtol=1e-4, atol=1e-5)
    assert not any(sender.startswith("M0") for sender in whole.index.get_level_values(0))
    one_row = torch.zeros_like(p.mask, dtype=torch.bool)
    one_row[0, LENGTH - 1] = True
    rows = [p.run(positions=places) for places in (one_row, one_row.flip(0))]
    both = sum(row.attributions for row in rows)
    last = p.run(positions=LENGTH - 1).attributions
    np.testing.assert_allclose(both, last, rtol=1e-4, atol=1e-5)
    assert not np.allclose(rows[0].attributions, last)


# --- cost, state, errors ------------------------------------------------------------------------------------


def test_two_forward_passes_and_no_gradient_of_weights(model_of: Any, pair: Any) -> None:
    p, model = pair("qwen3_moe"), model_of("qwen3_moe")
    runs: list[bool] = []

    def metric(logits: Tensor) -> Tensor:
        runs.append(logits.requires_grad)
        if logits.requires_grad:
            assert not any(weight.requires_grad for weight in model.parameters())
        return p.metric(logits)

    with torch.no_grad():  # whatever the caller's setting
        p.run(metric=metric)
    assert runs == [False, True]
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())

    def broken(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            raise ZeroDivisionError
        return p.metric(logits)

    with pytest.raises(ZeroDivisionError):
        p.run(metric=broken)
    assert all(weight.requires_grad for weight in model.parameters())
    runs.clear()
    p.run(metric=metric, exact=2, senders="heads")
    assert runs == [False, True] + [False] * 5


def test_other_hooks_act_and_stay(model_of: Any, pair: Any) -> None:
    p, model = pair("olmoe"), model_of("olmoe")
    plain = p.run(senders="heads")
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: 0 * value)]):
        changed = p.run(senders="heads", exact="all")
        again = p.run(senders="heads")
    assert np.array_equal(changed.attributions, again.attributions)
    assert not np.allclose(changed.attributions, plain.attributions)
    assert changed.baseline != plain.baseline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"senders": ("layers",)}, "'heads', 'experts' or both"),
        ({"senders": ()}, "'heads', 'experts' or both"),
        ({"senders": ("heads", "heads")}, "each once"),
        ({"direction": "noise"}, "'corrupted' or 'clean'"),
        ({"exact": 0}, "positive"),
        ({"layers": 3}, "layer 3 is not among this model's, 0 to 2"),
        ({"layers": [0], "senders": "experts"}, "layers with experts: 1, 2"),
        ({"positions": 0}, "row 0: .* is padding"),
        (
            {"corrupted": torch.ones(2, LENGTH + 1, dtype=torch.long), "attention_mask": None},
            "the same shape",
        ),
        ({"metric": lambda logits: logits[:, -1].sum(-1)}, "one floating number"),
        ({"metric": lambda logits: logits.mean() * torch.nan}, "NaN in the run that is patched from"),
        ({"metric": lambda logits: logits.detach().mean()}, "no gradient"),
    ],
)
def test_errors(pair: Any, model_of: Any, options: dict[str, Any], message: str) -> None:
    model_of("deepseek_v2")
    with pytest.raises(ValueError, match=message):
        pair("deepseek_v2", "left").run(**options)


def test_inference_mode_has_no_gradients(pair: Any) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        pair("olmoe").run()


def test_texts_of_other_lengths(model_of: Any) -> None:
    model = model_of("olmoe")
    texts = ["When Mary and John went", "The router"], ["When Mary and", "The router sends every token"]

    def metric(logits: Tensor) -> Tensor:
        return logits[..., : VOCABULARY // 2].mean()

    same = attribution_patch(model, "The router sends", "The router sends", metric, exact="all")
    assert (same.attributions == 0).all()
    with pytest.raises(ValueError, match=r"same shape|same places"):
        attribution_patch(model, *texts, metric)

"""Route experiments against slow runs of transformers' models, and what they say of the routers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moe_lens import HookedMoE
from moe_lens.interventions import (
    Ablate,
    RouteExperiment,
    RouterOnly,
    UnfiredIntervention,
    rank_swaps,
    silence,
    top_k_sensitivity,
)
from moe_lens.interventions.route_runs import RouteSettings
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.queries import persistence
from moe_lens.routing.result import RoutingContributions
from tests.conftest import leftover_hooks
from tests.families import FAMILIES, prompts
from tests.reference import reference_run
from tests.reference_interventions import (
    Run,
    ablated_run,
    real_places,
    router_only_run,
    swapped_run,
    top_k_run,
)
from tests.reference_routes import contribution_rows, document_losses
from tests.routing_cases import Batch, corpus

Load = Callable[[str], Any]
SlowRun = Callable[[torch.Tensor, torch.Tensor], Run]
MEASURES = ("variance", "aps", "ans")


def assert_is(
    found: RouteExperiment,
    name: str,
    hf_model: Any,
    batches: Sequence[Batch],
    run: SlowRun,
    by: str = "layer",
    without: str | None = None,
) -> None:
    """A condition's maps and losses are those of the slow runs."""
    contributions = found[name].contributions
    receivers = [int(receiver.removeprefix("M")) for receiver in contributions.receivers]
    runs = [run(tokens, mask) for tokens, mask in batches]
    losses = [
        row
        for slow, (tokens, mask) in zip(runs, batches, strict=True)
        for row in document_losses(slow, tokens, mask)
    ]
    assert found.n_losses.tolist() == [len(row) for row in losses]
    np.testing.assert_allclose(found[name].loss_sums, [sum(row) for row in losses], rtol=1e-5)
    for position in ("lead", "rest"):
        parts = [
            contribution_rows(hf_model, slow[1], mask, receivers, by, position, without)
            for slow, (_, mask) in zip(runs, batches, strict=True)
        ]
        n = 0
        for sender, receiver in parts[0]:
            rows = [part[sender, receiver] for part in parts]
            expected = np.concatenate([part for part in rows if len(part)]).mean(axis=0)
            place = contributions.senders.index(sender), contributions.receiver_index(receiver)
            got = [contributions.measure(measure)[position][place] for measure in MEASURES]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-5, err_msg=f"{sender} {receiver}")
            n += 1
        assert n == int((~np.isnan(contributions.variance[position])).sum())


def some_expert(hf_model: Any, batches: Sequence[Batch], layer: int) -> int:
    """One that is active at the first real token."""
    tokens, mask = batches[0]
    cache = reference_run(hf_model, tokens, mask)[1]
    return int(cache[f"blocks.{layer}.mlp.hook_expert_indices"][real_places(tokens, mask)[0]][0])


# ---- against the slow runs ----


@pytest.mark.parametrize("variant", [*FAMILIES, "deepseek_v2_groups"])
def test_top_k(hf: Load, model_of: Load, variant: str) -> None:
    slow, batches = hf(variant), corpus("left")
    found = top_k_sensitivity(model_of(variant), batches, (1, "all"))
    names = list(found.conditions)
    assert names[:2] == ["unchanged", "K = 1"]
    assert_is(found, "unchanged", slow, batches, lambda tokens, mask: reference_run(slow, tokens, mask))
    for name in names[1:]:
        k = int(name.removeprefix("K = "))
        assert_is(found, name, slow, batches, lambda tokens, mask, k=k: top_k_run(slow, tokens, mask, k))
    assert abs(found.to_frame()["delta_loss"][1]) > 1e-4


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("weights", ["own", "slot"])
def test_swaps(hf: Load, model_of: Load, variant: str, weights: Any) -> None:
    slow, batches, model = hf(variant), corpus("right"), model_of(variant)
    layers = list(model.cfg.moe_layers[:1]) if weights == "slot" else None
    found = rank_swaps(model, batches, "last", weights=weights, layers=layers)
    k, last = model.cfg.top_k, model.cfg.n_experts
    assert list(found.conditions) == ["unchanged", f"rank {k} -> {last}"]
    assert_is(
        found,
        f"rank {k} -> {last}",
        slow,
        batches,
        lambda tokens, mask: swapped_run(slow, tokens, mask, k, last, layers, weights=weights),
    )


@pytest.mark.parametrize("variant", FAMILIES)
def test_silence(hf: Load, model_of: Load, variant: str) -> None:
    slow, batches, model = hf(variant), corpus("left"), model_of(variant)
    layer = model.cfg.moe_layers[0]
    expert = some_expert(slow, batches, layer)
    name = f"M{layer}E{expert}"
    found = silence(model, batches, name)
    for condition, held in (("score, outputs held", True), ("score", False)):
        assert_is(
            found,
            condition,
            slow,
            batches,
            lambda tokens, mask, held=held: router_only_run(slow, tokens, mask, name, hold_outputs=held),
            without=name,
        )
    assert_is(
        found,
        "output",
        slow,
        batches,
        lambda tokens, mask: ablated_run(
            slow, tokens, mask, layer, lambda row, column, chosen: [expert], "zero"
        ),
    )


@pytest.mark.parametrize("by", ["layer", "head", "expert"])
@pytest.mark.parametrize("shared", [False, True])
def test_granularities_of_silence(hf: Load, model_of: Load, by: str, shared: bool) -> None:
    slow, batches, model = hf("deepseek_v2"), corpus("right"), model_of("deepseek_v2")
    layer = model.cfg.moe_layers[0]
    name = f"M{layer}S" if shared else f"M{layer}E{some_expert(slow, batches, layer)}"
    found = silence(model, batches, name, by=by)
    assert_is(
        found,
        "score",
        slow,
        batches,
        lambda tokens, mask: router_only_run(slow, tokens, mask, name),
        by=by,
        without=name,
    )
    if by == "expert":
        place = found.unchanged.contributions.senders.index(name)
        assert list(found.conditions) == ["unchanged", "score", "output"]
        for condition, is_zero in (("unchanged", False), ("score", True), ("output", True)):
            variance = found[condition].contributions.variance["rest"][place]
            assert np.all(variance[~np.isnan(variance)] == 0) == is_zero


# ---- what the conditions are ----


def test_held_outputs_leave_stream_and_loss(model_of: Load, hf: Load) -> None:
    model, batches = model_of("qwen3_moe"), corpus("left")
    layer = model.cfg.moe_layers[0]
    name = f"M{layer}E{some_expert(hf('qwen3_moe'), batches, layer)}"
    found = silence(model, batches, name)
    held = found["score, outputs held"]
    np.testing.assert_array_equal(held.loss_sums, found.unchanged.loss_sums)
    difference = found.difference("score, outputs held")
    senders = found.unchanged.contributions.senders
    changed = [senders[i] for i in np.flatnonzero(np.nan_to_num(difference).any(axis=1))]
    # Every other sender wrote what it wrote.
    assert changed == [f"M{layer}"]
    assert found["score"].loss_sums.tolist() != found.unchanged.loss_sums.tolist()


def test_scores_sum_to_what_the_routers_had(model_of: Load, hf: Load) -> None:
    """Also where routers were not given an expert's: the exact logits are the router's own."""
    model, batches = model_of("olmoe"), corpus("left")
    layer = model.cfg.moe_layers[0]
    found = silence(model, batches, f"M{layer}E{some_expert(hf('olmoe'), batches, layer)}")
    for name, condition in found.conditions.items():
        assert condition.contributions.completeness_error < 1e-5, name
        assert condition.contributions.model_logit_difference < 1e-4, name


def test_unchanged_is_the_plain_analysis(model_of: Load) -> None:
    model, batches = model_of("olmoe"), corpus("left")
    found = top_k_sensitivity(model, batches, 1, by="expert", receivers=[1])
    plain = routing_contributions(model, batches, by="expert", receivers=[1])
    for position in ("lead", "rest"):
        np.testing.assert_array_equal(
            found.unchanged.contributions.variance[position], plain.variance[position]
        )
    assert found.unchanged.contributions.provenance == plain.provenance
    assert found.unchanged.receipt is None


def test_bos_may_be_left_out(model_of: Load) -> None:
    model, batches = model_of("olmoe"), corpus("left", bos_in_first=True)
    found = top_k_sensitivity(model, batches, 1, bos_is_lead=False)
    plain = routing_contributions(model, batches, bos_is_lead=False)
    np.testing.assert_array_equal(found.unchanged.contributions.variance["lead"], plain.variance["lead"])


def test_defaults_are_the_sources(model_of: Load) -> None:
    model, batches = model_of("olmoe"), [prompts()]
    k, n = model.cfg.top_k, model.cfg.n_experts
    sizes = list(dict.fromkeys(size for size in (k // 2, 2 * k, n) if 1 <= size <= n))
    assert list(top_k_sensitivity(model, batches).conditions)[1:] == [f"K = {size}" for size in sizes]
    ranks = list(dict.fromkeys(j for j in (k + 1, k + 2, n) if j <= n))
    assert list(rank_swaps(model, batches).conditions)[1:] == [f"rank {k} -> {j}" for j in ranks]


# ---- receipts and provenance ----


def test_receipts_count_all_batches(model_of: Load, hf: Load) -> None:
    model, batches = model_of("olmoe"), corpus("left")
    n_tokens = sum(int(mask.sum()) for _, mask in batches)
    moe_layers = model.cfg.moe_layers
    found = top_k_sensitivity(model, batches, 1, layers=moe_layers[1:])
    receipt = found["K = 1"].receipt
    assert receipt is not None
    assert receipt.n_runs == len(batches)
    frame = receipt.to_frame()
    assert frame["layer"].tolist() == list(moe_layers[1:])
    assert frame["fired"].tolist() == frame["asked"].tolist() == [n_tokens] * (len(moe_layers) - 1)
    layer = moe_layers[0]
    expert = some_expert(hf("olmoe"), batches, layer)
    silenced = silence(model, batches, f"M{layer}E{expert}")
    active = sum(
        int(
            (reference_run(hf("olmoe"), t, m)[1][f"blocks.{layer}.mlp.hook_expert_indices"] == expert)[
                m.bool()
            ].sum()
        )
        for t, m in batches
    )
    fired = silenced.to_frame().set_index("condition")["fired"]
    later = len(moe_layers) - 1
    assert fired.tolist() == [0, active * later, active * later, active]


def test_provenance_says_what_was_done(model_of: Load, hf: Load, tmp_path: Path) -> None:
    model, batches = model_of("olmoe"), corpus("left")
    layer = model.cfg.moe_layers[0]
    name = f"M{layer}E{some_expert(hf('olmoe'), batches, layer)}"
    found = silence(model, batches, name)
    assert found["output"].specs == (Ablate(name, inactive="allow"),)
    assert found["score"].specs == (RouterOnly(name, inactive="allow"),)
    of = found["score"].contributions.provenance
    assert of["interventions"] == [f"RouterOnly('{name}', inactive='allow')"]
    assert of["unread"] == name
    assert of["edited"] == [f"blocks.{later}.mlp.hook_router_logits" for later in model.cfg.moe_layers[1:]]
    output = found["output"].contributions.provenance
    assert output["edited"] == [f"blocks.{layer}.mlp.hook_expert_contrib"]
    assert "unread" not in output
    assert found.provenance["experiment"] == "silence"
    assert found.provenance["conditions"]["output"]["interventions"] == [
        f"Ablate('{name}', inactive='allow')"
    ]
    assert json.loads(json.dumps(found.provenance)) == found.provenance
    saved = found["score"].contributions.save(tmp_path / "score.safetensors")
    assert RoutingContributions.load(saved).provenance == of
    # Means of unlike conditions are not added.
    with pytest.raises(ValueError, match="cannot be added"):
        found["score"].contributions + found["output"].contributions


# ---- tables ----


def test_losses_by_document_and_by_token(model_of: Load) -> None:
    model, batches = model_of("olmoe"), corpus("left")
    found = top_k_sensitivity(model, batches, 1)
    line = found.to_frame().iloc[1]
    losses = found.document_losses()
    # One document is a single token, which has no next one.
    assert losses["document"].tolist() == np.flatnonzero(found.n_losses).tolist()
    assert len(losses) == len(found.n_losses) - 1
    change = losses["K = 1"] - losses["unchanged"]
    assert line["loss"] == pytest.approx(losses["K = 1"].mean())
    assert line["delta_loss"] == pytest.approx(change.mean())
    assert line["delta_loss_standard_error"] == pytest.approx(change.std(ddof=1) / len(change) ** 0.5)
    weights = losses["tokens"] / losses["tokens"].sum()
    mean = (weights * change).sum()
    assert line["token_loss"] == pytest.approx((weights * losses["K = 1"]).sum())
    assert line["token_delta_loss"] == pytest.approx(mean)
    n = len(change)
    error = np.sqrt(n / (n - 1) * (weights**2 * (change - mean) ** 2).sum())
    assert line["token_delta_loss_standard_error"] == pytest.approx(error)
    assert line["token_loss"] != pytest.approx(line["loss"], abs=1e-6)
    assert line["interventions"] == "TopK(1)"


def test_correlation_is_over_the_lower_triangle(model_of: Load) -> None:
    found = top_k_sensitivity(model_of("qwen3_moe"), corpus("left"), 1)
    line = found.to_frame().iloc[1]
    maps = found.maps()
    both = maps[maps["condition"] == "K = 1"].merge(
        maps[maps["condition"] == "unchanged"], on=["sender", "receiver"], suffixes=("", "_unchanged")
    )
    assert len(both) == int((~np.isnan(found.unchanged.contributions.variance["rest"])).sum())
    np.testing.assert_allclose(both["change"], both["variance"] - both["variance_unchanged"])
    kinds = [("", "eAM"), ("_attention", "A"), ("_mlp", "M")]
    for suffix, letters in kinds:
        chosen = both[both["sender"].str[0].isin(list(letters))]
        expected = spearmanr(chosen["variance"], chosen["variance_unchanged"]).statistic  # type: ignore[union-attr]
        assert line[f"correlation{suffix}"] == pytest.approx(expected)
    assert line["correlation"] < 1
    assert found.to_frame().iloc[0]["correlation"] == pytest.approx(1)
    frame = found.to_frame("aps", "lead")
    assert frame.iloc[1]["correlation"] == found.correlation("K = 1", "aps", "lead")
    assert np.isnan(top_k_sensitivity(model_of("qwen3_moe"), corpus(), 1, receivers=[0]).correlation("K = 1"))


def test_stripes_and_differences(model_of: Load) -> None:
    found = top_k_sensitivity(model_of("olmoe"), corpus("left"), 1)
    stripes = found.stripes(n=2)
    for name, condition in found.conditions.items():
        mine = stripes[stripes["condition"] == name].drop(columns="condition").reset_index(drop=True)
        assert mine.equals(persistence(condition.contributions, n=2).reset_index(drop=True))
    one, other = (found[name].contributions.variance["rest"] for name in ("unchanged", "K = 1"))
    np.testing.assert_array_equal(found.difference("K = 1"), other - one)
    assert np.nanmax(np.abs(found.difference("K = 1"))) > 0


def test_half_precision(checkpoint: Any) -> None:
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16, device="cpu", verbose=False)
    batches = corpus("left")
    tokens, mask = batches[0]
    layer = model.cfg.moe_layers[0]
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    expert = int(cache[f"blocks.{layer}.mlp.hook_expert_indices"][real_places(tokens, mask)[0]][0])
    found = silence(model, batches, f"M{layer}E{expert}")
    for condition in found.conditions.values():
        assert condition.contributions.completeness_error < 1e-4
    assert found.correlation("output") < 1


# ---- what makes no sense, and what is left behind ----


def test_errors_come_before_any_run(model_of: Load) -> None:
    model, tokens = model_of("olmoe"), prompts()[0]
    k, n, last = model.cfg.top_k, model.cfg.n_experts, model.cfg.moe_layers[-1]
    cases: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
        (top_k_sensitivity, (n + 1,), {}, f"k={n + 1} must lie in 1..{n}"),
        (top_k_sensitivity, ((),), {}, "ks is empty"),
        (top_k_sensitivity, ((n, "all"),), {}, f"ks has one twice: K = {n}"),
        (top_k_sensitivity, ("most",), {}, "k='most' must be an integer"),
        (top_k_sensitivity, (1,), {"layers": 99}, "layer 99 has no experts"),
        (top_k_sensitivity, (1,), {"by": "neuron"}, "by='neuron' must be one of 'layer', 'head', 'expert'"),
        (top_k_sensitivity, (1,), {"memory_budget": 10}, "2 conditions take .* over memory_budget=10"),
        (top_k_sensitivity, (1,), {"receivers": [99]}, "99"),
        (rank_swaps, (k,), {}, f"rank {k} cannot be swapped with itself"),
        (rank_swaps, (n + 1,), {}, f"there is no rank j={n + 1}"),
        (rank_swaps, (("last", -1),), {}, "js has one twice"),
        (rank_swaps, (k + 1,), {"weights": "old"}, "weights='old'"),
        (silence, ("A1H0",), {}, "'A1H0' is no expert"),
        (silence, (f"M{last}E0",), {}, "no sender"),
        (silence, (f"M0E{n}",), {}, "there is no"),
        (silence, ("M0S",), {}, "there is no"),
    ]
    with model.hooks([]):
        for experiment, arguments, settings, message in cases:
            with pytest.raises(ValueError, match=message):
                experiment(model, Unlooked(tokens), *arguments, **settings)
    with pytest.raises(TypeError, match="unexpected keyword"):
        top_k_sensitivity(model, tokens, 1, no_setting=1)
    with pytest.raises(ValueError, match="no batches"):
        top_k_sensitivity(model, [], 1)
    with pytest.raises(ValueError, match="no position has a next token"):
        top_k_sensitivity(model, tokens[:, :1], 1)
    with model.hooks([("hook_embed", lambda value, hook: value)]), pytest.raises(ValueError, match="hook"):
        top_k_sensitivity(model, tokens, 1)
    found = top_k_sensitivity(model, tokens, 1)
    with pytest.raises(KeyError, match="there are unchanged, K = 1"):
        found["K = 2"]
    with pytest.raises(ValueError, match="position must be one of lead, rest"):
        found.correlation("K = 1", position="first")
    with pytest.raises(ValueError, match="there is no measure 'spread'"):
        found.maps("spread")
    with pytest.raises(ValueError, match="kind='moe' must be one of"):
        found.correlation("K = 1", kind="moe")  # type: ignore[arg-type]


class Unlooked:
    """Batches that nobody may take."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __iter__(self) -> Any:
        yield pytest.fail("a batch was taken")


def test_an_expert_that_is_never_active(model_of: Load) -> None:
    model, tokens = model_of("olmoe"), prompts(batch=1, length=2)[0]
    layer = model.cfg.moe_layers[0]
    active = model.run_with_cache(tokens)[1][f"blocks.{layer}.mlp.hook_expert_indices"].unique().tolist()
    idle = next(expert for expert in range(model.cfg.n_experts) if expert not in active)
    with pytest.raises(UnfiredIntervention, match=f"M{layer}E{idle} is active nowhere"):
        silence(model, tokens, f"M{layer}E{idle}")


def test_a_broken_loss_is_named(hooked: Load) -> None:
    model = hooked("olmoe")
    weight = model.unembed.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(
            FloatingPointError, match="condition unchanged: the loss is nan at row 0, position 0"
        ):
            top_k_sensitivity(model, prompts()[0], 1)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_an_interrupted_run_leaves_nothing(hooked: Load, hf: Load) -> None:
    model, batches = hooked("olmoe"), corpus("left")
    layer = model.cfg.moe_layers[0]
    name = f"M{layer}E{some_expert(hf('olmoe'), batches, layer)}"

    def dies() -> Any:
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        silence(model, dies(), name)
    original = model.unembed.forward

    def broken(*args: Any) -> Any:
        raise KeyboardInterrupt

    model.unembed.forward = broken
    try:
        with pytest.raises(KeyboardInterrupt):
            silence(model, batches, name)
    finally:
        model.unembed.forward = original
    assert leftover_hooks(model) == []
    assert not model.run_observers


def test_batches_may_be_an_iterator_and_are_shown(model_of: Load, capsys: Any) -> None:
    model, batches = model_of("olmoe"), corpus("left")
    once = top_k_sensitivity(model, iter(batches), 1, verbose=True)
    listed = top_k_sensitivity(model, batches, 1)
    np.testing.assert_array_equal(once["K = 1"].loss_sums, listed["K = 1"].loss_sums)
    assert once.provenance["tokens"] == listed.provenance["tokens"]
    printed = capsys.readouterr()
    assert "2 conditions: unchanged, K = 1" in printed.out
    assert "2batch" in printed.err.replace(" ", "")
    assert "RouteExperiment top_k_sensitivity" in repr(once)
    assert RouteSettings().by == "layer"

"""Questions to routing contributions, super experts and score variance maps, against loops over the slow reference."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.contributions import RoutingContributions, routing_contributions
from moe_lens.routing.queries import (
    expert_variance_rank,
    own_block_heads,
    persistence,
    promote_inhibit,
    top_senders,
    variance_rank_correlation,
)
from moe_lens.routing.score_maps import map_hooks, mean_score_variance_maps, score_variance_maps
from moe_lens.routing.super_experts import super_expert_table, super_experts
from tests.families import prompts
from tests.reference import reference_run
from tests.reference_rank_shift import rank_shifts, spearman
from tests.reference_routing import (
    dense_scores,
    document_means,
    document_rows,
    measures_of,
    sender_active,
)

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe_dense_bias", "mixtral")


def corpus() -> list[tuple[Tensor, Tensor]]:
    return [prompts("right", batch=3, length=8), prompts("left", seed=1, batch=2, length=9)]


@pytest.fixture(scope="module")
def contributions_of(hooked: Callable[[str], Any]) -> Callable[..., RoutingContributions]:
    """A variant's contributions over `corpus`, measured once."""
    made: dict[Any, RoutingContributions] = {}

    def measure(variant: str, by: str, **settings: Any) -> RoutingContributions:
        key = variant, by, *settings.items()
        if key not in made:
            made[key] = routing_contributions(hooked(variant), corpus(), by=by, **settings)
        return made[key]

    return measure


@pytest.fixture(scope="module")
def runs(hf: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The reference's hook values of every batch of `corpus`."""
    made: dict[str, list[Any]] = {}

    def run(variant: str) -> list[Any]:
        if variant not in made:
            with torch.no_grad():
                made[variant] = [reference_run(hf(variant), *batch)[1] for batch in corpus()]
        return made[variant]

    return run


# ---- who, and for how long ----


def test_top_senders_are_ranked(contributions_of: Callable[..., RoutingContributions]) -> None:
    contributions = contributions_of("olmoe", "layer")
    frame = top_senders(contributions, "M2", n=3)
    assert frame["rank"].tolist() == [1, 2, 3]
    values = contributions.variance["rest"][:, 2]
    assert frame["sender"].tolist() == [contributions.senders[i] for i in np.argsort(-values)[:3]]
    assert frame["variance"].tolist() == sorted(values.tolist(), reverse=True)[:3]
    with pytest.raises(ValueError, match="no receiver"):
        top_senders(contributions, "M9")
    assert len(top_senders(contributions, "M2", n=np.int64(2))) == 2  # type: ignore[arg-type]
    for wrong in (2.5, True, "2"):
        with pytest.raises(TypeError, match=f"n={wrong!r} must be a positive integer"):
            top_senders(contributions, "M2", n=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"n={wrong!r} must be a positive integer"):
            persistence(contributions, n=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=0 must be positive"):
        top_senders(contributions, "M2", n=0)


@pytest.mark.parametrize("by", ["layer", "head", "expert"])
@pytest.mark.parametrize("measure", ["variance", "ans", "overlap"])
def test_persistence_counts_what_loops_count(
    contributions_of: Callable[..., RoutingContributions], by: str, measure: str
) -> None:
    contributions = contributions_of("olmoe", by, rank_shift=True)
    n = 3
    frame = persistence(contributions, measure, n=n).set_index("sender")
    values = contributions.measure(measure)["rest"]
    sizes = 1 - values if measure == "overlap" else np.abs(values)
    assert sorted(frame.index) == sorted(contributions.senders)
    for i, sender in enumerate(contributions.senders):
        ranks, shares, run, longest = [], [], 0, 0
        for column in range(len(contributions.receivers)):
            size = sizes[i, column]
            if np.isnan(size):
                run = 0
                continue
            others = [s for s in sizes[:, column] if not np.isnan(s)]
            earlier = sum(s == size for s in sizes[:i, column])
            ranks.append(1 + sum(s > size for s in others) + earlier)
            shares.append(size / sum(others) if sum(others) else 0.0)
            run = run + 1 if ranks[-1] <= n else 0
            longest = max(longest, run)
        row = frame.loc[sender]
        assert row["receivers"] == len(ranks)
        assert row["in_top"] == sum(rank <= n for rank in ranks)
        assert row["longest_run"] == longest
        assert row["mean_rank"] == pytest.approx(np.mean(ranks))
        assert row["best_rank"] == min(ranks)
        assert row["mean_share"] == pytest.approx(np.mean(shares))
        assert row["peak"] == contributions.receivers[int(np.nanargmax(sizes[i]))]
    assert frame["longest_run"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="n=0 must be positive"):
        persistence(contributions, n=0)
    with pytest.raises(ValueError, match="position must be one of lead, rest, not 'all'"):
        persistence(contributions, position="all")
    with pytest.raises(ValueError, match="no measure 'size'"):
        persistence(contributions, "size")


# ---- which way ----


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("by", ["layer", "head"])
def test_promotion_and_inhibition(
    contributions_of: Callable[..., RoutingContributions], variant: str, by: str
) -> None:
    contributions = contributions_of(variant, by)
    pairs, by_distance = promote_inhibit(contributions, "rest")
    assert len(pairs) == int((~np.isnan(contributions.aps["rest"])).sum())
    seen: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in pairs.to_dict("records"):
        cell = contributions.senders.index(row["sender"]), contributions.receiver_index(row["receiver"])
        aps, ans = contributions.aps["rest"][cell], contributions.ans["rest"][cell]
        assert (row["aps"], row["ans_size"]) == (aps, -ans)
        assert row["balance"] == pytest.approx((aps + ans) / (aps - ans))
        assert -1 <= row["balance"] <= 1
        if row["sender"] == "embed":
            assert row["kind"] == "embed"
            assert np.isnan(row["distance"])
            continue
        layer = int(row["sender"][1:].split("H")[0].removesuffix("bias"))
        assert row["kind"] == {"A": "attention", "M": "mlp"}[row["sender"][0]]
        assert row["distance"] == int(row["receiver"][1:]) - layer
        seen.setdefault((row["kind"], int(row["distance"])), []).append((aps, -ans))
    assert len(by_distance) == len(seen)
    for row in by_distance.to_dict("records"):
        cells = seen[row["kind"], row["distance"]]
        aps, size = np.mean(cells, axis=0)
        assert row["pairs"] == len(cells)
        assert (row["aps"], row["ans_size"]) == pytest.approx((aps, size))
        assert row["balance"] == pytest.approx((aps - size) / (aps + size))
    assert by_distance.query("kind == 'attention'")["distance"].min() == 0
    assert by_distance.query("kind == 'mlp'")["distance"].min() == 1


def test_a_sender_that_does_nothing_has_no_balance(hooked: Callable[[str], Any]) -> None:
    model = hooked("olmoe")
    with model.hooks([("blocks.0.hook_attn_out", lambda value, hook: 0 * value)]):
        contributions = routing_contributions(model, corpus(), by="layer")
    pairs, by_distance = promote_inhibit(contributions)
    nothing = pairs[pairs["sender"] == "A0"]
    assert nothing["balance"].isna().all()
    # Only A0 reaches a router two layers on; the other means have senders that do something.
    assert by_distance["balance"].isna().tolist() == [False, False, True, False, False]
    assert by_distance.loc[by_distance["kind"] == "mlp", "pairs"].tolist() == [2, 1]


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe_no_bias", "qwen3_moe_dense_bias"])
def test_heads_in_their_own_block(
    contributions_of: Callable[..., RoutingContributions],
    hf: Callable[[str], Any],
    runs: Callable[[str], list[Any]],
    variant: str,
) -> None:
    contributions = contributions_of(variant, "head")
    frame = own_block_heads(contributions)
    receivers = [int(name[1:]) for name in contributions.receivers]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[r, h] for r in receivers for h in range(4)]
    for row in frame.to_dict("records"):
        layer, head = int(row["layer"]), int(row["head"])
        documents = np.concatenate(
            [
                document_means(
                    dense_scores(hf(variant), values, layer, "head")[f"A{layer}H{head}"], mask, "rest"
                )
                for values, (_, mask) in zip(runs(variant), corpus(), strict=True)
            ]
        )
        got = [row["variance"], row["aps"], row["ans"]]
        np.testing.assert_allclose(got, documents.mean(axis=0), rtol=2e-4, atol=1e-6)
    with pytest.raises(ValueError, match="reads contributions by 'head', and these are by 'layer'"):
        own_block_heads(contributions_of(variant, "layer"))


# ---- experts ----


@pytest.mark.parametrize("when_active", [False, True])
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe"])
def test_expert_ranks(
    contributions_of: Callable[..., RoutingContributions],
    hf: Callable[[str], Any],
    runs: Callable[[str], list[Any]],
    variant: str,
    when_active: bool,
) -> None:
    contributions = contributions_of(variant, "expert")
    values_of, batches = runs(variant), corpus()
    means: dict[str, float] = {}
    for e in range(8):
        name, rows = f"M0E{e}", []
        for values, (_, mask) in zip(values_of, batches, strict=True):
            scores = dense_scores(hf(variant), values, 1, "expert")[name]
            variance = np.array([[measures_of(token)[0] for token in row] for row in scores])
            active = sender_active(values, name, mask)
            rows.append(document_rows(variance, mask, "rest", active, active_only=when_active))
        found = np.concatenate(rows)
        if len(found):
            means[name] = float(found.mean())
    for name, mean in means.items():
        got = expert_variance_rank(contributions, name, when_active=when_active)
        assert (got.expert, got.receiver, got.n_experts) == (name, "M1", len(means))
        assert got.rank == 1 + sum(other > mean for other in means.values())
        assert got.value == pytest.approx(mean, rel=1e-3)
    later = expert_variance_rank(contributions, "M0E1", 2)
    assert later.receiver == "M2"
    assert later.value == contributions.variance["rest"][contributions.senders.index("M0E1"), 2]


def test_expert_rank_errors(contributions_of: Callable[..., RoutingContributions]) -> None:
    contributions = contributions_of("qwen2_moe", "expert")
    with pytest.raises(ValueError, match="no sender 'M1E9'"):
        expert_variance_rank(contributions, "M1E9")
    assert inspect.signature(expert_variance_rank).parameters["expert"].default is inspect.Parameter.empty
    for name in ("M0S", "A0", "embed"):
        with pytest.raises(ValueError, match=f"'{name}' is no routed expert"):
            expert_variance_rank(contributions, name)
    with pytest.raises(ValueError, match="M1E0 writes after the router of M1 has read"):
        expert_variance_rank(contributions, "M1E0", "M1")
    with pytest.raises(ValueError, match="reads contributions by 'expert'"):
        expert_variance_rank(contributions_of("qwen2_moe", "head"), "M0E1")
    with pytest.raises(ValueError, match="no sender 'M2E0'"):
        expert_variance_rank(contributions, "M2E0")  # after the last router


def test_never_chosen_experts_have_no_rank_when_active(hooked: Callable[[str], Any]) -> None:
    model = hooked("olmoe")

    def force(value: Tensor, hook: Any) -> Tensor:
        return torch.arange(value.shape[-1]).expand_as(value).clone()

    with model.hooks([("blocks.0.mlp.hook_expert_indices", force)]):
        contributions = routing_contributions(model, corpus(), by="expert", rank_shift=True)
    assert expert_variance_rank(contributions, "M0E1").n_experts == 8
    assert expert_variance_rank(contributions, "M0E1", when_active=True).n_experts == 4
    assert expert_variance_rank(contributions, "M0E7").rank == 8
    with pytest.raises(ValueError, match=r"no token \(rest\) chose M0E7"):
        expert_variance_rank(contributions, "M0E7", when_active=True)
    assert variance_rank_correlation(contributions, "M0", "M1", when_active=True).n_experts == 4


@pytest.mark.parametrize("variant", FAMILIES)
def test_variance_and_rank_shift_correlate_as_the_reference_says(
    contributions_of: Callable[..., RoutingContributions],
    hf: Callable[[str], Any],
    runs: Callable[[str], list[Any]],
    variant: str,
) -> None:
    contributions = contributions_of(variant, "expert", rank_shift=True)
    receiver = int(contributions.receivers[-1][1:])
    sending = int(contributions.receivers[-2][1:])
    names = [f"M{sending}E{e}" for e in range(8)]
    variance, aarv = {n: [] for n in names}, {n: [] for n in names}
    for values, (_, mask) in zip(runs(variant), corpus(), strict=True):
        scores = dense_scores(hf(variant), values, receiver, "expert")
        shifts = rank_shifts(hf(variant), values, receiver, "expert")
        for name in names:
            per_token = np.array([[measures_of(token)[0] for token in row] for row in scores[name]])
            active = sender_active(values, name, mask)
            variance[name].extend(document_rows(per_token, mask, "rest", active))
            aarv[name].extend(document_rows(shifts[name]["aarv"], mask, "rest", active))
    expected = spearman(
        [float(np.mean(variance[n])) for n in names], [float(np.mean(aarv[n])) for n in names]
    )
    got = variance_rank_correlation(contributions, f"M{sending}", receiver)
    assert got.rho == pytest.approx(expected, abs=1e-6)
    assert got.n_experts == 8
    assert 0 <= got.p_value <= 1


def test_correlation_errors(contributions_of: Callable[..., RoutingContributions]) -> None:
    contributions = contributions_of("deepseek_v2", "expert", rank_shift=True)
    with pytest.raises(ValueError, match="no AARV; measure it with rank_shift=True"):
        variance_rank_correlation(contributions_of("olmoe", "expert"), "M0", "M1")
    with pytest.raises(ValueError, match="reads contributions by 'expert'"):
        variance_rank_correlation(contributions_of("olmoe", "layer"), "M0", "M1")
    for component in ("M0", "A1"):  # a dense layer, and attention
        with pytest.raises(ValueError, match=f"'{component}' has no routed experts"):
            variance_rank_correlation(contributions, component, 2)
    with pytest.raises(ValueError, match="M1 writes after the router of M1 has read"):
        variance_rank_correlation(contributions, "M1", 1)
    with pytest.raises(ValueError, match="no component 'M7'"):
        variance_rank_correlation(contributions, "M7", 2)
    with pytest.raises(ValueError, match="position must be one of"):
        variance_rank_correlation(contributions, "M1", 2, "everywhere")


def test_there_is_no_correlation_where_one_side_does_not_vary(hooked: Callable[[str], Any]) -> None:
    """Every expert of a layer alike: one side is constant, and the other is not."""
    contributions = routing_contributions(hooked("olmoe"), corpus(), by="expert", rank_shift=True)
    assert np.isfinite(variance_rank_correlation(contributions, "M0", "M1").rho)
    places, column = contributions.senders.slice_of("M0"), contributions.receiver_index("M1")

    for constant in ("variance", "aarv"):
        moments = deepcopy(dict(contributions.moments))
        group = [g.component for g in contributions.senders.groups].index("M0")
        of = moments["rest", "all"][group]
        of.mean[contributions.measures.index(constant), 0] = 0.5
        alike = replace(contributions, moments=moments)
        assert np.ptp(alike.measure(constant)["rest"][places, column]) == 0
        other = "aarv" if constant == "variance" else "variance"
        assert np.ptp(alike.measure(other)["rest"][places, column]) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scipy's, where it is asked all the same
            got = variance_rank_correlation(alike, "M0", "M1")
        assert np.isnan(got.rho)
        assert np.isnan(got.p_value)
        assert got.n_experts == 8


# ---- super experts ----


@pytest.mark.parametrize("variant", FAMILIES)
def test_super_experts_are_those_of_extreme_outputs(
    model_of: Callable[[str], Any], runs: Callable[[str], list[Any]], variant: str
) -> None:
    model = model_of(variant)
    largest: dict[tuple[int, int], float] = {}
    counts: dict[tuple[int, int], int] = {}
    for values, (_, mask) in zip(runs(variant), corpus(), strict=True):
        for layer in model.cfg.moe_layers:
            indices = values[f"blocks.{layer}.mlp.hook_expert_indices"]
            outputs = values[f"blocks.{layer}.mlp.hook_expert_out"]
            for row, position, slot in np.ndindex(*indices.shape):
                if mask[row, position]:
                    key = layer, int(indices[row, position, slot])
                    size = float(outputs[row, position, slot].abs().max())
                    largest[key] = max(largest.get(key, 0.0), size)
                    counts[key] = counts.get(key, 0) + 1
    frame = super_experts(model, corpus(), quantile=0.8, share_of_largest=0.5, depth=0.75)
    assert len(frame) == 8 * len(model.cfg.moe_layers)
    threshold = np.quantile(list(largest.values()), 0.8)
    for row in frame.to_dict("records"):
        key = row["layer"], row["expert"]
        assert row["name"] == f"M{key[0]}E{key[1]}"
        assert row["tokens"] == counts.get(key, 0)
        if key not in counts:
            assert np.isnan(row["max_output"])
            assert not row["is_super"]
            continue
        assert row["max_output"] == pytest.approx(largest[key], rel=1e-4)
        extreme = largest[key] > threshold and largest[key] >= 0.5 * max(largest.values())
        assert row["is_super"] == (extreme and row["layer"] < 0.75 * model.cfg.n_layers)
    assert frame["max_output"].dropna().is_monotonic_decreasing


def grown(model: HookedMoE, layer: int, expert: int, factor: float) -> None:
    with torch.no_grad():
        model.blocks[layer].mlp.experts.W_down[expert] *= factor  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_super_expert_is_found_and_ranked(
    checkpoint: Callable[[str], Path], dtype: torch.dtype
) -> None:
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=dtype, verbose=False)
    grown(model, 1, 3, 50)
    tokens, mask = prompts("right", batch=4, length=16)
    frame = super_experts(model, [(tokens, mask)])
    assert frame.loc[frame["is_super"], "name"].tolist() == ["M1E3"]
    same = super_experts(model, [(tokens[:2], mask[:2], "ignored"), [tokens[2:], mask[2:]]])
    assert same["tokens"].tolist() == frame["tokens"].tolist()
    np.testing.assert_allclose(same["max_output"], frame["max_output"], rtol=2e-2)

    contributions = routing_contributions(model, [(tokens, mask)], by="expert")
    table = super_expert_table(model, [(tokens, mask)], contributions)
    row = table.iloc[0].to_dict()
    assert len(table) == 1
    assert (row["name"], row["receiver"], row["experts"]) == ("M1E3", "M2", 8)
    assert (row["variance_rank"], row["variance_rank_when_active"]) == (1, 1)

    grown(model, 2, 5, 5000)
    late = super_experts(model, tokens, depth=0.5)
    assert late["name"].iloc[0] == "M2E5"
    assert not late["is_super"].any()  # too late a layer, and the rest too small beside it
    last = super_expert_table(model, tokens, contributions)
    assert last["name"].tolist() == ["M2E5"]
    assert last["receiver"].isna().all()
    assert last["variance_rank"].isna().all()
    none = super_expert_table(model, tokens, contributions, quantile=1.0)
    assert len(none) == 0


def test_depth_and_share_each_decide(checkpoint: Callable[[str], Path]) -> None:
    """Two planted experts, in layers 0 and 1 of 3: one in reach of the depth, and one of a share of the largest."""
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), verbose=False)
    tokens, mask = prompts("right", batch=4, length=16)
    grown(model, 0, 2, 3000)
    grown(model, 1, 3, 300)
    batches = [(tokens, mask)]

    def found(**criterion: float) -> set[str]:
        frame = super_experts(model, batches, quantile=0.8, **criterion)
        return set(frame.loc[frame["is_super"], "name"])

    sizes = super_experts(model, batches).set_index("name")["max_output"]
    assert sizes.index[:2].tolist() == ["M0E2", "M1E3"]
    share = sizes["M1E3"] / sizes["M0E2"]
    assert found(share_of_largest=0.9 * share, depth=1) >= {"M0E2", "M1E3"}
    assert found(share_of_largest=1.1 * share, depth=1) == {"M0E2"}
    # A layer counts where it is less than depth x layers: layer 1 of 3 not at a third, and just above it.
    assert model.cfg.n_layers == 3
    assert found(share_of_largest=0.9 * share, depth=1 / 3) == {"M0E2"}
    assert found(share_of_largest=0.9 * share, depth=0.34) == {"M0E2", "M1E3"}
    assert found(share_of_largest=0, depth=0) == set()


def test_ranks_over_all_tokens_and_when_active_differ(checkpoint: Callable[[str], Path]) -> None:
    """A large expert that is chosen by few tokens: first among those that chose it, behind others over all."""
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), verbose=False)
    tokens, mask = prompts("right", batch=4, length=16)
    grown(model, 1, 3, 10)
    usual = torch.arange(4, 4 + model.cfg.router.top_k)

    def force(value: Tensor, hook: Any) -> Tensor:
        """All tokens choose the same experts, but for the second of each document, which has the large one too."""
        value = usual.expand_as(value).clone()
        value[:, 1, -1] = 3
        return value

    with model.hooks([("blocks.1.mlp.hook_expert_indices", force)]):
        contributions = routing_contributions(model, [(tokens, mask)], by="expert")
        table = super_expert_table(model, [(tokens, mask)], contributions, quantile=0.9, share_of_largest=1.0)
    row = table.iloc[0].to_dict()
    assert row["name"] == "M1E3"
    assert row["tokens"] == len(tokens)
    over_all = expert_variance_rank(contributions, "M1E3").rank
    active = expert_variance_rank(contributions, "M1E3", when_active=True).rank
    assert (row["variance_rank"], row["variance_rank_when_active"]) == (over_all, active)
    assert active == 1
    assert over_all > 1


def test_a_bare_pair_is_one_batch(model_of: Callable[[str], Any]) -> None:
    model = model_of("mixtral")
    tokens, mask = prompts("right", batch=2, length=8)
    for bare in ((tokens, mask), (tokens, mask.bool())):
        with pytest.raises(ValueError, match=r"give \[\(tokens, mask\)\]"):
            super_experts(model, bare)
    with pytest.raises(ValueError, match=r"give \[\(tokens, mask, queries, keys\)\]"):
        mean_score_variance_maps(model, (tokens, mask, 3, 2), 1)


def test_the_table_takes_contributions_of_this_model_alone(model_of: Callable[[str], Any]) -> None:
    model = model_of("mixtral")
    tokens, mask = prompts("right", batch=2, length=8)
    contributions = routing_contributions(model, [(tokens, mask)], by="expert")
    super_expert_table(model, [(tokens, mask)], contributions)
    for name, said in (("model", ""), ("revision", "revision "), ("dtype", "dtype ")):
        other = replace(contributions, provenance={**contributions.provenance, name: "another"})
        with pytest.raises(ValueError, match=f"the contributions are of {said}'another', and the model is"):
            super_expert_table(model, [(tokens, mask)], other)


def test_super_expert_errors(
    model_of: Callable[[str], Any], contributions_of: Callable[..., RoutingContributions]
) -> None:
    model = model_of("mixtral")
    tokens, _ = prompts()
    for wrong in (dict(quantile=99.5), dict(share_of_largest=-0.1), dict(depth=2)):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name}=.* must lie between 0 and 1"):
            super_experts(model, tokens, **wrong)
    with pytest.raises(ValueError, match="there were no batches"):
        super_experts(model, [])
    with pytest.raises(ValueError, match=r"not text; corpus\.token_batches"):
        super_experts(model, ["a text"])
    with (
        model.hooks([("blocks.0.mlp.hook_expert_out", lambda value, hook: value * float("nan"))]),
        pytest.raises(ValueError, match="not finite"),
    ):
        super_experts(model, tokens)
    with pytest.raises(ValueError, match="the contributions are of "):
        super_expert_table(model, tokens, contributions_of("olmoe", "expert"))
    with pytest.raises(ValueError, match="these are by 'layer'"):
        super_expert_table(model, tokens, contributions_of("mixtral", "layer"))


# ---- score variance maps ----


@pytest.mark.parametrize("variant", FAMILIES)
def test_maps_are_the_reference_s(
    model_of: Callable[[str], Any], hf: Callable[[str], Any], variant: str
) -> None:
    model = model_of(variant)
    tokens, _ = prompts(batch=1, length=7)
    with torch.no_grad():
        _, values = reference_run(hf(variant), tokens, torch.ones_like(tokens))
        _, cache = model.run_with_cache(tokens, return_type=None)
    for receiver in model.cfg.moe_layers:
        for query, key in ((5, 2), (6, 6)):
            variance, attention = score_variance_maps(model, tokens, query, key, receiver)
            scores = dense_scores(hf(variant), values, receiver, "source")
            assert variance.shape == attention.shape == (model.cfg.n_layers, model.cfg.attention.n_heads)
            for layer in range(model.cfg.n_layers):
                for head in range(model.cfg.attention.n_heads):
                    if layer > receiver:
                        assert variance[layer, head].isnan()
                        assert attention[layer, head].isnan()
                        continue
                    expected = measures_of(scores[f"A{layer}H{head}<-{key}"][0, query])[0]
                    assert float(variance[layer, head]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
                    weight = float(values[f"blocks.{layer}.attn.hook_pattern"][0, head, query, key])
                    assert float(attention[layer, head]) == pytest.approx(weight, abs=1e-5)
            for given in (cache, cache.cache_dict):
                again = score_variance_maps(model, given, query - 7, key, receiver)
                torch.testing.assert_close(again.variance, variance, rtol=1e-4, atol=1e-7, equal_nan=True)
                torch.testing.assert_close(again.attention, attention, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_means_over_prompts(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_moe")
    prompts_of = [*prompts("left", batch=3, length=8)], [*prompts("right", seed=1, batch=2, length=6)]
    queries, keys = [[7, -1, 6], torch.tensor([3, 2])], [[2, 4, 6], 1]
    batches = [(*batch, q, k) for batch, q, k in zip(prompts_of, queries, keys, strict=True)]
    got = mean_score_variance_maps(model, batches, 2)
    alone = []
    for tokens, mask, query, key in batches:
        for row in range(len(tokens)):
            q = int(query[row])
            k = int(key if isinstance(key, int) else key[row])
            alone.append(score_variance_maps(model, tokens[[row]], q, k, 2, attention_mask=mask[[row]]))
    assert got.n_prompts == len(alone) == 5
    for name in ("variance", "attention"):
        values = torch.stack([getattr(one, name) for one in alone]).double()
        torch.testing.assert_close(getattr(got, name), values.mean(dim=0), rtol=1e-4, atol=1e-8)
        errors = values.std(dim=0) / 5**0.5
        torch.testing.assert_close(getattr(got, f"{name}_standard_error"), errors, rtol=1e-3, atol=1e-8)
    one = mean_score_variance_maps(model, [(prompts_of[0][0][[0]], None, 7, 2)], 1)
    assert one.variance[2].isnan().all()
    assert one.variance[:2].isfinite().all()
    assert one.variance_standard_error.isnan().all()


def test_maps_in_half_precision(checkpoint: Callable[[str], Path], model_of: Callable[[str], Any]) -> None:
    half = HookedMoE.from_pretrained(checkpoint("mixtral"), dtype=torch.bfloat16, verbose=False)
    tokens, _ = prompts(batch=1, length=7)
    got, exact = (score_variance_maps(model, tokens, 5, 3, 1) for model in (half, model_of("mixtral")))
    torch.testing.assert_close(got.variance, exact.variance, rtol=0.2, atol=0.02)


def test_map_errors(model_of: Callable[[str], Any]) -> None:
    model = model_of("deepseek_v2")
    tokens, mask = prompts("left", batch=1, length=6)
    with pytest.raises(ValueError, match="receiver 0 is no MoE layer"):
        score_variance_maps(model, tokens, 3, 2, 0)
    with pytest.raises(ValueError, match="takes one prompt, not 2"):
        score_variance_maps(model, tokens.repeat(2, 1), 3, 2, 1)
    with pytest.raises(ValueError, match="key at position 4 comes after the query at 3"):
        score_variance_maps(model, tokens, 3, 4, 1)
    with pytest.raises(ValueError, match="no position 6 among 6"):
        score_variance_maps(model, tokens, 6, 4, 1)
    with pytest.raises(ValueError, match="the key position 0 is padding"):
        score_variance_maps(model, tokens, 3, 0, 1, attention_mask=mask)
    with pytest.raises(ValueError, match="query must be a position, or one for each row, not 'end'"):
        score_variance_maps(model, tokens, "end", 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 query positions for 1 rows"):
        mean_score_variance_maps(model, [(tokens, None, [3, 4], 1)], 1)
    with pytest.raises(ValueError, match="there were no batches"):
        mean_score_variance_maps(model, [], 1)

    names = map_hooks(model, 1)
    _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None)
    with pytest.raises(ValueError, match="attention_mask goes with tokens"):
        score_variance_maps(model, cache, 3, 2, 1, attention_mask=mask)
    with pytest.raises(KeyError, match=r"the cache lacks blocks\.2\.attn\.hook_pattern; map_hooks"):
        score_variance_maps(model, cache, 3, 2, 2)
    _, flat = model.run_with_cache(tokens, names_filter=names, return_type=None, remove_batch_dim=True)
    with pytest.raises(ValueError, match="must be of one prompt, with its batch axis"):
        score_variance_maps(model, flat, 3, 2, 1)

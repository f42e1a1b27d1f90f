"""`ablate` of a model in nnsight against HookedMoE under the same specs: losses, receipts, errors, and what is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.interop.nnsight import ablate, plan, traffic
from moe_lens.interop.nnsight.ablation import ablate_analysis
from moe_lens.interop.nnsight.model import facts_of
from moe_lens.interop.nnsight.shipped import choice
from moe_lens.interop.nnsight.shipped.ablations import change_layer
from moe_lens.interventions import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    LogitDifference,
    SwapRanks,
    TopK,
    run_with_interventions,
)
from moe_lens.interventions.branches import HOWS
from moe_lens.interventions.changed_routing import ranking
from tests.families import FAMILIES, prompts
from tests.intervention_cases import MASK, POSITIONS, reference_of
from tests.nnsight_ablations import (
    VARIANTS,
    ablations,
    assert_as_hooked_moe,
    changes_of,
    expected_loss,
    layers_of,
    lines_of,
)
from tests.nnsight_cases import lazy_model, traced_model
from tests.nnsight_server import client
from tests.reference import assert_same

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def reference(hooked: Load) -> Load:
    return once(lambda variant: reference_of(hooked(variant)))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ablations_equal_hooked_moe(
    traced: Load, model_of: Load, reference: Load, variant: str, padding: str
) -> None:
    tokens, mask = prompts(padding)
    model = model_of(variant)
    hows = {"none": HOWS[:2], "left": HOWS, "right": HOWS[2:]}[padding]
    items = [item for how in hows for item in ablations(model, tokens, mask, how, reference(variant))]
    found = assert_as_hooked_moe(traced(variant), model, tokens, mask, items)
    assert (found.effects.nan_to_num().abs().amax(dim=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_equal_hooked_moe(traced: Load, model_of: Load, variant: str, padding: str) -> None:
    """Forced, forbidden and swapped experts, other numbers of them, and several together."""
    tokens, mask = prompts(padding)
    model = model_of(variant)
    first, last = layers_of(model)
    # Under groups four experts can be chosen, and of these three are.
    most, forbidden = (4, 0) if variant.endswith("groups") else (8, (0, 3))
    k = model.cfg.top_k
    items: list[Any] = [
        *(ForceExperts((2, 6), layers=first, pos=pos) for pos, _ in POSITIONS.values()),
        ForceExperts(5, layers=(first, last)),
        *(
            ForbidExperts(forbidden, layers=(first, last), pos=pos, inactive="allow")
            for pos, _ in POSITIONS.values()
        ),
        *(TopK(size) for size in range(1, most + 1)),
        TopK(1, layers=last, pos=MASK),
        TopK(most, layers=first, pos=(5, -6)),
        SwapRanks(1, k + 1),
        SwapRanks(k, -1, layers=first, pos=4),
        SwapRanks(1, 2, layers=last, weights="slot"),
        SwapRanks(2, k + 1, layers=first, weights="slot", pos=MASK),
        [SwapRanks(1, k + 1, layers=first, pos=3), SwapRanks(1, 2, layers=first, pos=5, weights="slot")],
        [SwapRanks(1, k + 1, layers=first), Ablate(ranks=1, layers=first)],
        [
            ForceExperts(5, layers=first),
            ForbidExperts(2, layers=first, inactive="allow"),
            TopK(k - 1, layers=first),
        ],
        [ForceExperts(5, layers=first), Ablate(5, layers=first)],
        [
            TopK(2, layers=first, pos=3),
            TopK(1, layers=last),
            Ablate(ranks=1, layers=first, how="renormalize"),
        ],
    ]
    if k > 2:
        items.append([TopK(2, pos=4, layers=last), ForbidExperts(1, layers=last, inactive="allow")])
    assert_as_hooked_moe(traced(variant), model, tokens, mask, items)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_would_be_sent_gives_the_same(
    traced: Load, model_of: Load, reference: Load, variant: str
) -> None:
    """`remote="local"` runs the serialized functions, with this package hidden; to the bit."""
    tokens, mask = prompts("left")
    model = model_of(variant)
    items = [item for how in HOWS for item in ablations(model, tokens, mask, how, reference(variant))]
    items += [ForceExperts(5, layers=model.cfg.moe_layers[0]), SwapRanks(1, -1), TopK(1)]
    here = ablate(traced(variant), tokens, items, attention_mask=mask)
    sent = ablate(traced(variant), tokens, items, attention_mask=mask, remote="local")
    assert torch.equal(here.losses.nan_to_num(), sent.losses.nan_to_num())
    assert [lines_of(receipt) for receipt in here.receipts] == [
        lines_of(receipt) for receipt in sent.receipts
    ]


def test_lazy_model_and_texts(checkpoint: Callable[[str], Path], model_of: Load) -> None:
    """A model of which only the config is here is loaded where it runs here, with transformers' own kernels."""
    texts = ["The router sends every token", "John gave a drink to Mary, and to"]
    model = model_of("qwen2_moe")
    tokens, mask = model.tokenize(texts)
    lm = lazy_model(checkpoint("qwen2_moe"), dtype=torch.float32)
    items = [Ablate(ranks=1, layers=0, how="reroute"), TopK(5), Ablate("M1S", pos=3)]
    found = ablate(lm, texts, items)
    for number, item in enumerate(items):
        loss, _ = expected_loss(model, tokens, mask, item)
        assert_same(found.losses[number].nan_to_num(), loss.nan_to_num(), tolerance=1e-5)


def test_what_is_not_touched_stays_to_the_bit(traced: Load) -> None:
    """Slots in transformers' own order, unsorted for this family; nothing before the place knows of it."""
    tokens, mask = prompts("right")
    found = ablate(
        traced("deepseek_v2"), tokens, [Ablate(ranks=2, pos=4), Ablate("M1S", pos=4)], attention_mask=mask
    )
    assert (found.effects[:, :, :4] == 0).all()
    assert (found.effects[:, :, 4] != 0).all()


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups"])
def test_ties_go_by_the_choice(hooked: Load, variant: str) -> None:
    """Of experts with the same probability those chosen come first: `ranking`'s rule, which travels as `swapped`."""
    cfg = hooked(variant).cfg
    probabilities = torch.full((3, 8), 1 / 8)
    arriving = torch.tensor([[5, 4, 1], [7, 6, 0], [2, 3, 4]])
    spec = dict(number=0, i=1, j=4, places=None, weights="own")
    real = torch.ones(3, dtype=torch.bool)
    made = choice.swapped(probabilities, arriving, [spec], real, facts_of(cfg))
    assert torch.equal(made["ranked"], ranking(probabilities[None], arriving[None], cfg.router)[0])


# --- other measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [4, -5, (5, 3), None])
def test_logits(traced: Load, model_of: Load, positions: Any) -> None:
    """Whole, or the difference between two, at a column of each row."""
    tokens, mask = prompts("left")
    model, item = model_of("mixtral"), Ablate(ranks=1, pos=3)
    difference = LogitDifference(17, 90)
    arguments = dict(attention_mask=mask, positions=positions)
    whole = ablate(traced("mixtral"), tokens, [item], measure="logits", **arguments)
    found = ablate(traced("mixtral"), tokens, [item], measure=difference, **arguments)
    columns = {None: [8, 8], 4: [4, 4], -5: [4, 4], (5, 3): [5, 3]}[positions]
    with torch.no_grad():
        logits, _ = run_with_interventions(model, tokens, item, attention_mask=mask)
        clean = model(tokens, attention_mask=mask)
    there, before = logits[[0, 1], columns], clean[[0, 1], columns]
    assert_same(whole.values[0], there, tolerance=1e-5)
    assert_same(whole.clean, before, tolerance=1e-5)
    assert_same(found.values[0], there[:, 17] - there[:, 90], tolerance=1e-4)
    assert_same(found.clean, before[:, 17] - before[:, 90], tolerance=1e-4)
    frame = found.to_frame()
    assert frame["position"].tolist() == columns
    assert frame["row"].tolist() == [0, 1]
    assert frame["effect"].tolist() == found.effects[0].tolist()
    assert "logit_difference under 1 ablation, [1, 2]" in repr(found)
    with pytest.raises(ValueError, match="there are no losses"):
        _ = found.losses
    with pytest.raises(ValueError, match="logits are no table"):
        whole.to_frame()


def test_frame_of_losses(traced: Load) -> None:
    """A row for each ablation and token that has a loss."""
    tokens, mask = prompts("left")
    items = [Ablate(ranks=1, layers=0), [TopK(2), Ablate(ranks=1, layers=1)]]
    found = ablate(traced("olmoe"), tokens, items, attention_mask=mask)
    frame = found.to_frame()
    real = mask.bool()
    assert len(frame) == 2 * int((real[:, :-1] & real[:, 1:]).sum())
    for row in frame.itertuples():
        assert row.ablated == found.losses[row.ablation, row.row, row.position]
        assert row.clean == found.clean[row.row, row.position]
        assert row.effect == found.effects[row.ablation, row.row, row.position]
    assert set(frame["interventions"]) == {"Ablate(ranks=1, layers=0)", "TopK(2), Ablate(ranks=1, layers=1)"}
    assert repr(found) == "<AblationResults: loss under 2 ablations, [2, 2, 8]>"


# --- what is sent -------------------------------------------------------------------------------------------


def test_a_hundred_ablations_are_one_job(
    traced: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back are losses and counts."""
    tokens, mask = prompts("left")
    items = [
        Ablate(ranks=rank, layers=layer, pos=pos)
        for rank in (1, 2, 3, 4)
        for layer in (0, 1, 2)
        for pos in range(3, 8)
    ]
    items += [Ablate(e, layers=layer, inactive="allow") for e in range(8) for layer in (0, 1, 2)]
    items += [TopK(k, layers=layer) for k in (1, 2, 3, 5) for layer in (None, 0, 1, 2)]
    assert len(items) == 100

    def planned() -> Any:
        return plan(ablate, traced("olmoe"), tokens, items, attention_mask=mask, remote="local")

    compressed = planned().bytes_up
    monkeypatch.setattr(nnsight.CONFIG.API, "COMPRESS", False)
    with traffic() as sent:
        found = ablate(traced("olmoe"), tokens, items, attention_mask=mask, remote="local", verbose=True)
    whole = planned()
    assert found.losses.shape == (100, 2, 8)
    assert (whole.jobs, whole.passes, sent.jobs, sent.bytes_up) == (1, 101, 1, whole.bytes_up)
    n_lines = sum(len(receipt.lines) for receipt in found.receipts)
    assert whole.bytes_down == 101 * 2 * 8 * 4 + n_lines * 4 * 8
    # Compressed, most of it is the functions' source: another ablation adds a few dozen bytes.
    assert compressed < 20_000
    assert whole.bytes_up < 60_000 + 1000 * len(items)
    assert sent.bytes_down < 100_000
    assert "ablate: 1 job of 101 forward passes" in capsys.readouterr().out


def test_vectors_travel_once(traced: Load, hooked: Load, reference: Load) -> None:
    """Those that may be needed: of named experts theirs, of ranks all; of the samples, those that are drawn."""
    tokens, _ = prompts()
    of, d_model = reference("qwen2_moe"), hooked("qwen2_moe").cfg.d_model

    def sent(*items: Any) -> dict[int, list[int]]:
        job = ablate_analysis(traced("qwen2_moe"), tokens, list(items)).jobs[0]
        return {layer: list(table.shape) for layer, table in job.arguments["vectors"].items()}

    mean, resample = dict(how="mean", reference=of), dict(how="resample", reference=of)
    named = Ablate(("M1E2", "M1E3"), pos=4, inactive="allow", **mean)
    assert sent(TopK(2)) == {}
    assert sent(named) == {1: [2, d_model]}
    assert sent(named, named, Ablate("M1E3", **mean), Ablate("M1S", **mean)) == {1: [3, d_model]}
    assert sent(named, Ablate(ranks=1, layers=(1, 2), **mean)) == {1: [8, d_model], 2: [8, d_model]}
    other = Ablate("M1E2", how="mean", reference=dataclasses.replace(of))
    assert sent(named, other) == {1: [3, d_model]}
    assert sent(Ablate(0, all_but=True, layers=1, **mean)) == {1: [7, d_model]}
    assert sent(Ablate("M1E2", pos=4, **resample))[1][0] <= 2
    everywhere = sent(Ablate("M1E2", **resample), Ablate("M1E2", **resample))[1][0]
    assert everywhere == int(of.n_samples[1][2])
    job = ablate_analysis(traced("qwen2_moe"), tokens, [Ablate("M1E2", **resample)]).jobs[0]
    assert job.arguments["vectors"][1].dtype == torch.float32


# --- other precisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2_groups", "mixtral"])
def test_bfloat16(checkpoint: Callable[[str], Path], hooked: Load, variant: str) -> None:
    """As far from float32 as HookedMoE is in bfloat16, or at most twice: the roundings are other ones, and as many.

    In the last layer, so that no choice follows, at a prompt where the choices before it are not nearly tied.
    """
    exact = hooked(variant)
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    lm = traced_model(checkpoint(variant), torch.bfloat16)
    reference, k, last = reference_of(model), exact.cfg.top_k, exact.cfg.moe_layers[-1]

    @torch.no_grad()
    def gap(tokens: Tensor) -> float:
        _, cache = exact.run_with_cache(tokens, names_filter=lambda name: name.endswith("expert_weights"))
        ranked = torch.cat(list(cache.values())).sort(-1, descending=True).values
        return float((ranked[..., : k + 2] / ranked[..., 1 : k + 3]).min())

    tokens = max((prompts(seed=seed, batch=1, length=3)[0] for seed in range(60)), key=gap)
    mask = torch.ones_like(tokens)
    items = [Ablate(ranks=1, layers=last, **changes_of(how, reference)) for how in HOWS] + [
        TopK(k + 1, layers=last),
        SwapRanks(1, 2, weights="slot", layers=last),
    ]
    found = ablate(lm, tokens, items)
    in_bfloat16 = torch.stack([expected_loss(model, tokens, mask, item)[0] for item in items])
    in_float32 = torch.stack(
        [
            expected_loss(exact, tokens, mask, item)[0]
            for item in items
            if item.__dict__.get("reference") is None
        ]
    )
    same = [i for i, item in enumerate(items) if item.__dict__.get("reference") is None]
    assert found.losses.dtype == torch.float32
    theirs = (in_bfloat16[same] - in_float32).abs().max()
    ours = (found.losses[same] - in_float32).abs().max()
    assert ours < 2 * theirs + 2**-8 * in_float32.max(), (float(ours), float(theirs))
    assert (found.losses - in_bfloat16).abs().max() < 3 * theirs + 2**-8 * in_float32.max()


def test_under_autocast(traced: Load, model_of: Load, reference: Load) -> None:
    """As a server runs it: weights keep the dtype in which transformers gives them, and numbers are near."""
    tokens, mask = prompts("left")
    model = model_of("qwen2_moe_no_bias")
    items = [
        Ablate(ranks=1, layers=2, pos=6, **changes_of(how, reference("qwen2_moe_no_bias"))) for how in HOWS
    ]
    items += [Ablate("M2S", pos=4), TopK(5, layers=2)]
    plain = ablate(traced("qwen2_moe_no_bias"), tokens, items, attention_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ablate(traced("qwen2_moe_no_bias"), tokens, items, attention_mask=mask, remote="local")
        assert torch.is_autocast_enabled("cpu")
    assert found.losses.dtype == torch.float32
    assert (found.losses - plain.losses).nan_to_num().abs().median() < 0.05
    assert model.cfg.moe_layers[-1] == 2


# --- through a server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_through_a_server(
    nnsight_server: Any,
    checkpoint: Callable[[str], Path],
    model_of: Load,
    reference: Load,
    variant: str,
    trusted: bool,
) -> None:
    """A process without this package, one job; nothing of it reads a parameter."""
    lm, model = client(checkpoint(variant)), model_of(variant)
    tokens, mask = prompts("left")
    items = [item for how in HOWS for item in ablations(model, tokens, mask, how, reference(variant))]
    items += [ForceExperts(5, layers=model.cfg.moe_layers[0]), SwapRanks(1, -1), TopK(1)]
    before = len(nnsight_server.jobs())
    with nnsight_server.limits(trusted=trusted), traffic() as sent:
        assert_as_hooked_moe(lm, model, tokens, mask, items, remote=nnsight_server.url)
    assert sent.jobs == len(nnsight_server.jobs()) - before == 1
    assert next(iter(lm._module.parameters())).is_meta


def test_slots_that_come_unsorted_stay_so(traced: Load) -> None:
    """At tokens that are not touched; topk(sorted=False) happens to sort on a CPU, so no model here shows it."""
    lm, (tokens, _) = traced("olmoe"), prompts(batch=1, length=4)
    job = ablate_analysis(lm, tokens, [Ablate(ranks=1, layers=1, pos=2)]).jobs[0]
    (layer,) = job.steps[1].arguments["layers"]
    given = torch.tensor([[5, 1, 7, 0]] * 4)
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]] * 4)
    real = torch.ones(4, dtype=torch.bool)
    changed = change_layer(None, given, weights, layer["specs"], real, job.arguments["facts"], None)
    assert changed["indices"].tolist() == [[5, 1, 7, 0], [5, 1, 7, 0], [1, 0, 7, 5], [5, 1, 7, 0]]
    assert torch.equal(changed["weights"][[0, 1, 3]], weights[[0, 1, 3]])
    assert_same(changed["weights"][2], torch.tensor([0.0, 0.3, 0.2, 0.1]))

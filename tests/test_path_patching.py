"""Path patching equals full runs of transformers with edits, and what must be zero is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens.interventions import path_patching as module
from moe_lens.interventions import path_run
from moe_lens.interventions.path_patching import path_patch, path_patching_hooks
from moe_lens.interventions.path_result import RouterChange
from moe_lens.interventions.path_senders import all_senders, receiver_depth
from moe_lens.interventions.path_senders import senders_of as named_senders
from tests.families import FAMILIES, prompts, variant_config
from tests.reference import assert_same
from tests.reference_path_patching import clean_outputs, path_patched
from tests.reference_rank_shift import rank_shift_of
from tests.routing_cases import VARIANTS

Load = Callable[[str], Any]
RULES = ("attention", "routing", "all")


def a_batch(padding: str = "left") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean tokens, corrupted tokens that differ from them in two columns, their mask, and some real positions."""
    tokens, mask = prompts(padding, batch=2, length=7)
    corrupted = tokens.clone()
    for column in (3, 4):
        corrupted[:, column] = (tokens[:, column] + 17) % 100 + 10
    at = mask.bool() & torch.tensor(
        [[False, True, False, True, True, False, True], [True] * 3 + [False, True] * 2]
    )
    return tokens, corrupted, mask, at


def weighed(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A number for each row out of all logits at real positions."""
    weights = torch.randn(*mask.shape, 128, generator=torch.Generator().manual_seed(5)) * mask[..., None]
    return lambda logits: (logits * weights).sum(dim=(1, 2))


def some_senders(model: Any) -> list[str]:
    """Of every kind that the model has, first and last layers among them."""
    cfg = model.cfg
    first, last = cfg.moe_layers[0], cfg.n_layers - 1
    names = ["embed", "A0", f"A{last}", "A0H1", f"A{last}H3", "M0", f"M{last}"]
    names += [f"M{first}E{expert}" for expert in (0, 3, 5)]
    return [*names, *([f"M{first}S"] if cfg.shared else [])]


def reached(model: Any, sender: str, receiver: str) -> bool:
    return named_senders(model.cfg, sender, ["logits"])[0].depth < receiver_depth(receiver)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_edited_runs_of_transformers(hf: Load, model_of: Load, variant: str, freeze: Any) -> None:
    """Every kind of sender, under every rule, to the logits and to all routers."""
    model = model_of(variant)
    tokens, corrupted, mask, at = a_batch("left" if freeze == "attention" else "right")
    routers, metric = [f"M{layer}" for layer in model.cfg.moe_layers], weighed(mask)
    got = path_patch(
        model,
        tokens,
        corrupted,
        some_senders(model),
        receiver=["logits", *routers],
        freeze=freeze,
        positions=at,
        attention_mask=mask,
        metric=metric,
        keep_router_logits=True,
    )
    clean = clean_outputs(hf(variant), tokens, mask)
    assert got.freeze == freeze
    assert got.effect is not None
    assert got.clean_metric is not None
    assert_same(got.clean_metric, metric(clean.logits), "clean metric")
    assert got.null_change < 1e-4
    moved = 0
    for index, sender in enumerate(got.senders):
        expected = path_patched(hf(variant), tokens, corrupted, mask, sender, freeze, at)
        effect = metric(expected.logits) - metric(clean.logits)
        torch.testing.assert_close(
            got.effect[index], effect, rtol=1e-3, atol=1e-3, msg=lambda m, s=sender: f"{s}: {m}"
        )
        moved += int(effect.abs().max() > 0.1)
        for layer, router in zip(model.cfg.moe_layers, routers, strict=True):
            change = got.router_logit_changes[router][index]
            assert bool(change[~at].isnan().all())
            if not reached(model, sender, router):
                assert bool(change.isnan().all())
                continue
            expected_change = expected.router_logits[layer] - clean.router_logits[layer]
            torch.testing.assert_close(
                change[at],
                expected_change[at],
                rtol=1e-3,
                atol=2e-5,
                msg=lambda m, s=sender, r=router: f"{s} {r}: {m}",
            )
            # Nothing goes on to another position, or it would be missed.
            assert float(expected_change[~at & mask.bool()].abs().max()) < 1e-5
    assert moved > len(got.senders) / 2


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_few_senders_equal_edited_runs(hf: Load, model_of: Load, variant: str) -> None:
    """The quick part of the above, at all positions, and by the cache of the corrupted run."""
    model = model_of(variant)
    tokens, corrupted, mask, _ = a_batch("right")
    last = f"M{model.cfg.moe_layers[-1]}"
    senders = ["A0H2", f"M{model.cfg.moe_layers[0]}E3", "M0"]
    names = path_patching_hooks(model, senders, ["logits", last])
    _, cache = model.run_with_cache(corrupted, attention_mask=mask, names_filter=names)
    metric, common = weighed(mask), dict(receiver=("logits", last), freeze="routing", attention_mask=mask)
    by_cache = path_patch(model, tokens, cache, senders, metric=metric, keep_router_logits=True, **common)
    by_tokens = path_patch(model, tokens, corrupted, senders, metric=metric, **common)
    assert by_cache.effect is not None
    assert torch.equal(by_cache.effect, by_tokens.effect)
    assert torch.equal(by_cache.positions, mask.bool())
    clean = clean_outputs(hf(variant), tokens, mask)
    for index, sender in enumerate(senders):
        expected = path_patched(hf(variant), tokens, corrupted, mask, sender, "routing", mask)
        effect = metric(expected.logits) - metric(clean.logits)
        torch.testing.assert_close(by_cache.effect[index], effect, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("freeze", RULES)
@pytest.mark.parametrize("kind", ["heads", "experts", "layers"])
def test_the_clean_values_change_nothing(model_of: Load, kind: str, freeze: Any) -> None:
    model = model_of("deepseek_v2")
    tokens, _, mask, _ = a_batch()
    got = path_patch(
        model,
        tokens,
        tokens,
        kind,
        receiver=["logits", "M1"],
        freeze=freeze,
        attention_mask=mask,
        metric=weighed(mask),
        keep_router_logits=True,
    )
    assert got.effect is not None
    assert not bool(got.effect.any())
    assert not bool(got.changed.any())
    change = got.router_logit_changes["M1"]
    assert not bool(change[~change.isnan()].any())
    before = [i for i, name in enumerate(got.senders) if reached(model, name, "M1")]
    overlap, variance = (
        of[before][:, mask.bool()] for of in (got.routers["M1"].overlap, got.routers["M1"].variance)
    )
    assert bool((overlap == 1).all())
    assert bool((variance == 0).all())


@pytest.mark.parametrize("freeze", RULES)
def test_what_is_run_is_no_different_from_what_is_skipped(model_of: Load, freeze: Any) -> None:
    """Replacing by a value a rounding away, so that everything is run, changes nothing beyond rounding."""
    model = model_of("qwen2_moe")
    tokens, _, mask, _ = a_batch()
    senders = ["embed", "A0", "A1H1", "M0", "M0E2", "M1S"]
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, names_filter=path_patching_hooks(model, senders)
    )
    nearly = {name: v if v.dtype == torch.long else v * (1 + 1e-6) for name, v in cache.items()}
    got = path_patch(model, tokens, nearly, senders, freeze=freeze, attention_mask=mask, metric=weighed(mask))
    assert got.effect is not None
    assert bool(got.changed.any(dim=2).any(dim=1).all())
    assert 0 < float(got.effect.abs().max()) < 1e-2


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups", "qwen2_moe", "mixtral"])
def test_the_direct_path_is_linear_up_to_the_scale(model_of: Load, variant: str) -> None:
    """With everything frozen, scale times value changes by the readout of what was replaced: routers and logits."""
    from moe_lens.routing.readout import router_readout

    model = model_of(variant)
    tokens, corrupted, mask, at = a_batch()
    head, expert = "A0H1", f"M{model.cfg.moe_layers[0]}E3"
    last = model.cfg.moe_layers[-1]
    kept: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        kept.append(logits[at])
        return logits.new_zeros(())

    got = path_patch(
        model,
        tokens,
        corrupted,
        [head, expert],
        receiver=["logits", f"M{last}"],
        freeze="all",
        positions=at,
        attention_mask=mask,
        metric=keep,
        keep_router_logits=True,
    )
    with torch.no_grad():
        model.set_use_attn_result(True)
        runs = [model.run_with_cache(t, attention_mask=mask)[1] for t in (tokens, corrupted)]
        model.set_use_attn_result(False)

    def expert_output(cache: Any) -> Tensor:
        mlp = f"blocks.{model.cfg.moe_layers[0]}.mlp"
        chosen = cache[f"{mlp}.hook_expert_indices"] == 3
        return (cache[f"{mlp}.hook_expert_contrib"] * chosen[..., None]).sum(dim=2)

    clean = runs[0]
    differences = [
        runs[1]["blocks.0.attn.hook_result"][:, :, 1] - clean["blocks.0.attn.hook_result"][:, :, 1],
        expert_output(runs[1]) - expert_output(clean),
    ]
    for i, difference in enumerate(differences):
        for stream, readout, before, after in (
            (
                clean[f"blocks.{last}.hook_resid_mid"][at],
                router_readout(model, last),
                clean[f"blocks.{last}.mlp.hook_router_logits"][at],
                got.router_logit_changes[f"M{last}"][i][at]
                + clean[f"blocks.{last}.mlp.hook_router_logits"][at],
            ),
            (
                clean[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][at],
                (model.W_U.T * model.ln_final.w).detach(),
                kept[0],
                kept[1 + i],
            ),
        ):
            scale, new = (
                (x.square().mean(dim=-1, keepdim=True) + model.cfg.eps).sqrt()
                for x in (stream, stream + difference[at])
            )
            linear = difference[at] @ readout.T
            assert float(linear.abs().max()) > 0.01
            torch.testing.assert_close(after * new - before * scale, linear, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["olmoe_bias_odd_width", "qwen2_moe", "deepseek_v2"])
def test_the_parts_of_a_component_make_the_component(model_of: Load, variant: str) -> None:
    """What the heads of a layer change, each alone, sums to what the layer changes; so with experts."""
    model = model_of(variant)
    tokens, corrupted, mask, at = a_batch()
    layer = model.cfg.moe_layers[0]
    parts = {
        f"A{layer}": [f"A{layer}H{head}" for head in range(4)],
        f"M{layer}": [*(f"M{layer}E{e}" for e in range(8)), *([f"M{layer}S"] if model.cfg.shared else [])],
    }
    with torch.no_grad():
        clean, other = (
            model.run_with_cache(t, attention_mask=mask)[1].cache_dict for t in (tokens, corrupted)
        )
        at_places = [{n: v[at] for n, v in run.items() if v.shape[:2] == at.shape} for run in (clean, other)]

        def difference(name: str) -> Tensor:
            (sender,) = named_senders(model.cfg, name, ["logits"])
            return sender.replaced(model, *at_places) - at_places[0][sender.written_at]

        for component, names in parts.items():
            whole = difference(component)
            assert float(whole.abs().max()) > 0.1
            torch.testing.assert_close(sum(map(difference, names)), whole, rtol=1e-4, atol=1e-5)


def test_router_measures_are_those_of_the_changes(hf: Load, model_of: Load) -> None:
    """Variance of the change, and ranks, choice and weights of the changed logits, by sorted lists."""
    model, config = model_of("deepseek_v2_groups"), variant_config("deepseek_v2_groups")
    tokens, corrupted, mask, at = a_batch()
    got = path_patch(
        model,
        tokens,
        corrupted,
        ["A0", "M0E1"],
        receiver="M1",
        positions=at,
        attention_mask=mask,
        keep_router_logits=True,
    )
    assert got.effect is None
    assert got.clean_metric is None
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, names_filter="blocks.1.mlp.hook_router_logits"
    )
    logits = cache["blocks.1.mlp.hook_router_logits"].detach()
    frame = got.to_frame().set_index("sender")
    for i, sender in enumerate(got.senders):
        expected = []
        for row, column in at.nonzero().tolist():
            change = got.router_logit_changes["M1"][i, row, column]
            shift = rank_shift_of(logits[row, column].tolist(), (-change).tolist(), config)
            expected.append([float(change.double().var(correction=0)), *shift])
            measured = [float(of[i, row, column]) for of in got.routers["M1"]]
            np.testing.assert_allclose(measured, expected[-1], rtol=1e-4, atol=1e-6)
        for of in got.routers["M1"]:
            assert bool(of[i][~at].isnan().all())
        np.testing.assert_allclose(
            frame.loc[sender, list(RouterChange._fields)].astype(float), np.mean(expected, axis=0), rtol=1e-4
        )
    assert frame["overlap"].min() < 1


def test_frame_and_map(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens, corrupted, mask, _ = a_batch()
    metric = weighed(mask)
    got = path_patch(
        model, tokens, corrupted, "heads", receiver=["logits", "M1"], attention_mask=mask, metric=metric
    )
    frame = got.to_frame()
    assert list(got.senders) == [f"A{layer}H{head}" for layer in range(3) for head in range(4)]
    assert got.effect is not None
    assert got.effect.shape == (12, 2)
    assert (frame.receiver == "logits").sum() == 12
    assert (frame.receiver == "M1").sum() == 8
    assert set(frame[frame.receiver == "M1"].sender.str[:2]) == {"A0", "A1"}
    assert frame.replaced.eq(int(mask.sum())).all()
    np.testing.assert_array_equal(frame[frame.receiver == "logits"].changed, got.changed.sum(dim=(1, 2)))
    assert not bool((got.changed & ~got.positions).any())
    effect = got.effect.double()
    logits = frame[frame.receiver == "logits"]
    np.testing.assert_allclose(logits.effect, effect.mean(dim=1), rtol=1e-6)
    np.testing.assert_allclose(logits.standard_error, effect.std(dim=1) / 2**0.5, rtol=1e-6)
    assert logits.variance.isna().all()
    values, errors = got.head_map()
    np.testing.assert_allclose(values, effect.mean(dim=1).view(3, 4))
    np.testing.assert_allclose(errors, (effect.std(dim=1) / 2**0.5).view(3, 4))
    variance, _ = got.head_map("variance")
    assert np.isnan(variance[2]).all()
    np.testing.assert_allclose(variance[:2].ravel(), frame[frame.receiver == "M1"].variance)
    with pytest.raises(ValueError, match="there is no 'size'"):
        got.head_map("size")
    with pytest.raises(ValueError, match="there is no router 'M2' here; there are M1"):
        got.head_map("variance", "M2")
    one = path_patch(
        model, tokens, corrupted, "A0H0", attention_mask=mask, metric=lambda logits: metric(logits).sum()
    )
    assert one.effect is not None
    assert one.effect.shape == (1,)
    assert float(one.effect) == pytest.approx(float(got.effect[0].sum()), rel=1e-4)
    assert np.isnan(one.to_frame().standard_error[0])


def test_all_of_a_kind(model_of: Load) -> None:
    cfg = model_of("deepseek_v2").cfg
    names = lambda senders, receiver: [s.name for s in named_senders(cfg, senders, [receiver])]  # noqa: E731
    assert names("layers", "logits") == ["embed", "A0", "M0", "A1", "M1", "A2", "M2"]
    assert names("layers", "M1") == ["embed", "A0", "M0", "A1"]
    assert names("experts", "M2") == [*(f"M1E{i}" for i in range(8)), "M1S"]
    assert names("heads", "M1") == [f"A{layer}H{head}" for layer in range(2) for head in range(4)]
    assert len({sender.name for sender in all_senders(cfg)}) == len(all_senders(cfg))
    with pytest.raises(ValueError, match="there are no experts before M1"):
        named_senders(cfg, "experts", ["M1"])


def test_senders_one_by_one_and_together(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many are run at once changes nothing beyond rounding, nor does the order in which they are given."""
    model = model_of("qwen3_moe")
    tokens, corrupted, mask, _ = a_batch()
    senders = ["M1E0", "A0H1", "M0E1", "A0H0", "M1E4", "A2", "embed"]
    common = dict(receiver=["logits", "M2"], attention_mask=mask, metric=weighed(mask))
    together = path_patch(model, tokens, corrupted, senders, **common)
    monkeypatch.setattr(module, "_MOST_PAIRS", 3)
    small = path_patch(model, tokens, corrupted, sorted(senders), **common)
    frames = [got.to_frame().set_index(["sender", "receiver"]).sort_index() for got in (together, small)]
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-3, atol=1e-4)


def test_columns(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens, corrupted, mask, _ = a_batch("left")
    common = dict(senders=["A1", "M0"], attention_mask=mask, metric=weighed(mask))
    last = path_patch(model, tokens, corrupted, positions=-1, **common)
    assert last.positions.nonzero()[:, 1].tolist() == [6, 6]
    each = path_patch(model, tokens, corrupted, positions=[6, -1], **common)
    assert torch.equal(last.effect, each.effect)  # type: ignore[arg-type]
    nowhere = path_patch(model, tokens, corrupted, positions=[1, 3], **common)
    # Row 0 of the prompts is real from column 1 on, and differs from column 3 on.
    assert not bool(nowhere.changed[:, 0].any())
    assert bool(nowhere.changed[0, 1, 3])


def test_a_metric_may_be_a_view_of_the_logits_or_of_another_dtype(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens, corrupted, mask, _ = a_batch("left")
    common = dict(senders="layers", attention_mask=mask)
    copied = path_patch(model, tokens, corrupted, metric=lambda logits: logits[:, -1, 5].clone(), **common)
    view = path_patch(model, tokens, corrupted, metric=lambda logits: logits[:, -1, 5], **common)
    assert copied.effect is not None
    assert view.effect is not None
    assert torch.equal(copied.effect, view.effect)
    assert len(copied.effect.abs().unique()) > 6
    double = path_patch(model, tokens, corrupted, metric=lambda x: x[:, -1, 5].double() * 1e12 + 1, **common)
    assert double.effect is not None
    assert double.effect.dtype == torch.float64


def test_half_precision_runs(checkpoint: Load) -> None:
    """Small changes are rounding there, and the result says how small."""
    from moe_lens import HookedMoE

    model = HookedMoE.from_pretrained(checkpoint("olmoe_bf16"), device="cpu", verbose=False)
    tokens, corrupted, mask, _ = a_batch()
    for freeze in RULES:
        got = path_patch(
            model, tokens, corrupted, "layers", freeze=freeze, attention_mask=mask, metric=weighed(mask)
        )
        assert got.effect is not None
        assert bool(got.effect.isfinite().all())
        assert got.null_change < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "mlp"}, "freeze='mlp' must be one of 'attention', 'routing', 'all'"),
        ({"senders": "A3"}, r"there is no sender 'A3'; .* has embed, A0\.\.A2, A0H0\.\.A2H3, M0\.\.M2"),
        ({"senders": "A01"}, "there is no sender 'A01'"),
        ({"senders": "A0H4"}, "there is no sender 'A0H4'"),
        ({"senders": "M0E1"}, "there is no sender 'M0E1'.*layers with experts: 1, 2"),
        ({"senders": "M0S"}, "there is no sender 'M0S'"),
        ({"senders": "M1E8"}, "there is no sender 'M1E8'"),
        ({"senders": ["A0", 3]}, "there is no sender 3"),
        ({"senders": []}, "the sequence is empty"),
        ({"senders": ["A0", "M1", "A0"]}, "the sender A0 comes twice"),
        ({"senders": "M1", "receiver": "M1", "metric": None}, "the sender M1 comes after M1"),
        ({"receiver": "M0", "metric": None}, "there is no receiver 'M0'; .* has logits, M1, M2"),
        ({"receiver": [], "metric": None}, "receivers must be named"),
        ({"receiver": ["M1", "M1"], "metric": None}, "each once"),
        ({"receiver": "M1"}, "receiver='M1' does not go with metric="),
        ({"metric": None}, "receiver='logits' needs metric="),
        ({"positions": 0}, "row 0: .* position 0 is padding"),
        ({"positions": [3]}, "1 columns for 2 rows"),
        ({"positions": 9}, "there is no position 9"),
        (
            {"positions": torch.ones(2, 7, dtype=torch.bool)},
            "row 0: position 0 of the mask positions is padding",
        ),
        ({"positions": torch.zeros(2, 7, dtype=torch.bool)}, "selects no position"),
        (
            {"positions": torch.ones(2, 6, dtype=torch.bool)},
            r"the mask positions is \[2, 6\], and the tokens are \[2, 7\]",
        ),
        (
            {"corrupted_cache_or_tokens": torch.ones(2, 6, dtype=torch.long)},
            "attention_mask|must have the clean",
        ),
    ],
)
def test_bad_input_raises_before_anything_runs(
    model_of: Load, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    model = model_of("deepseek_v2")
    tokens, corrupted, mask, _ = a_batch()
    arguments: dict[str, Any] = dict(
        tokens=tokens,
        corrupted_cache_or_tokens=corrupted,
        senders="A0",
        attention_mask=mask,
        metric=weighed(mask),
    )
    monkeypatch.setattr(path_run, "values_at", lambda *_: pytest.fail("the model ran"))
    monkeypatch.setattr(module, "values_at", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        path_patch(model, **(arguments | changes))


def test_other_refusals(model_of: Load) -> None:
    model = model_of("mixtral")
    tokens, corrupted, mask, _ = a_batch()
    metric = weighed(mask)
    _, cache = model.run_with_cache(corrupted, attention_mask=mask, names_filter="hook_embed")
    with pytest.raises(KeyError, match=r"the corrupted cache lacks blocks\.0\.attn\.hook_z"):
        path_patch(model, tokens, cache, "A0H1", attention_mask=mask, metric=metric)
    with pytest.raises(ValueError, match=r"of the clean tokens' shape \(2, 7\); its hook_embed is \(1, 7"):
        path_patch(
            model,
            tokens,
            {"hook_embed": cache["hook_embed"][:1]},
            "embed",
            attention_mask=mask,
            metric=metric,
        )
    with pytest.raises(ValueError, match=r"one number, or one for each of 2 rows, not a tensor \(2, 7\)"):
        path_patch(model, tokens, corrupted, "A0", attention_mask=mask, metric=lambda logits: logits[..., 0])
    calls: list[int] = []

    def nan_at_last(logits: Tensor) -> Tensor:
        calls.append(1)
        return metric(logits) * (torch.nan if len(calls) == 3 else 1)

    with pytest.raises(ValueError, match="the metric is NaN in the patch of A1"):
        path_patch(model, tokens, corrupted, ["A0", "A1"], attention_mask=mask, metric=nan_at_last)
    with pytest.raises(ValueError, match="the metric changes the logits in place"):
        path_patch(model, tokens, corrupted, "A0", attention_mask=mask, metric=lambda x: x.relu_().mean())
    infinite = {"hook_embed": torch.full_like(cache["hook_embed"], torch.inf)}
    with pytest.raises(ValueError, match="logits of the router M1 are not finite in the patch of embed"):
        path_patch(model, tokens, infinite, "embed", receiver="M1", attention_mask=mask)
    with (
        model.hooks([("hook_embed", lambda value, hook: None)]),
        pytest.raises(ValueError, match="it carries some"),
    ):
        path_patch(model, tokens, corrupted, "A0", attention_mask=mask, metric=metric)
    with pytest.raises(RuntimeError, match="routing was to be held"):
        _with_a_deaf_router(model, tokens, corrupted, mask, metric)


def _with_a_deaf_router(model: Any, tokens: Tensor, corrupted: Tensor, mask: Tensor, metric: Any) -> None:
    """A layer whose routing never asks its hook point would run by a choice of its own."""
    mlp = model.blocks[1].mlp
    route = mlp.route
    n_runs = 0

    def deaf(x: Tensor) -> Any:
        nonlocal n_runs
        n_runs += 1
        if n_runs <= 1:  # the clean run is as it should be
            return route(x)
        logits = mlp.router(x).float().softmax(dim=-1)
        weights, indices = logits.topk(2, dim=-1)
        return indices, weights

    mlp.route = deaf
    try:
        path_patch(model, tokens, corrupted, "A0", freeze="routing", attention_mask=mask, metric=metric)
    finally:
        del mlp.route

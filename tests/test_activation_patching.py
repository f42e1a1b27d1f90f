"""Activation patching at every hook point, against the same patches written number by number into the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import patching

from moe_lens import HookedMoE
from moe_lens.interventions.activation_patching import PatchResults, activation_patch, patch_hooks
from moe_lens.interventions.patch_sites import AXES, experts_differ
from tests.families import FAMILIES, prompts
from tests.reference import Cache, reference_cache, reference_logits
from tests.reference_patching import axes_of, kind_of, names_of, patched_logits

LENGTH = 6
CONTRIB, INDICES = "mlp.hook_expert_contrib", "mlp.hook_expert_indices"


@dataclass
class Pair:
    """A clean and a corrupted batch, padded alike, in both implementations."""

    model: HookedMoE
    hf: Any
    clean: Tensor
    corrupted: Tensor
    mask: Tensor
    clean_cache: Any
    reference: Cache

    def metric(self, logits: Tensor) -> Tensor:
        """A number that every logit at every real token moves: a fixed random combination of them."""
        weights = torch.randn(*logits.shape, generator=torch.Generator().manual_seed(5))
        return (logits * weights)[self.mask.bool()].sum() / 10

    def patch(self, activation: str, over: Any, values: Any = None, **options: Any) -> PatchResults:
        return activation_patch(
            self.model,
            self.corrupted,
            self.clean_cache if values is None else values,
            options.pop("metric", self.metric),
            activation,
            over=over,
            attention_mask=self.mask,
            **options,
        )

    @torch.no_grad()
    def needed(self, activation: str, over: Any, layers: Any = None) -> Any:
        """A clean cache of what a patch reads, of a run that nobody else listens to."""
        names = patch_hooks(self.model, activation, over=over, layers=layers)
        return self.model.run_with_cache(self.clean, attention_mask=self.mask, names_filter=names)[1]

    def expected(self, activation: str, cell: dict[str, int]) -> Tensor:
        logits = patched_logits(self.hf, self.corrupted, self.mask, self.reference, activation, cell)
        return self.metric(logits)

    def check(self, results: PatchResults, every: int = 1) -> None:
        """Every cell (or every n-th) is the reference's; and some of them are moved."""
        frame = results.to_frame()
        assert len(frame) == results.values.numel()
        for i in range(0, len(frame), every):
            cell = {axis: int(frame[axis][i]) for axis in results.axes}
            expected = self.expected(results.activation, cell)
            message = f"{results.activation} at {cell}"
            torch.testing.assert_close(
                results.values.flatten()[i],
                expected,
                rtol=2e-5,
                atol=5e-5,
                msg=lambda m, at=message: f"{at}: {m}",
            )
        assert (frame["effect"].abs() > 1e-3).any(), "these patches change too little to be told from nothing"


@pytest.fixture(scope="module")
def pair(hooked: Callable[[str], Any], hf: Callable[[str], Any]) -> Callable[..., Pair]:
    @cache
    @torch.no_grad()
    def make(variant: str, padding: str = "left", length: int = LENGTH) -> Pair:
        model = hooked(variant)
        clean, mask = prompts(padding, seed=1, length=length)
        corrupted, _ = prompts(padding, seed=2, length=length)
        corrupted[:, : length - 3] = clean[:, : length - 3]  # so that there is a part before they differ
        model.set_use_attn_result(True)
        _, clean_cache = model.run_with_cache(clean, attention_mask=mask)
        model.set_use_attn_result(False)
        reference = reference_cache(hf(variant), clean, mask)
        return Pair(model, hf(variant), clean, corrupted, mask, clean_cache, reference)

    return make


# --- every hook point ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_point_has_its_axes(pair: Any, variant: str) -> None:
    for name, value in pair(variant).reference.items():
        axes = ("batch", *AXES[kind_of(name)])
        assert len(axes) == value.ndim
        assert [axis or "one" for axis in axes] == axes_of(kind_of(name))
        assert all((axis is None) == (length == 1) for axis, length in zip(axes, value.shape, strict=True))
    assert set(pair(variant).reference) == set(pair(variant).model.hook_dict)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_point_layer_by_layer(model_of: Any, pair: Any, variant: str) -> None:
    """The whole activation of one layer, and that of all layers together; global points whole."""
    p = pair(variant)
    model_of(variant)
    for activation in sorted({kind_of(name) for name in p.model.hook_dict}):
        whole = p.patch(activation, ())
        assert whole.axes == ()
        torch.testing.assert_close(whole.values, p.expected(activation, {}), rtol=2e-5, atol=5e-5)
        if activation not in p.model.hook_dict:
            layers = p.patch(activation, ("layer",))
            assert layers.labels["layer"] == tuple(
                int(name.split(".")[1]) for name in names_of(p.reference, activation, {})
            )
            p.check(layers)


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_point_is_a_hook_by_hand(pair: Any, variant: str) -> None:
    """One position of each single point: `run_with_hooks` gives the same number."""
    p = pair(variant, "none")
    for name in p.model.hook_dict:

        def edit(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            at = (slice(None),) * hook.pos_dim + (LENGTH - 2,)
            value[at] = p.clean_cache[hook.name][at]
            return value

        with torch.no_grad():
            expected = p.metric(p.model.run_with_hooks(p.corrupted, fwd_hooks=[(name, edit)]))
        layers = None if name == kind_of(name) else [int(name.split(".")[1])]
        got = p.patch(kind_of(name), ("pos",), layers=layers, positions=LENGTH - 2)
        assert got.labels == {"pos": (LENGTH - 2,)}
        torch.testing.assert_close(got.values[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", FAMILIES)
def test_patching_the_whole_stream_gives_the_clean_run(pair: Any, variant: str) -> None:
    p = pair(variant)
    clean, corrupted = (
        float(p.metric(reference_logits(p.hf, tokens, p.mask))) for tokens in (p.clean, p.corrupted)
    )
    assert abs(clean - corrupted) > 0.1
    for activation in ("hook_embed", "ln_final.hook_normalized"):
        result = p.patch(activation, ())
        assert float(result.values) == pytest.approx(clean, abs=5e-5)
        assert result.baseline == pytest.approx(corrupted, abs=5e-5)
    for activation in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        by_layer = p.patch(activation, "layer")
        torch.testing.assert_close(
            by_layer.values, torch.full_like(by_layer.values, clean), rtol=0, atol=5e-5
        )


# --- axes ---------------------------------------------------------------------------------------------------

CUTS = (
    ("hook_resid_pre", ("layer", "pos")),
    ("hook_resid_mid", ("pos",)),
    ("hook_mlp_out", ("batch", "layer")),
    ("attn.hook_z", ("pos", "layer", "head")),
    ("attn.hook_k", ("head", "layer")),
    ("attn.hook_v", ("layer", "head")),
    ("attn.hook_result", ("head", "pos")),
    ("attn.hook_pattern", ("head", "pos")),
    ("attn.hook_pattern", ("pos", "key")),
    ("attn.hook_attn_scores", ("key",)),
    ("mlp.hook_router_logits", ("layer", "expert")),
    ("mlp.hook_router_logits", ("layer", "pos")),
    ("mlp.hook_expert_weights", ("expert", "pos")),
    ("mlp.hook_routing_weights", ("layer", "slot")),
    ("mlp.hook_expert_out", ("slot", "pos")),
    ("mlp.hook_expert_contrib", ("slot", "layer")),
    ("mlp.hook_expert_post", ("neuron",)),
    ("ln2.hook_scale", ("layer", "pos")),
    ("ln_final.hook_scale", ("pos",)),
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAMILIES)
def test_one_index_at_a_time(pair: Any, variant: str) -> None:
    p = pair(variant)
    for activation, over in CUTS:
        results = p.patch(activation, over)
        assert results.axes == over
        assert list(results.values.shape) == [len(results.labels[axis]) for axis in over]
        p.check(results, every=max(1, results.values.numel() // 5 | 1))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_experts_by_identity(pair: Any, variant: str, padding: str) -> None:
    """An expert active in one run alone, in both in other slots, in neither: all are met, all are exact."""
    p = pair(variant, padding)
    results = p.patch(CONTRIB, ("layer", "expert"))
    assert results.values.shape == (len(p.model.cfg.moe_layers), p.model.cfg.n_experts)
    p.check(results)
    over = ("layer", "pos", "expert")
    cells = p.patch(CONTRIB, over, p.needed(CONTRIB, over))
    p.check(cells, every=11)

    corrupted = reference_cache(p.hf, p.corrupted, p.mask)
    met, n_active = set(), 0
    frame = cells.to_frame().set_index(list(over))
    for layer, column, expert in product(*(cells.labels[axis] for axis in over)):
        at = f"blocks.{layer}.{INDICES}"
        active = {
            (expert in p.reference[at][row, column], expert in corrupted[at][row, column])
            for row in range(2)
            if p.mask[row, column]
        }
        met |= active
        n_active += active != {(False, False)}
        if active == {(False, False)}:
            assert frame["effect"][layer, column, expert] == 0
    assert met == set(product((False, True), repeat=2))
    assert cells.n_runs <= n_active < cells.values.numel()

    together = p.patch(CONTRIB, ("expert",))
    p.check(together, every=3)


def test_experts_that_add_the_same_vector_are_others() -> None:
    """Slots are matched by expert: the same numbers by another expert are another contribution."""
    vectors = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mine, its = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 2]]])
    differ = experts_differ((vectors, vectors), (mine, its), 4)
    assert differ.flatten().tolist() == [False, True, True, False]
    differ = experts_differ((vectors, vectors.flip(2)), (mine, mine.flip(2)), 4)
    assert not differ.any()


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_clean_run_s_choice(pair: Any, variant: str) -> None:
    """Its experts, with weights of the corrupted run's probabilities."""
    p = pair(variant)
    p.check(p.patch(INDICES, ("layer", "pos")))
    layer = p.model.cfg.moe_layers[0]
    seen: Cache = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[kind_of(hook.name)] = value

    names = [f"blocks.{layer}.mlp.{point}" for point in ("hook_expert_weights", "hook_routing_weights")]
    with p.model.hooks(fwd_hooks=[(name, keep) for name in names]):
        p.patch(INDICES, (), layers=layer)
    choice = p.clean_cache[f"blocks.{layer}.{INDICES}"]
    read = seen["mlp.hook_expert_weights"].gather(-1, choice)
    applied = seen["mlp.hook_routing_weights"]
    factor = (applied / read)[p.mask.bool()]
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))


# --- positions and padding ----------------------------------------------------------------------------------


def test_padding_is_not_patched(pair: Any) -> None:
    """Columns without a real token have no entry; elsewhere only real rows change."""
    p = pair("qwen2_moe", "left")
    assert not p.mask[:, 0].any()
    assert p.mask[:, 1].tolist() == [1, 0]
    seen: list[Tensor] = []
    with p.model.hooks(
        fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: seen.append(value.clone()))]
    ):
        results = p.patch("hook_resid_pre", ("layer", "pos"))
    assert results.labels["pos"] == tuple(range(1, LENGTH))
    assert results.values.isfinite().all()
    assert len(seen) == results.n_runs + 1
    assert all(torch.equal(value[~p.mask.bool()], seen[0][~p.mask.bool()]) for value in seen)
    p.check(results)


def test_positions(pair: Any) -> None:
    p = pair("olmoe", "left")
    full = p.patch("attn.hook_z", ("pos", "head"))
    both = torch.zeros(2, LENGTH, dtype=torch.bool)
    both[:, -2:] = True
    some = p.patch("attn.hook_z", ("pos", "head"), positions=both)
    assert some.labels["pos"] == (LENGTH - 2, LENGTH - 1)
    assert torch.equal(some.values, full.values[-2:])
    place = torch.zeros(2, LENGTH, dtype=torch.bool)
    place[0, LENGTH - 1] = True
    one = p.patch("hook_resid_mid", ("layer",), positions=place)
    rows = p.patch("hook_resid_mid", ("batch", "layer", "pos"))
    assert torch.equal(one.values, rows.values[0, :, -1])
    assert not torch.equal(rows.values[0, :, -1], rows.values[1, :, -1])
    # Columns are one for each row, as everywhere in interventions.
    each = torch.zeros(2, LENGTH, dtype=torch.bool)
    each[0, LENGTH - 1], each[1, LENGTH - 2] = True, True
    expected = p.patch("hook_resid_mid", ("layer",), positions=each)
    for columns in ([-1, LENGTH - 2], torch.tensor([-1, LENGTH - 2]), np.array([-1, -2])):
        given = p.patch("hook_resid_mid", ("layer",), positions=columns, layers=np.int64(1))
        assert torch.equal(given.values, expected.values[1:2])


def test_what_changes_nothing_needs_no_run(pair: Any) -> None:
    """Where the inputs are the same, and where a query sees no key, the value is the baseline itself."""
    p = pair("mixtral", "none")
    results = p.patch("hook_embed", ("pos",))
    baseline = results.values.new_tensor(results.baseline)
    assert (results.values[: LENGTH - 3] == baseline).all()
    assert (results.values[LENGTH - 3 :] != baseline).all()
    assert results.n_runs == 3
    pattern = p.patch("attn.hook_pattern", ("pos", "key"), layers=1)
    baseline = results.values.new_tensor(pattern.baseline)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert (pattern.values[~seen] == baseline).all()
    assert (pattern.values[LENGTH - 3 :][seen[LENGTH - 3 :]] != baseline).all()
    assert 15 <= pattern.n_runs <= int(seen.sum())


# --- beside others ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_as_transformer_lens_patches(pair: Any) -> None:
    p = pair("olmoe", "none")
    expected = patching.get_act_patch_attn_head_out_by_pos(p.model, p.corrupted, p.clean_cache, p.metric)
    torch.testing.assert_close(p.patch("attn.hook_z", ("layer", "pos", "head")).values, expected)


def test_other_hooks_act_and_stay(model_of: Any, pair: Any) -> None:
    """A hook that is on the model is part of both runs, and is still there afterwards."""
    p, model = pair("qwen3_moe"), model_of("qwen3_moe")
    plain = p.patch("attn.hook_z", ("layer",))
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: 0 * value)]):
        changed = p.patch("attn.hook_z", ("layer",))
        again = p.patch("attn.hook_z", ("layer",))
    assert abs(changed.baseline - plain.baseline) > 1e-3
    assert torch.equal(changed.values, again.values)


def test_nothing_carries_a_gradient(pair: Any) -> None:
    p = pair("olmoe")
    seen: list[bool] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits.requires_grad)
        return p.metric(logits)

    assert not p.patch("attn.hook_z", ("layer",), metric=metric).values.requires_grad
    assert len(seen) == 4
    assert not any(seen)


def test_a_cache_of_what_is_needed_is_enough(pair: Any) -> None:
    p = pair("deepseek_v2")
    assert patch_hooks(p.model, "hook_embed") == ["hook_embed"]
    for activation, over in (("attn.hook_z", ("layer", "head")), (CONTRIB, ("layer", "expert"))):
        names = patch_hooks(p.model, activation, over=over, layers=[2])
        assert len(names) == (2 if activation == CONTRIB else 1)
        few = p.needed(activation, over, [2])
        assert set(few) == set(names)
        got = p.patch(activation, over, few, layers=[2])
        torch.testing.assert_close(got.values, p.patch(activation, over, layers=[2]).values)
        with pytest.raises(KeyError, match=r"blocks\.[01]\..*patch_hooks"):
            p.patch(activation, over, few)


def test_frame(pair: Any) -> None:
    p = pair("deepseek_v2")
    results = p.patch("mlp.hook_router_logits", ("expert", "layer"))
    frame = results.to_frame()
    assert list(frame) == ["expert", "layer", "value", "effect"]
    assert results.labels["layer"] == p.model.cfg.moe_layers
    row = frame[(frame["expert"] == 5) & (frame["layer"] == 2)].iloc[0]
    assert row["value"] == float(results.values[5, 1])
    assert row["effect"] == row["value"] - results.baseline
    assert "8 expert x 2 layer" in repr(results)
    whole = p.patch("hook_embed", ())
    assert list(whole.to_frame().columns) == ["value", "effect"]
    assert len(whole.to_frame()) == 1


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "options", "message"),
    [
        ("attn.hook_x", {}, r"attn\.hook_x.*nearest.*attn\.hook_"),
        ("z", {}, "no hook point within a block"),
        ("blocks.1.attn.hook_z", {}, r"activation='attn\.hook_z' and layers=\[1\]"),
        ("attn.hook_z", {"over": ("layer", "expert")}, "along layer, batch, pos, head, d_head"),
        ("hook_embed", {"over": ("layer",)}, "along batch, pos, d_model"),
        ("attn.hook_z", {"over": ("pos", "pos")}, "twice"),
        (INDICES, {"over": ("slot",)}, "patched whole"),
        (CONTRIB, {"over": ("slot", "expert")}, "without 'slot'"),
        ("mlp.hook_expert_out", {"over": ("expert",)}, "along layer, batch, pos, slot, d_model"),
        (CONTRIB, {"layers": [0]}, r"layer 0 has no mlp\.hook_expert_contrib; .*: 1, 2"),
        ("mlp.hook_post", {"layers": [1]}, "that have it: 0"),
        ("attn.hook_z", {"layers": [3]}, "that have it: 0, 1, 2"),
        ("attn.hook_z", {"layers": []}, "layers is empty"),
        ("attn.hook_z", {"layers": [1, 1]}, "has one twice"),
        ("hook_embed", {"layers": [1], "over": ()}, "global"),
        ("attn.hook_z", {"positions": 0}, "row 0: .* position 0 is padding"),
        ("attn.hook_z", {"positions": [2, LENGTH]}, f"row 1: there is no position {LENGTH}"),
        ("attn.hook_z", {"positions": [2, 3, 4]}, "3 columns for 2 rows: .* a bool mask"),
        ("attn.hook_z", {"positions": []}, "must be a column"),
        ("attn.hook_z", {"positions": torch.ones(2, 3, dtype=torch.bool)}, "the tokens are"),
        (
            "attn.hook_z",
            {"positions": torch.ones(2, LENGTH, dtype=torch.bool)},
            "row 0: position 0 .* is padding",
        ),
        ("attn.hook_z", {"metric": lambda logits: logits[:, -1, 0]}, "one floating number"),
        ("attn.hook_z", {"metric": lambda logits: float(logits[0, -1, 0])}, "gave float"),
        ("attn.hook_z", {"metric": lambda logits: logits.argmax()}, "one floating number"),
        ("attn.hook_z", {"metric": lambda logits: logits.mean() * torch.nan}, "NaN in the unpatched run"),
    ],
)
def test_errors(pair: Any, model_of: Any, activation: str, options: dict[str, Any], message: str) -> None:
    model_of("deepseek_v2")
    with pytest.raises(ValueError, match=message):
        pair("deepseek_v2").patch(activation, **{"over": ("layer",), **options})


def test_a_metric_that_is_nan_says_where(pair: Any) -> None:
    p = pair("olmoe")
    calls: list[int] = []

    def metric(logits: Tensor) -> Tensor:
        calls.append(1)
        return p.metric(logits) * (torch.nan if len(calls) == 4 else 1)

    with pytest.raises(ValueError, match=r"NaN in the patch of attn\.hook_z at layer 0, head 2"):
        p.patch("attn.hook_z", ("layer", "head"), metric=metric)


def test_runs_that_do_not_fit_together(pair: Any) -> None:
    """Other shapes, other padding: said before any patch."""
    p, other = pair("olmoe"), pair("olmoe", "right")
    runs: list[int] = []

    def metric(logits: Tensor) -> Tensor:
        runs.append(1)
        return logits.mean()

    def patch(tokens: Tensor, mask: Tensor | None, values: Any = p.clean_cache, **options: Any) -> None:
        options = {"over": ("layer",), **options}
        activation_patch(p.model, tokens, values, metric, "attn.hook_z", attention_mask=mask, **options)

    for tokens, mask in ((p.corrupted[:1], p.mask[:1]), (p.corrupted[:, 1:], p.mask[:, 1:])):
        with pytest.raises(ValueError, match=r"hook_z in the clean cache is \(2, 6, 4, 16\); with corrupted"):
            patch(tokens, mask)
    with pytest.raises(ValueError, match="must be padded at the same places"):
        patch(p.corrupted, other.mask)
    with pytest.raises(ValueError, match="the masks differ"):
        patch(p.corrupted, p.mask, clean_attention_mask=other.mask)
    for point in ("hook_attn_scores", "hook_pattern"):
        names = [f"blocks.0.attn.{point}", "blocks.1.attn.hook_z"]
        with torch.no_grad():
            _, alone = p.model.run_with_cache(p.clean, names_filter=names)
        with pytest.raises(ValueError, match=f"{point} in the clean cache sees other keys"):
            patch(p.corrupted, p.mask, alone, layers=[1])
    with torch.no_grad():
        _, unbatched = p.model.run_with_cache(p.clean[:1], remove_batch_dim=True)
    with pytest.raises(ValueError, match=r"it must be \[1, 6, head, d_head\]"):
        patch(p.corrupted[:1], None, unbatched)
    assert runs == []
    wider = {
        name: value.repeat(1, 1, 2, 1) for name, value in p.clean_cache.items() if name.endswith("hook_z")
    }
    with pytest.raises(ValueError, match="in the corrupted run"):
        patch(p.corrupted, p.mask, wider)


def test_a_hook_that_runs_twice_is_noticed(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = pair("olmoe")
    point = p.model.blocks[1].attn.hook_z
    forward = type(p.model.blocks[1].attn).project

    def project(self: Any, z: Tensor) -> Tensor:
        return forward(self, self.hook_z(z) if self.hook_z is point else z)

    monkeypatch.setattr(type(p.model.blocks[1].attn), "project", project)
    with pytest.raises(RuntimeError, match=r"exactly once.*blocks\.1\.attn\.hook_z 2 times"):
        p.patch("attn.hook_z", ("layer",))

"""A TransformerBridge with our hook points, against HookedMoE on the same checkpoint and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_lens import HookedMoE
from moe_lens.converters import UnsupportedCheckpoint
from moe_lens.interop.bridge_cache import translated
from moe_lens.interop.shared_weights import hooked_view
from moe_lens.interop.transformer_lens import (
    attach,
    attribution_hooks,
    logit_attribution_hooks,
    logit_attrs,
    router_logit_attrs,
)
from moe_lens.routing import attribution, logit_attribution
from tests.families import FAMILIES, hf_model, prompts
from tests.interop_types import inputs, tiny_model
from tests.test_interop_shared_weights import storages
from tests.test_interop_transformers import EDITS, POINTS, close, first_layer

# Every family, and what a config can change in what the bridge's hooks hold: clipped values, heads of other widths
# than d_model / n_heads, dense layers beside MoE layers, biases, groups of experts.
VARIANTS = (
    *FAMILIES,
    "olmoe_gqa_clip",
    "qwen2_moe_no_bias",
    "qwen3_moe_dense_bias",
    "deepseek_v2_groups",
    "deepseek_v2_bias",
    "mixtral_head_dim_odd_width",
)
GRANULARITIES = ("layer", "head", "source", "expert", "neuron")
PADDINGS = ("none", "left", "right")
WORD, OTHER = 17, 90


def boot(directory: Path, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A bridge of a checkpoint as a user makes it of a model in memory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return TransformerBridge.boot_transformers(
        str(directory), hf_model=hf_model(directory, dtype), tokenizer=tokenizer, dtype=dtype, device="cpu"
    )


@pytest.fixture(scope="session")
def bridge_of(checkpoint: Callable[[str], Path]) -> Callable[[str], TransformerBridge]:
    return cache(lambda variant: boot(checkpoint(variant)))


@pytest.fixture(scope="session")
def caches(bridge_of: Any, hooked: Any) -> Callable[[str, str], tuple[Any, Any]]:
    """`caches(variant, padding)`: the bridge's cache of everything, attached, and HookedMoE's."""

    @cache
    def run(variant: str, padding: str) -> tuple[Any, Any]:
        tokens, mask = prompts(padding)
        given = {} if padding == "none" else {"attention_mask": mask}
        with torch.no_grad():
            with attach(bridge_of(variant)) as bridge:
                _, theirs = bridge.run_with_cache(tokens, **given)
            _, ours = hooked(variant).run_with_cache(tokens, **given)
        return theirs, ours

    return run


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_points_equal_hooked_moe(caches: Any, hooked: Any, variant: str, padding: str) -> None:
    """At real positions: identical indices, the rest to 1e-5."""
    (theirs, ours), real = caches(variant, padding), prompts(padding)[1].bool()
    names = [name for name in ours if name.endswith(tuple(f"mlp.hook_{point}" for point in POINTS))]
    assert len(names) == 5 * len(hooked(variant).cfg.moe_layers)
    for name in names:
        got, expected = theirs[name][real], ours[name][real]
        assert torch.equal(got, expected) if name.endswith("indices") else close(got, expected), name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_translated_cache_equals_hooked_moe(
    caches: Any, bridge_of: Any, hooked: Any, variant: str, padding: str
) -> None:
    """All that any attribution reads, under our names: the same values in the same shapes, at real queries."""
    (theirs, ours), real = caches(variant, padding), prompts(padding)[1].bool()
    model, view = hooked(variant), hooked_view(bridge_of(variant).original_model)
    needed = {
        name
        for by in GRANULARITIES
        for name in (
            *attribution.attribution_hooks(model, model.cfg.moe_layers, by=by),
            *logit_attribution.logit_attribution_hooks(model, by=by),
        )
    }
    stream = f"blocks.{model.cfg.moe_layers[-1]}.hook_resid_mid"
    got = translated(view, theirs, sorted(needed), stream, listed_by="")
    assert set(got) == needed
    for name, value in got.items():
        expected = ours[name]
        if name.endswith("hook_pattern"):
            value, expected = value.transpose(1, 2), expected.transpose(1, 2)
        assert close(value[real].float(), expected[real].float()), name


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attributions_equal_hooked_moe(
    caches: Any, bridge_of: Any, hooked: Any, variant: str, by: str
) -> None:
    """Of the last router, and of a logit and a difference; every sender's score at every real position."""
    bridge, model = bridge_of(variant), hooked(variant)
    receiver = model.cfg.moe_layers[-1]
    for padding in PADDINGS:
        (theirs, ours), real = caches(variant, padding), prompts(padding)[1].bool()
        pairs: list[tuple[Any, Any]] = [
            (
                router_logit_attrs(bridge, theirs, receiver=receiver, by=by),
                attribution.router_logit_attrs(model, ours, receiver=receiver, by=by),
            )
        ]
        for tokens in ((WORD,), (WORD, OTHER)):
            pairs.append(
                (
                    logit_attrs(bridge, theirs, *tokens, by=by),
                    logit_attribution.logit_attrs(model, ours, *tokens, by=by),
                )
            )
        for got, expected in pairs:
            assert list(got.senders) == list(expected.senders)
            assert got.by == by
            assert close(got.values[:, real], expected.values[:, real])
            assert close(got.logits[real], expected.logits[real])
            assert got.completeness_error <= 1e-5
            scale = float(expected.logits.abs().max())
            assert got.model_logit_difference <= 1e-5 * scale


@pytest.mark.parametrize("variant", FAMILIES)
def test_attribution_of_places_and_text(caches: Any, bridge_of: Any, hooked: Any, variant: str) -> None:
    """Tokens as text, each row's own position."""
    (theirs, ours), (_, mask) = caches(variant, "right"), prompts("right")
    last = mask.sum(dim=1, keepdim=True) - 1
    asked: Any = (["a", "b"], ["c", 9])
    got = logit_attrs(bridge_of(variant), theirs, *asked, by="source", positions=last)
    expected = logit_attribution.logit_attrs(hooked(variant), ours, *asked, by="source", positions=last)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.positions, last)
    assert close(got.values, expected.values)


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2"])
def test_attribution_hooks_are_all_that_is_needed(
    bridge_of: Any, caches: Any, hooked: Any, variant: str, by: str
) -> None:
    """A cache of these alone gives the same; without any one of them its name is in the error."""
    tokens, _ = prompts("none")
    bridge, receiver = bridge_of(variant), hooked(variant).cfg.moe_layers[-1]
    whole, _ = caches(variant, "none")
    calls: list[tuple[list[str], Callable[[Any], Any]]] = [
        (
            attribution_hooks(bridge, [receiver], by=by),
            lambda cache: router_logit_attrs(bridge, cache, receiver=receiver, by=by),
        ),
        (logit_attribution_hooks(bridge, by=by), lambda cache: logit_attrs(bridge, cache, WORD, by=by)),
    ]
    for names, attribute in calls:
        with torch.no_grad(), attach(bridge):
            _, only = bridge.run_with_cache(tokens, names_filter=names)
        # The bridge adds its first name of a point where it has two.
        assert set(names) <= set(only.cache_dict) < set(whole.cache_dict)
        assert torch.equal(attribute(only).values, attribute(whole.cache_dict).values)
        for name in names:
            less = {key: value for key, value in only.cache_dict.items() if key != name}
            with pytest.raises(
                KeyError, match=f"lacks {name.replace('.', '[.]')}; with attach.*hooks.bridge, "
            ):
                attribute(less)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_edits_equal_hooked_moe(bridge_of: Any, model_of: Any, variant: str, edit: str) -> None:
    """The same edit by the bridge's `run_with_hooks` gives the same logits, and other ones than without."""
    point, function = EDITS[edit]
    (tokens, mask), ours = prompts("left"), model_of(variant)
    hooks = [(first_layer(ours) + f"hook_{point}", function)]
    with torch.no_grad(), attach(bridge_of(variant)) as bridge:
        out = bridge.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)[mask.bool()]
        unedited = bridge(tokens, attention_mask=mask)[mask.bool()]
        with bridge.hooks(fwd_hooks=hooks):
            again = bridge(tokens, attention_mask=mask)[mask.bool()]
        assert torch.equal(bridge(tokens, attention_mask=mask)[mask.bool()], unedited)
        expected = ours.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)[mask.bool()]
    assert close(out, expected)
    assert torch.equal(out, again)
    assert not torch.allclose(out, unedited, atol=1e-3)


def remove_heaviest(value: Tensor, hook: Any) -> Tensor:
    return value.index_fill(2, torch.tensor([0]), 0.0)


def test_edits_and_cache_together(bridge_of: Any, model_of: Any) -> None:
    """A layer's contributions zeroed by `add_hook`, and the next router's scores attributed in that run."""
    (tokens, _), ours = prompts("none"), model_of("qwen2_moe")
    name = "blocks.0.mlp.hook_expert_contrib"
    with torch.no_grad(), attach(bridge_of("qwen2_moe")) as bridge:
        bridge.add_hook(name, remove_heaviest)
        _, theirs = bridge.run_with_cache(tokens)
        bridge.reset_hooks()
        _, clean = bridge.run_with_cache(tokens)
    with torch.no_grad(), ours.hooks(fwd_hooks=[(name, remove_heaviest)]):
        _, expected_cache = ours.run_with_cache(tokens)
    got = router_logit_attrs(bridge, theirs, receiver=1, by="expert")
    expected = attribution.router_logit_attrs(ours, expected_cache, receiver=1, by="expert")
    assert close(got.values, expected.values)
    assert not close(got.values, router_logit_attrs(bridge, clean, receiver=1, by="expert").values)


def halve(value: Tensor, hook: Any) -> Tensor:
    return value / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_between_what_is_read(checkpoint: Any, dtype: torch.dtype) -> None:
    """Neurons are made anew of what the layer read: where experts' outputs were edited after that, neurons do not sum
    to the logits, and it is said. Experts' contributions are read after the edit, and do."""
    bridge, (tokens, _) = boot(checkpoint("olmoe"), dtype), prompts("none")
    with torch.no_grad(), attach(bridge), bridge.hooks(fwd_hooks=[("blocks.0.mlp.hook_expert_out", halve)]):
        _, seen = bridge.run_with_cache(tokens)
    experts = router_logit_attrs(bridge, seen, receiver=1, by="expert")
    neurons = router_logit_attrs(bridge, seen, receiver=1, by="neuron")
    assert experts.completeness_error <= 1e-5
    if dtype == torch.float32:
        assert neurons.completeness_error > 1e-3
        return
    assert experts.rounding_ratio is not None
    assert neurons.rounding_ratio is not None
    assert experts.rounding_ratio <= 1 < neurons.rounding_ratio


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2"])
def test_gradients_equal_hooked_moe(bridge_of: Any, model_of: Any, variant: str) -> None:
    """`run_with_cache(incl_bwd=True)` on the bridge, on every point that has a gradient."""
    (tokens, _), ours = prompts("none"), model_of(variant)
    points = tuple(f"mlp.hook_{point}" for point in POINTS if point != "expert_indices")
    given: Any = dict(names_filter=lambda name: name.endswith(points), incl_bwd=True, return_type="loss")
    with attach(bridge_of(variant)) as bridge:
        _, theirs = bridge.run_with_cache(tokens, **given)
    _, expected = ours.run_with_cache(tokens, **given)
    ours.zero_grad()
    bridge.zero_grad()
    names = [name for name in expected if name.endswith("_grad")]
    assert names
    for name in names:
        size = float(expected[name].abs().max())
        torch.testing.assert_close(theirs[name], expected[name], rtol=1e-4, atol=1e-5 * size)


def state(bridge: Any) -> Any:
    """All that attach puts in place of something, as the bridge shows it and as it keeps it."""
    return (
        {name: id(point) for name, point in bridge.hook_dict.items()},
        {name: id(point) for name, point in bridge._hook_registry.items()},
        [(name, id(point), point.name) for name, point in bridge.hook_dict.items()],
        [(name, sorted(module.__dict__)) for name, module in bridge.named_modules()],
        [(name, id(value)) for name, value in bridge.blocks[1].mlp.__dict__.items()],
        [len(point.fwd_hooks) + len(point.bwd_hooks) for point in bridge.hook_points()],
        bridge.original_model.config._experts_implementation,
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2"])
def test_everything_is_put_back(bridge_of: Any, variant: str, fails: bool) -> None:
    """Also after an exception in a run, and with hooks left on the points."""
    bridge, (tokens, _) = bridge_of(variant), prompts("none")
    before, seen = state(bridge), []
    with torch.no_grad():
        unhooked = bridge(tokens)
        try:
            with attach(bridge) as attached:
                assert attached is bridge
                assert state(bridge) != before
                assert torch.equal(bridge(tokens), unhooked)
                bridge.add_hook("blocks.1.mlp.hook_expert_out", lambda v, hook: seen.append(v))
                if fails:
                    bridge.add_perma_hook("blocks.2.mlp.hook_expert_out", lambda v, hook: 1 / 0)
                bridge(tokens)
        except ZeroDivisionError:
            assert fails
        assert len(seen) == 1
        assert state(bridge) == before
        assert torch.equal(bridge(tokens), unhooked)
    assert len(seen) == 1
    with pytest.raises(KeyError, match=r"'blocks\.1\.mlp\.hook_expert_out' does not exist"):
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_expert_out", print)])
    with attach(bridge):
        pass


@pytest.mark.parametrize("variant", FAMILIES)
def test_names(bridge_of: Any, variant: str) -> None:
    """In `hook_dict`, as attributes and as names of the points; also those that the bridge has for another point."""
    bridge = bridge_of(variant)
    with attach(bridge):
        shown = bridge.hook_dict
        for point in POINTS:
            name = f"blocks.1.mlp.hook_{point}"
            assert shown[name].name == name
            assert getattr(bridge.blocks[1].mlp, f"hook_{point}") is shown[name]
            assert bridge.get_hook_point(name) is shown[name]
            assert bridge.mod_dict[name] is shown[name]
        with pytest.raises(KeyError, match="matched no hook points"):
            bridge.run_with_cache(prompts("none")[0], names_filter="blocks.1.mlp.hook_router_logit")
        with pytest.raises(KeyError, match="does not exist"):
            bridge.run_with_hooks(prompts("none")[0], fwd_hooks=[("blocks.1.mlp.hook_router_logit", print)])


def test_the_bridges_own_router_points(bridge_of: Any) -> None:
    """They keep their first names, flattened, and can be read; an edit there would be unknown to our points."""
    bridge, (tokens, _) = bridge_of("olmoe"), prompts("none")
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens)
        own, ours = seen["blocks.1.mlp.gate.hook_expert_indices"], seen["blocks.1.mlp.hook_expert_indices"]
        assert torch.equal(own.sort().values.reshape(ours.shape), ours.sort().values)
        assert torch.equal(
            seen["blocks.1.mlp.gate.hook_out"].reshape(2, 9, 8), seen["blocks.1.mlp.hook_router_logits"]
        )
        hook = ("blocks.1.mlp.gate.hook_expert_indices", lambda v, hook: (v + 1) % 8)
        with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp .* given other indices or weights"):
            bridge.run_with_hooks(tokens, fwd_hooks=[hook])


def test_a_bridge_that_is_scanned_anew(bridge_of: Any) -> None:
    """As `enable_compatibility_mode` does it, while attached: the points are found again, and go as they should."""
    bridge, (tokens, _) = bridge_of("mixtral"), prompts("none")
    with torch.no_grad(), attach(bridge):
        bridge.clear_hook_registry()
        bridge._initialize_hook_registry()
        _, seen = bridge.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_expert_contrib")
        assert seen["blocks.1.mlp.hook_expert_contrib"].shape == (2, 9, 2, 64)
    assert "blocks.1.mlp.hook_expert_contrib" not in bridge.hook_dict


def test_attached_twice(bridge_of: Any) -> None:
    bridge = bridge_of("olmoe")
    with attach(bridge):
        before = state(bridge)
        with pytest.raises(ValueError, match="OlmoeForCausalLM is attached already"), attach(bridge):
            pass
        assert state(bridge) == before


def boot_of(model: Any, directory: Path) -> TransformerBridge:
    """A bridge of a model in memory, with the tokenizer of some checkpoint."""
    model.config.architectures = [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")


def test_without_experts(checkpoint: Any) -> None:
    sizes: Any = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, vocab_size=64)
    bridge = boot_of(AutoModelForCausalLM.from_config(config), checkpoint("olmoe"))
    with (
        pytest.raises(ValueError, match=r"llama .* has no experts: attach takes a Mixture-of-Experts model"),
        attach(bridge),
    ):
        pass


@pytest.mark.parametrize("kind", ["gpt_oss", "glm4_moe", "deepseek_v3", "jamba", "qwen3_next", "flex_olmo"])
def test_other_families(checkpoint: Any, kind: str) -> None:
    """Hook points on whatever both TransformerLens and the experts interface know: what reaches the stream from the
    slots is the layer's output without shared experts, and an edit of the logits re-routes. Attributions need a family
    that HookedMoE has."""
    bridge, tokens = boot_of(tiny_model(kind), checkpoint("olmoe")), inputs(kind)["input_ids"]
    with torch.no_grad(), attach(bridge):
        out, seen = bridge.run_with_cache(tokens)
        name = next(name for name in seen if name.endswith("mlp.hook_expert_contrib"))
        weighted = (
            seen[name.replace("contrib", "out")]
            * seen[name.replace("expert_contrib", "routing_weights")][..., None]
        )
        assert close(seen[name], weighted)
        if kind in ("gpt_oss", "jamba", "flex_olmo"):
            assert close(seen[name].sum(dim=2), seen[name.replace("hook_expert_contrib", "hook_out")])
        hook = (name.replace("expert_contrib", "router_logits"), lambda v, hook: v.flip(-1))
        assert not torch.allclose(bridge.run_with_hooks(tokens, fwd_hooks=[hook]), out, atol=1e-3)
    with pytest.raises(UnsupportedCheckpoint, match=f"no converter for model type '{kind}'"):
        router_logit_attrs(bridge, seen, receiver=1)


def test_experts_outside_the_bridges_mlp(checkpoint: Any) -> None:
    """Gemma 4 has its experts beside the MLP that the bridge names so."""
    bridge = boot_of(tiny_model("gemma4"), checkpoint("olmoe"))
    before = state(bridge)
    with (
        pytest.raises(ValueError, match=r"no component blocks\.0\.mlp for the Gemma4TextDecoderLayer"),
        attach(bridge),
    ):
        pass
    assert state(bridge) == before


def test_a_bridge_of_a_directory(checkpoint: Any, hooked: Any) -> None:
    """As TransformerLens loads it by itself, with transformers' own choice of an experts implementation."""
    bridge = TransformerBridge.boot_transformers(str(checkpoint("qwen3_moe")), device="cpu")
    tokens, _ = prompts("none")
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens)
        _, ours = hooked("qwen3_moe").run_with_cache(tokens)
    name = "blocks.1.mlp.hook_expert_contrib"
    assert close(seen[name], ours[name])
    got = logit_attrs(bridge, seen, WORD, OTHER, by="expert")
    assert close(
        got.values, logit_attribution.logit_attrs(hooked("qwen3_moe"), ours, WORD, OTHER, by="expert").values
    )


def test_not_a_bridge(hf: Any, hooked: Any) -> None:
    for model in (hf("olmoe"), hooked("olmoe")):
        with pytest.raises(TypeError, match="not a TransformerBridge but a"), attach(model):
            pass
        with pytest.raises(TypeError, match="not a TransformerBridge but a"):
            router_logit_attrs(model, {}, receiver=1)


def test_caches_that_do_not_do(bridge_of: Any) -> None:
    bridge, (tokens, _) = bridge_of("qwen2_moe"), prompts("none", batch=1)
    with torch.no_grad():
        _, unattached = bridge.run_with_cache(tokens)
        with attach(bridge):
            _, flat = bridge.run_with_cache(tokens, remove_batch_dim=True)
            _, part = bridge.run_with_cache(tokens, pos_slice=slice(2, 5))
    with pytest.raises(KeyError, match=r"lacks blocks\.1\.mlp\.hook_router_logits; with attach\(bridge\)"):
        router_logit_attrs(bridge, unattached, receiver=1)
    with pytest.raises(ValueError, match="without its batch and position axes"):
        router_logit_attrs(bridge, flat, receiver=1)
    with pytest.raises(
        ValueError, match=r"shared_expert.* is flattened over them, so cache it without pos_slice"
    ):
        router_logit_attrs(bridge, part, receiver=1, by="expert")
    with pytest.raises(ValueError, match="receiver 7 is no MoE layer"):
        attribution_hooks(bridge, [7])


def test_processed_weights(checkpoint: Any) -> None:
    """Refused by name, for its hooks hold other vectors; the hook points themselves are there."""
    bridge, (tokens, _) = boot(checkpoint("olmoe")), prompts("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens)
    assert seen["blocks.1.mlp.hook_expert_contrib"].shape == (2, 9, 4, 64)
    with pytest.raises(ValueError, match="has processed its weights"):
        router_logit_attrs(bridge, seen, receiver=1)


@pytest.mark.parametrize("variant", FAMILIES)
def test_compatibility_mode_without_processing(checkpoint: Any, caches: Any, variant: str) -> None:
    """TransformerLens's older names beside the new ones; the values are the same."""
    bridge, (tokens, _) = boot(checkpoint(variant)), prompts("none")
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens)
    _, ours = caches(variant, "none")
    hooked_values = hooked_view(bridge.original_model)
    got = router_logit_attrs(bridge, seen, receiver=1, by="expert")
    expected = attribution.router_logit_attrs(hooked_values, ours, receiver=1, by="expert")
    assert close(got.values, expected.values)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16(checkpoint: Any, variant: str) -> None:
    """The parts sum to the router's logits with `rounding` for what the stream's additions lost, and no more."""
    bridge, (tokens, mask) = boot(checkpoint(variant), torch.bfloat16), prompts("right")
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens, attention_mask=mask)
    for got in (
        router_logit_attrs(bridge, seen, receiver=1, by="layer"),
        logit_attrs(bridge, seen, WORD, OTHER, by="layer"),
    ):
        assert list(got.senders)[-1] == "rounding"
        assert got.completeness_error <= 1e-5
        assert got.rounding_ratio is not None
        assert got.rounding_ratio <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_view_of_a_bridges_model(bridge_of: Any, hooked: Any, variant: str) -> None:
    """Found through the bridge's components; no memory of its own."""
    model, (tokens, mask) = bridge_of(variant).original_model, prompts("left")
    view: HookedMoE = hooked_view(model)
    assert set(storages(view)) <= set(storages(model))
    with torch.no_grad():
        expected = hooked(variant)(tokens, attention_mask=mask)
        assert close(view(tokens, attention_mask=mask), expected)


def test_weights_that_were_replaced_are_read_anew(checkpoint: Any) -> None:
    bridge, (tokens, _) = boot(checkpoint("olmoe")), prompts("none")
    with torch.no_grad(), attach(bridge):
        _, seen = bridge.run_with_cache(tokens)
    before = router_logit_attrs(bridge, seen, receiver=1)
    gate = bridge.blocks[1].mlp.gate.original_component
    gate.weight = torch.nn.Parameter(2 * gate.weight.detach())
    assert close(router_logit_attrs(bridge, seen, receiver=1).values, 2 * before.values)

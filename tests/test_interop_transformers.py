"""`attach` against HookedMoE on the same checkpoint and tokens, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lens.interop.expert_layers import layer_names
from moe_lens.interop.transformers import SlotSumError, attach
from tests.conftest import leftover_hooks
from tests.families import FAMILIES, hf_model, prompts, write_checkpoint
from tests.interop_types import inputs, tiny_model

VARIANTS = (*FAMILIES, "deepseek_v2_groups", "qwen2_moe_no_bias", "qwen3_moe_sparse_step")
POINTS = ("router_logits", "expert_indices", "routing_weights", "expert_out", "expert_contrib")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

Edit = Callable[[Tensor, Any], Tensor | None]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-5 of the largest value."""
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-5 * float(
        theirs.abs().max()
    )


def first_layer(model: Any) -> str:
    """The name of the first MoE layer, up to its points."""
    return next(n for n in model.hook_dict if n.endswith("hook_router_logits")).removesuffix(
        "hook_router_logits"
    )


def force_others(indices: Tensor, hook: Any) -> Tensor:
    return (indices + 1) % 8


def halve_second_slot(value: Tensor, hook: Any) -> None:
    """In place, on slots: weights as well as outputs."""
    value[:, :, 1] *= 0.5


def scale_by_slot(value: Tensor, hook: Any) -> Tensor:
    slots = torch.arange(1, value.shape[2] + 1, dtype=value.dtype)
    return value * (slots if value.ndim == 3 else slots[:, None])


EDITS: dict[str, tuple[str, Edit]] = {
    "logits run backwards": ("router_logits", lambda v, hook: v.flip(-1)),
    "experts removed": ("router_logits", lambda v, hook: v.index_fill(-1, torch.tensor([0, 2, 5]), -1e4)),
    "forced choice": ("expert_indices", force_others),
    "fewer experts": ("expert_indices", lambda v, hook: v[..., :1]),
    "weights by slot": ("routing_weights", scale_by_slot),
    "weights in place": ("routing_weights", halve_second_slot),
    "outputs by slot": ("expert_out", scale_by_slot),
    "outputs in place": ("expert_out", halve_second_slot),
    "contributions by slot": ("expert_contrib", scale_by_slot),
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_equals_hooked_moe(hf: Any, model_of: Callable[[str], Any], variant: str, padding: str) -> None:
    """Every point at real positions: identical indices, the rest to 1e-5; the model's own logits bit for bit."""
    tokens, mask = prompts(padding)
    theirs, real = hf(variant), mask.bool()
    with torch.no_grad():
        unhooked = theirs(tokens, attention_mask=mask).logits
        _, expected = model_of(variant).run_with_cache(tokens, attention_mask=mask)
        with attach(theirs) as attached:
            out, cache = attached.run_with_cache(tokens, attention_mask=mask)
            names = set(attached.hook_dict)
    assert torch.equal(out.logits, unhooked)
    assert names == {name for name in expected if name.endswith(tuple(f"mlp.hook_{p}" for p in POINTS))}
    assert set(cache) == names
    for name in names:
        if name.endswith("indices"):
            assert torch.equal(cache[name][real], expected[name][real])
        else:
            assert cache[name].shape == expected[name].shape
            assert close(cache[name][real], expected[name][real]), name


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_equal_hooked_moe(hf: Any, model_of: Callable[[str], Any], variant: str, edit: str) -> None:
    """The same edit at the same point gives the same logits, and other ones than without."""
    point, function = EDITS[edit]
    if (variant, edit) == ("deepseek_v2_groups", "forced choice"):
        pytest.skip("the router has no weight for experts outside the best groups; see test_masked_expert")
    tokens, mask = prompts("left")
    theirs, ours, real = hf(variant), model_of(variant), mask.bool()
    with torch.no_grad(), attach(theirs) as attached:
        hooks = [(first_layer(attached) + f"hook_{point}", function)]
        out = attached.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks).logits[real]
        expected = ours.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)[real]
        assert close(out, expected)
        unedited = attached(tokens, attention_mask=mask).logits[real]
        assert not torch.allclose(out, unedited, atol=1e-3)


@pytest.mark.parametrize("variant", ["deepseek_v2", "mixtral"])
def test_edits_of_several_points_act_together(hf: Any, model_of: Callable[[str], Any], variant: str) -> None:
    tokens, _ = prompts("none")
    with torch.no_grad(), attach(hf(variant)) as attached:
        hooks = [(first_layer(attached) + f"hook_{point}", function) for point, function in EDITS.values()]
        hooks = [hooks[i] for i in (0, 2, 4, 6, 8)]
        out = attached.run_with_hooks(tokens, fwd_hooks=hooks).logits
        assert close(out, model_of(variant).run_with_hooks(tokens, fwd_hooks=hooks))


@pytest.mark.parametrize("variant", FAMILIES)
def test_gradients_equal_hooked_moe(hf: Any, model_of: Callable[[str], Any], variant: str) -> None:
    """Backward hooks get what HookedMoE's get, on every point that has a gradient."""
    tokens, _ = prompts("none")
    theirs, ours = hf(variant), model_of(variant)
    gradients: dict[str, dict[str, Tensor]] = {"attached": {}, "hooked": {}}
    points = tuple(f"hook_{point}" for point in POINTS if point != "expert_indices")

    def keep(where: str) -> Any:
        return lambda value, hook: gradients[where].__setitem__(hook.name, value.clone())

    with attach(theirs) as attached:
        for where, model in (("attached", attached), ("hooked", ours)):
            with model.hooks(bwd_hooks=[(lambda name: name.endswith(points), keep(where))]):
                out = model(tokens)
                logits = out.logits if where == "attached" else out
                logits[:, -1].logsumexp(-1).sum().backward()
            model.zero_grad()
        theirs.zero_grad()
    assert set(gradients["attached"]) == set(gradients["hooked"])
    for name, gradient in gradients["attached"].items():
        expected = gradients["hooked"][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", FAMILIES)
def test_what_a_hook_keeps_has_a_gradient(hf: Any, model_of: Callable[[str], Any], variant: str) -> None:
    """`torch.autograd.grad` by values that forward hooks kept, the same as from HookedMoE."""
    tokens, _ = prompts("none")
    points = tuple(f"hook_{point}" for point in POINTS if point != "expert_indices")
    found = []
    with attach(hf(variant)) as attached:
        for model in (attached, model_of(variant)):
            kept: dict[str, Tensor] = {}

            def keep(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
                kept[hook.name] = value

            out = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith(points), keep)])
            logits = getattr(out, "logits", out)
            loss = logits[:, -1].logsumexp(-1).sum()
            found.append(dict(zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True)))
    assert set(found[0]) == set(found[1])
    for name, expected in found[1].items():
        torch.testing.assert_close(
            found[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_logits_of_a_router_that_returns_probabilities() -> None:
    """Gemma 4's router returns probabilities as its first value: the point has what they are made of."""
    model, made = tiny_model("gemma4"), []
    router = model.model.layers[1].router
    handle = router.proj.register_forward_hook(lambda module, args, output: made.append(output))
    with torch.no_grad(), attach(model) as attached:
        _, cache = attached.run_with_cache(**inputs("gemma4"))
    handle.remove()
    assert torch.equal(cache["blocks.1.mlp.hook_router_logits"].flatten(0, 1), made[0])


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_the_implementation_that_the_model_had(
    checkpoint: Any, experts: str, dtype: torch.dtype
) -> None:
    """Bit for bit in each of transformers' implementations and in half precision; slots sum in each."""
    theirs = hf_model(checkpoint("olmoe"), dtype, experts=experts)
    tokens, mask = prompts("right")
    with torch.inference_mode():
        unhooked = theirs(tokens, attention_mask=mask).logits
        with attach(theirs) as attached:
            assert torch.equal(attached(tokens, attention_mask=mask).logits, unhooked)
            edited = attached.run_with_hooks(
                tokens, attention_mask=mask, fwd_hooks=[("blocks.1.mlp.hook_expert_out", halve_second_slot)]
            )
            assert not torch.equal(edited.logits, unhooked)
    assert theirs.config._experts_implementation == experts


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast(checkpoint: Any, experts: str, low: torch.dtype) -> None:
    """A float32 model whose experts round to half precision: slots sum to these roundings, and to no more."""

    def damaged(experts_module: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts_module, x, indices, weights)
        return out * 1.1 if indices.shape[-1] > 1 else out

    theirs, (tokens, _) = hf_model(checkpoint("olmoe"), experts=experts), prompts("none")
    with torch.no_grad(), torch.autocast("cpu", low):
        unhooked = theirs(tokens).logits
        with attach(theirs) as attached:
            assert torch.equal(attached(tokens).logits, unhooked)
        ALL_EXPERTS_FUNCTIONS["damaged"] = damaged
        try:
            theirs.config._experts_implementation_internal = "damaged"
            with attach(theirs) as attached, pytest.raises(SlotSumError):
                attached(tokens)
        finally:
            del ALL_EXPERTS_FUNCTIONS["damaged"]


def state(model: Any) -> Any:
    """All that attach puts in place of something."""
    return (
        model.config._experts_implementation,
        sorted(ALL_EXPERTS_FUNCTIONS.keys()),
        [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(hf: Any, fails: bool) -> None:
    """Also after an exception in a run, and with hooks left on the points."""
    theirs, (tokens, mask) = hf("qwen2_moe"), prompts("none")
    before, seen, attached = state(theirs), [], None
    with torch.no_grad():
        unhooked = theirs(tokens, attention_mask=mask).logits
        try:
            with attach(theirs) as attached:
                assert state(theirs) != before
                attached.add_hook("blocks.0.mlp.hook_expert_out", lambda v, hook: seen.append(v))
                if fails:
                    attached.add_hook("blocks.1.mlp.hook_expert_out", lambda v, hook: 1 / 0)
                theirs(tokens, attention_mask=mask)
        except ZeroDivisionError:
            assert fails
        assert len(seen) == 1
        assert leftover_hooks(attached) == []
        assert state(theirs) == before
        assert torch.equal(theirs(tokens, attention_mask=mask).logits, unhooked)
    assert len(seen) == 1
    with attach(theirs):
        pass


def test_another_model_of_the_same_config_is_left_alone(checkpoint: Any) -> None:
    config = AutoConfig.from_pretrained(checkpoint("olmoe"))
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    other.config = one.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    tokens, _ = prompts("none")
    with torch.no_grad():
        unhooked = other(tokens).logits
        with attach(one) as attached:
            attached.add_hook("blocks.0.mlp.hook_expert_out", lambda v, hook: v * 0)
            assert torch.equal(other(tokens).logits, unhooked)


def test_stacks_have_names_of_their_own() -> None:
    """Experts for text and for images: two points each layer, and the tokens of images in a flat list."""
    model, given = tiny_model("ernie4_5_vl_moe"), inputs("ernie4_5_vl_moe")
    n_images = int(given["moe_mm_token_type_ids"].sum())
    with torch.no_grad(), attach(model) as attached:
        _, cache = attached.run_with_cache(**given)
    assert cache["vision_moe.blocks.1.mlp.hook_expert_out"].shape == (1, n_images, 3, 64)
    assert cache["text_moe.blocks.1.mlp.hook_expert_out"].shape == (1, 18 - n_images, 3, 64)


def test_gradients_in_the_cache(hf: Any, model_of: Callable[[str], Any]) -> None:
    """`run_with_cache(incl_bwd=True)`, of the loss that transformers makes where it is given labels."""
    tokens, _ = prompts("none")
    theirs, ours = hf("qwen2_moe"), model_of("qwen2_moe")
    points = tuple(f"mlp.hook_{point}" for point in POINTS if point != "expert_indices")
    asked: Any = dict(names_filter=lambda name: name.endswith(points), incl_bwd=True)
    with attach(theirs) as attached:
        out, cache = attached.run_with_cache(tokens, labels=tokens, **asked)
        with pytest.raises(ValueError, match=r"gradient of the model's loss.*give labels="):
            attached.run_with_cache(tokens, **asked)
    theirs.zero_grad()
    loss, expected = ours.run_with_cache(tokens, return_type="loss", **asked)
    ours.zero_grad()
    assert close(out.loss.detach(), loss.detach())
    assert set(cache) == set(expected)
    for name in (name for name in expected if name.endswith("_grad")):
        size = float(expected[name].abs().max())
        torch.testing.assert_close(cache[name], expected[name], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["model.layers.3.mlp.experts", "model.layers.4.mlp.experts"], ["blocks.3.mlp", "blocks.4.mlp"]),
        (
            ["thinker.model.layers.0.mlp.experts", "talker.model.layers.0.mlp.experts"],
            ["thinker.blocks.0.mlp", "talker.blocks.0.mlp"],
        ),
        (
            ["model.layers.0.mlp.experts", "model.visual.blocks.0.mlp.experts"],
            ["layers.blocks.0.mlp", "visual.blocks.blocks.0.mlp"],
        ),
        (
            ["stages.0.layers.1.experts", "stages.1.layers.1.experts"],
            ["0.blocks.1.mlp", "1.blocks.1.mlp"],
        ),
        (["mlp.experts"], ["blocks.0.mlp"]),
    ],
)
def test_layer_names(paths: list[str], names: list[str]) -> None:
    """The index in the list of layers; several stacks are told apart by what only their paths have."""
    assert list(layer_names(paths).values()) == names


def test_generation(tmp_path: Any) -> None:
    """Hooks see each step: the prompt first, then one token."""
    theirs = hf_model(write_checkpoint("olmoe", tmp_path))
    tokens, _ = prompts("none")
    settings: Any = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    expected = theirs.generate(tokens, **settings)
    lengths = []
    with attach(theirs) as attached:
        attached.add_hook("blocks.1.mlp.hook_expert_out", lambda v, hook: lengths.append(v.shape[1]))
        assert torch.equal(theirs.generate(tokens, **settings), expected)
    assert lengths == [9, 1, 1]

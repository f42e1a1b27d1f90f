"""The hook contract, the changing half: edits, in-place edits, gradients, and nnsight.

What an edit does is what reference.py does with the same edit: the run below it is compared value by value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from nnsight import NNsight
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.audit import census
from moe_lens.interventions import RouterOnly, run_with_interventions, silence
from tests.families import FAMILIES, VARIANTS, prompts
from tests.reference import Cache, assert_same, reference_cache, reference_run

INTEGER = "hook_expert_indices"
ROUTING = ("hook_router_logits", "hook_expert_weights")


def edit_for(name: str) -> Callable[[Tensor], Tensor]:
    """An edit of that hook point that means something there: other experts, or every number changed."""
    if name.endswith(INTEGER):
        return lambda indices: (indices + 3) % 8
    if name.endswith(ROUTING):
        return lambda scores: scores.flip(-1)

    def change(value: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, value[0].numel(), dtype=value.dtype).view(value[0].shape)
        return value * ramp

    return change


def in_place(edit: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """The same edit as a hook that writes into what it is handed, and returns nothing."""

    def hook(value: Tensor, hook: Any) -> None:
        value.copy_(edit(value.detach().clone()))

    return hook


def returned(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda value, hook: edit(value)


def all_values(model: Any, tokens: Tensor, mask: Tensor, hooks: list[Any]) -> tuple[Tensor, Cache]:
    """Logits and the value at every hook point, as it stands after the given hooks."""
    model.set_use_attn_result(True)
    with model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens, attention_mask=mask, return_cache_object=False)
    return logits, cache


# --- returned edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_edit_does_what_the_reference_does_with_it(model_of: Any, hf: Any, variant: str) -> None:
    """Edit each hook point by itself: logits and all values change as they must, and they do change.

    In the five plain variants every point of every layer, in the others the first of each kind.
    """
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("left", length=6)
    clean, _ = reference_run(theirs, tokens, mask)
    first_of_its_kind = {re.sub(r"blocks\.\d+\.", "", name): name for name in reversed(model.hook_dict)}
    for name in model.hook_dict if variant in FAMILIES else first_of_its_kind.values():
        edit = edit_for(name)
        expected_logits, expected = reference_run(theirs, tokens, mask, {name: edit})
        logits, cache = all_values(model, tokens, mask, [(name, returned(edit))])
        assert_same(logits, expected_logits, f"logits after an edit of {name}")
        for other, value in expected.items():
            assert_same(cache[other], value, f"{other} after an edit of {name}")
        assert (logits - clean).abs().max() > 1e-4 * clean.abs().max(), f"{name} has no effect"


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_edits_act_alone(model_of: Any, hf: Any, variant: str) -> None:
    """Also where nobody else listens, so that no other point forces the slow path: the logits are the same."""
    model, theirs, (tokens, mask) = model_of(variant), hf(variant), prompts("right")
    for name in model.hook_dict:
        expected, _ = reference_run(theirs, tokens, mask, {name: edit_for(name)})
        logits = model.run_with_hooks(
            tokens, attention_mask=mask, fwd_hooks=[(name, returned(edit_for(name)))]
        )
        assert_same(logits, expected, f"logits after an edit of {name}")


def moe_layer(model: Any) -> str:
    """The first layer with experts, as a prefix."""
    return next(name for name in model.hook_dict if name.endswith(INTEGER)).removesuffix(INTEGER)


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_forced_indices_keep_their_order(model_of: Any, variant: str) -> None:
    """Whatever their weights: each slot holds the expert that was asked for, with the weight read for it."""
    model, (tokens, mask) = model_of(variant), prompts()
    at = moe_layer(model)
    k = model.cfg.top_k
    forced = torch.tensor([6, 1, 4, 3][:k]).expand(*tokens.shape, k)
    _, cache = all_values(model, tokens, mask, [(at + INTEGER, lambda value, hook: forced)])
    assert torch.equal(cache[at + INTEGER], forced)
    read = cache[at + "hook_expert_weights"].gather(-1, forced)
    ratios = cache[at + "hook_routing_weights"] / read
    torch.testing.assert_close(
        ratios, ratios[..., :1].expand_as(ratios)
    )  # one factor for all slots of a token
    assert (cache[at + "hook_routing_weights"].diff(dim=-1) > 0).any()  # so they are not sorted


@pytest.mark.parametrize("variant", FAMILIES)
def test_senseless_indices_raise(model_of: Any, variant: str) -> None:
    """The same expert twice, or one that is not there; returned or in place, heard or not by others."""
    model, (tokens, _) = model_of(variant), prompts()
    name = moe_layer(model) + INTEGER

    def twice(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[1, 2, 1] = value[1, 2, 0]
        return value

    def twice_in_place(value: Tensor, hook: Any) -> None:
        value[1, 2, 1] = value[1, 2, 0]

    for bad in (twice, twice_in_place):
        with pytest.raises(ValueError, match=r"twice.*batch 1, position 2"):
            model.run_with_hooks(tokens, fwd_hooks=[(name, bad)])
    for beyond in (8, -1):
        with pytest.raises(ValueError, match="outside"):
            model.run_with_hooks(
                tokens,
                fwd_hooks=[
                    (name, lambda value, hook, to=beyond: value.masked_fill(value == value.max(), to))
                ],
            )


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_routing_weights_act_last(model_of: Any, variant: str) -> None:
    """What is put there multiplies the experts' outputs as it is: not normalised, scaled or sorted again."""
    model, (tokens, mask) = model_of(variant), prompts()
    at = moe_layer(model)
    k = model.cfg.top_k
    chosen = torch.tensor([0.1, -2.0, 3.0, 0.0][:k]).expand(*tokens.shape, k)
    _, clean = all_values(model, tokens, mask, [])
    _, cache = all_values(model, tokens, mask, [(at + "hook_routing_weights", lambda value, hook: chosen)])
    assert torch.equal(cache[at + INTEGER], clean[at + INTEGER])
    torch.testing.assert_close(cache[at + "hook_expert_out"], clean[at + "hook_expert_out"])
    expected = chosen.unsqueeze(-1) * clean[at + "hook_expert_out"]
    torch.testing.assert_close(cache[at + "hook_expert_contrib"], expected)


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_zeroing_a_slot_removes_exactly_it(model_of: Any, variant: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts()
    at = moe_layer(model)
    block = at.removesuffix("mlp.")
    _, clean = all_values(model, tokens, mask, [])

    def zero(value: Tensor, hook: Any) -> None:
        value[0, 3, 1] = 0

    _, cache = all_values(model, tokens, mask, [(at + "hook_expert_contrib", zero)])
    expected = clean[block + "hook_mlp_out"].clone()
    expected[0, 3] -= clean[at + "hook_expert_contrib"][0, 3, 1]
    torch.testing.assert_close(cache[block + "hook_mlp_out"], expected, atol=1e-5, rtol=1e-5)
    elsewhere = torch.ones(tokens.shape, dtype=torch.bool)
    elsewhere[0, 3] = False
    untouched = cache[block + "hook_mlp_out"][elsewhere], clean[block + "hook_mlp_out"][elsewhere]
    torch.testing.assert_close(*untouched, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_larger_scale_shrinks_what_is_normalised(model_of: Any) -> None:
    model, (tokens, mask) = model_of("qwen3_moe"), prompts()
    _, clean = all_values(model, tokens, mask, [])
    for norm in ("blocks.0.ln1.", "blocks.1.ln2.", "ln_final."):
        logits, cache = all_values(
            model, tokens, mask, [(norm + "hook_scale", lambda value, hook: 2 * value)]
        )
        torch.testing.assert_close(2 * cache[norm + "hook_normalized"], clean[norm + "hook_normalized"])
    torch.testing.assert_close(2 * logits, model(tokens))


# --- in-place edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_in_place_edits_work_like_returned_ones(model_of: Any, variant: str, grad: bool) -> None:
    """The same logits, no other cached value touched, no weight changed; with grad, the same gradients.

    The caching hooks come first, so they hold whatever tensors the edit could write into.
    """
    model, (tokens, mask) = model_of(variant), prompts("left")
    model.set_use_attn_result(True)
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    def run(name: str, hook: Callable[..., Any]) -> tuple[Tensor, Cache, Tensor]:
        cache, caching, _ = model.get_caching_hooks(lambda other: other != name)
        with torch.set_grad_enabled(grad), model.hooks(fwd_hooks=[*caching, (name, hook)]):
            loss = model(tokens, attention_mask=mask, return_type="loss")
        if not grad:
            return loss, cache, loss
        loss.backward()
        gradient = model.ln_final.w.grad.clone()
        model.zero_grad()
        return loss.detach(), cache, gradient

    for name in model.hook_dict:
        edit = edit_for(name)
        expected_loss, expected, expected_gradient = run(
            name, returned(lambda value, edit=edit: edit(value.detach()))
        )
        loss, cache, gradient = run(name, in_place(edit))
        torch.testing.assert_close(loss, expected_loss, msg=name)
        torch.testing.assert_close(gradient, expected_gradient, msg=name)
        for other, value in expected.items():
            torch.testing.assert_close(cache[other], value, msg=f"{other}, after an in-place edit of {name}")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("variant", FAMILIES)
def test_gradients_flow_through_in_place_edits(model_of: Any, variant: str) -> None:
    """Doubling in place has the gradient of doubling."""
    model, (tokens, mask) = model_of(variant), prompts("right")
    parameters = dict(model.named_parameters())

    def enlarge(value: Tensor, hook: Any) -> None:
        value.mul_(1.25)

    def gradients(name: str, hook: Callable[..., Any]) -> dict[str, Tensor]:
        loss = model.run_with_hooks(tokens, attention_mask=mask, return_type="loss", fwd_hooks=[(name, hook)])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {key: value for key, value in zip(parameters, found, strict=True) if value is not None}

    for name in model.hook_dict:
        if name.endswith(INTEGER):
            continue
        expected = gradients(name, lambda value, hook: value * 1.25)
        actual = gradients(name, enlarge)
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, atol=1e-5, rtol=1e-4, msg=f"{key}, edit of {name}")


@pytest.mark.parametrize("kind", ["full", "pre"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_in_place_edit_under_a_backward_hook_raises(model_of: Any, variant: str, kind: str) -> None:
    """torch would lose the edit to the hook's gradient; so it is refused. A returned edit is not."""
    model, (tokens, _) = model_of(variant), prompts()
    for name, point in model.hook_dict.items():
        if name.endswith(INTEGER):
            continue
        seen: list[Tensor] = []
        register = (
            point.register_full_backward_hook if kind == "full" else point.register_full_backward_pre_hook
        )
        handle = register(lambda module, *gradients, seen=seen: seen.append(gradients[-1][0]))
        with pytest.raises(RuntimeError, match="view"):
            model.run_with_hooks(tokens, fwd_hooks=[(name, in_place(edit_for(name)))])
        hooks = [(name, returned(lambda value: 1.5 * value))]
        model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).backward()
        handle.remove()
        model.zero_grad()
        assert len(seen) == 1, f"the backward hook on {name} saw {len(seen)} gradients"
        with torch.no_grad():  # without gradients there is nothing to lose
            handle = register(lambda *_: None)
            model.run_with_hooks(tokens, fwd_hooks=[(name, in_place(edit_for(name)))])
            handle.remove()


# --- gradients ----------------------------------------------------------------------------------------------


def reference_gradients(theirs: Any, tokens: Tensor, mask: Tensor) -> Cache:
    """d loss / d value at every hook point: to each value of the reference a zero is added, and differentiated."""
    zeros: Cache = {}

    def plus_zero(name: str) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            zeros[name] = torch.zeros_like(value, requires_grad=True)
            return value + zeros[name]

        return edit

    names = [name for name in reference_cache(theirs, tokens, mask) if not name.endswith(INTEGER)]
    logits, _ = reference_run(theirs, tokens, mask, {name: plus_zero(name) for name in names})
    has_loss = (mask[:, :-1] * mask[:, 1:]).bool()
    log_probabilities = logits[:, :-1].log_softmax(-1)
    loss = -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)[has_loss].mean()
    return dict(zip(zeros, torch.autograd.grad(loss, list(zeros.values())), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_the_reference(model_of: Any, hf: Any, variant: str) -> None:
    """TransformerLens's backward hooks, with all points listened to."""
    model, (tokens, mask) = model_of(variant), prompts("left")
    expected = reference_gradients(hf(variant), tokens, mask)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, return_type="loss", incl_bwd=True, return_cache_object=False
    )
    model.zero_grad()
    assert {name for name in cache if name.endswith("_grad")} == {f"{name}_grad" for name in expected}
    for name, gradient in expected.items():
        assert_same(cache[f"{name}_grad"], gradient, f"gradient at {name}", tolerance=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_gradients_of_points_heard_alone(model_of: Any, hf: Any, variant: str) -> None:
    """torch's own backward hook on one point, through the fast paths of all others."""
    model, (tokens, mask) = model_of(variant), prompts("right")
    for name, gradient in reference_gradients(hf(variant), tokens, mask).items():
        seen: list[Tensor] = []
        handle = model.hook_dict[name].register_full_backward_hook(
            lambda module, grad_input, grad_output, seen=seen: seen.append(grad_output[0])
        )
        model(tokens, attention_mask=mask, return_type="loss").backward()
        handle.remove()
        model.zero_grad()
        assert_same(seen[0], gradient, f"gradient at {name}", tolerance=1e-4)


def test_a_backward_hook_can_stop_a_gradient(model_of: Any) -> None:
    """What a backward hook returns replaces the gradient: zero it at a layer's output, and its weights get none."""
    model, (tokens, _) = model_of("qwen2_moe"), prompts()
    stop = [("blocks.1.hook_mlp_out", lambda gradient, hook: torch.zeros_like(gradient))]
    with model.hooks(bwd_hooks=stop):
        model(tokens, return_type="loss").backward()
    assert all(not parameter.grad.any() for parameter in model.blocks[1].mlp.parameters())
    assert all(parameter.grad.any() for parameter in model.blocks[0].mlp.parameters())
    model.zero_grad()


# --- nnsight ------------------------------------------------------------------------------------------------


def in_order_of_firing(model: Any, tokens: Tensor) -> list[str]:
    """All hook points in the order in which they run: nnsight reads them in no other."""
    order: list[str] = []
    listeners = [(name, lambda value, hook: order.append(hook.name)) for name in model.hook_dict]
    model.run_with_hooks(tokens, fwd_hooks=listeners)
    return order


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_nnsight_reads_every_point(checkpoint: Any, hf: Any, variant: str) -> None:
    """In one trace, without a torch hook on any point: what costs runs because nnsight asks for it."""
    tokens, mask = prompts("left")
    expected = reference_cache(hf(variant), tokens, mask)
    ours = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.float32, verbose=False)
    order = in_order_of_firing(ours, tokens)
    traced = NNsight(ours)
    with traced.trace(tokens, attention_mask=mask):
        values = {name: traced.get(name).output for name in order}.save()
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(values[name], value, name)


EDITED = ("attn.hook_pattern", "attn.hook_result", "mlp.hook_router_logits", "mlp.hook_expert_contrib")


@pytest.mark.parametrize("point", EDITED)
@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_nnsight_edits(checkpoint: Any, hf: Any, variant: str, point: str) -> None:
    """Assigning to a point's output, or writing into it, does what the same edit does in the reference."""
    tokens, mask = prompts("left")
    ours = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.float32, verbose=False)
    name = next(name for name in ours.hook_dict if name.endswith(point))
    edit = edit_for(name)
    expected, _ = reference_run(hf(variant), tokens, mask, {name: edit})
    traced = NNsight(ours)
    with traced.trace(tokens, attention_mask=mask):
        traced.get(name).output = edit(traced.get(name).output)
        logits = traced.output.save()
    assert_same(logits, expected, f"logits after an edit of {name}")
    with torch.enable_grad(), traced.trace(tokens, attention_mask=mask):
        traced.get(name).output[:] = edit(traced.get(name).output.detach().clone())
        logits = traced.output.save()
    assert_same(logits.detach(), expected, f"logits after an edit of {name} in place")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe"])
@torch.no_grad()
def test_a_model_that_nnsight_has_wrapped_is_still_itself(
    checkpoint: Any, variant: str, dtype: torch.dtype
) -> None:
    """nnsight's wrapping is permanent; what copies modules (replay, routers silenced, a float32 twin) sees past it."""
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=dtype, device="cpu", verbose=False)
    tokens, _ = prompts()
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mlp.hook_expert_indices")
    expert = int(cache["blocks.0.mlp.hook_expert_indices"][0, 1, 0])

    def answers() -> dict[str, Any]:
        table = census(model, tokens[:, :6]).to_pandas()
        routers = RouterOnly("A0", receivers=(1, 2), hold_outputs=True)
        losses, receipt = run_with_interventions(model, tokens, routers, return_type="loss")
        silenced = silence(model, tokens, f"M0E{expert}", by="layer").to_frame()
        return {"census": table, "loss": losses, "receipt": receipt.to_frame(), "silence": silenced}

    before = answers()
    NNsight(model)
    assert "__nnsight__" in model.blocks[0].mlp.__dict__
    after = answers()
    # Every point counts as listened to, so attention is written out: other roundings, and other choices in bfloat16.
    torch.testing.assert_close(
        after["loss"], before["loss"], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0
    )
    assert list(after["receipt"].fired) == list(before["receipt"].fired)
    for name in ("census", "silence"):
        assert before[name].shape == after[name].shape
        if dtype == torch.float32:
            pd.testing.assert_frame_equal(before[name], after[name], rtol=1e-4, atol=1e-5)

"""The hook contract, the seeing half: names, values, firing once, position slices, unknown names.

Each test runs over every hook point of every variant. What edits do is in test_hook_edits.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from tests.families import FAMILIES, VARIANTS, prompts
from tests.reference import assert_same, reference_cache

PADDINGS = ("none", "left", "right")
INTEGER = "hook_expert_indices"


# --- names and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_hook_points_are_those_of_the_table(model_of: Any, hf: Any, variant: str) -> None:
    assert set(model_of(variant).hook_dict) == set(reference_cache(hf(variant), *prompts()))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_value_equals_the_reference(model_of: Any, hf: Any, variant: str, padding: str) -> None:
    """All hooks listened to at once, at all positions, padded ones included."""
    model, (tokens, mask) = model_of(variant), prompts(padding)
    expected = reference_cache(hf(variant), tokens, mask)
    model.set_use_attn_result(True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
        plain = model(tokens, attention_mask=mask)
    assert isinstance(cache, ActivationCache)
    assert set(cache.keys()) == set(expected)
    for name, value in expected.items():
        assert_same(cache[name], value, name)
    torch.testing.assert_close(logits[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_value_when_listened_to_alone(model_of: Any, hf: Any, variant: str) -> None:
    """A hook gives the same value whatever else is listened to, and listening leaves the logits as they were."""
    model, (tokens, mask) = model_of(variant), prompts("left")
    unheard = model(tokens, attention_mask=mask)
    for name, value in reference_cache(hf(variant), tokens, mask).items():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=name)
        assert list(cache.keys()) == [name]
        assert_same(cache[name], value, name)
        assert_same(logits, unheard, f"logits while listening to {name}")


@pytest.mark.parametrize("variant", FAMILIES)
def test_listening_changes_nothing_with_gradients(model_of: Any, variant: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts("right")
    unheard = model(tokens, attention_mask=mask).detach()
    for name in model.hook_dict:
        nothing = [(name, lambda value, hook: None)]
        logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=nothing)
        assert_same(logits.detach(), unheard, f"logits while listening to {name}")


def test_filters(model_of: Any) -> None:
    """A name, a list of names and a predicate select hooks; a plain dict comes back on request."""
    model, (tokens, _) = model_of("qwen2_moe"), prompts()
    run = partial(model.run_with_cache, tokens, return_cache_object=False)
    one, two = "blocks.1.mlp.hook_router_logits", "blocks.0.hook_attn_out"
    assert list(run(names_filter=one)[1]) == [one]
    assert set(run(names_filter=[one, two])[1]) == {one, two}
    predicate = run(names_filter=lambda name: name.endswith("hook_routing_weights"))[1]
    assert set(predicate) == {f"blocks.{layer}.mlp.hook_routing_weights" for layer in range(3)}
    assert type(predicate) is dict
    assert set(run()[1]) == {name for name in model.hook_dict if not name.endswith("hook_result")}
    model.set_use_attn_result(True)
    assert set(run()[1]) == set(model.hook_dict)


def test_remove_batch_dim(model_of: Any, hf: Any) -> None:
    model, (tokens, _) = model_of("deepseek_v2"), prompts(batch=1)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True, return_cache_object=False)
    for name, value in reference_cache(hf("deepseek_v2"), tokens).items():
        if name in cache:
            assert_same(cache[name], value[0], name)
    with pytest.raises((ValueError, AssertionError), match="batch"):
        model.run_with_cache(prompts()[0], remove_batch_dim=True)


# --- firing exactly once ------------------------------------------------------------------------------------


def listen(model: Any, name: str, way: str, note: Callable[[], None]) -> Callable[[], None]:
    """Put a listener on a point in one of four ways; returns what takes it off."""
    point = model.hook_dict[name]
    if way == "TransformerLens":
        point.add_hook(lambda value, hook: note())
        return point.remove_hooks
    handle = {
        "forward": lambda: point.register_forward_hook(lambda module, args, out: note()),
        "forward pre": lambda: point.register_forward_pre_hook(lambda module, args: note()),
        "backward": lambda: point.register_full_backward_hook(lambda module, g_in, g_out: note()),
        "backward pre": lambda: point.register_full_backward_pre_hook(lambda module, g_out: note()),
    }[way]()
    return handle.remove


WAYS = ("TransformerLens", "forward", "forward pre", "backward", "backward pre")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_point_fires_once_when_all_are_listened_to(model_of: Any, variant: str, way: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts("left")
    fired: Counter[str] = Counter()
    undo = [listen(model, name, way, partial(fired.update, [name])) for name in model.hook_dict]
    loss = model(tokens, attention_mask=mask, return_type="loss")
    if way.startswith("backward"):
        loss.backward()
        model.zero_grad()
    for take_off in undo:
        take_off()
    names = [name for name in model.hook_dict if not (way.startswith("backward") and name.endswith(INTEGER))]
    assert fired == Counter(names)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_point_fires_once_when_listened_to_alone(model_of: Any, variant: str, way: str) -> None:
    model, (tokens, mask) = model_of(variant), prompts("right")
    for name in model.hook_dict:
        fired: list[str] = []
        take_off = listen(model, name, way, partial(fired.append, name))
        loss = model(tokens, attention_mask=mask, return_type="loss")
        if way.startswith("backward"):
            loss.backward()
            model.zero_grad()
        take_off()
        assert fired == ([] if way.startswith("backward") and name.endswith(INTEGER) else [name])


# --- position slices ----------------------------------------------------------------------------------------

SLICES: dict[str, tuple[Any, Any]] = {  # what is asked for, and the same as an index on the position axis
    "int": (3, [3]),
    "last": (-1, [-1]),
    "dropping the axis": (Slice(3), 3),
    "range": ((2, 5), slice(2, 5)),
    "slice": (slice(1, None, 2), slice(1, None, 2)),
    "list": ([4, 0, 6], [4, 0, 6]),
    "tensor": (torch.tensor([5, 1]), [5, 1]),
}


def at_positions(value: Tensor, name: str, index: Any) -> Tensor:
    """Positions of a full value: the query axis of scores and patterns, the second axis of all others."""
    if name.removesuffix("_grad").endswith(("hook_attn_scores", "hook_pattern")):
        return value[:, :, index]
    return value[:, index]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pos_slice(model_of: Any, variant: str) -> None:
    """Slices positions, and nothing else, on every hook and on every gradient."""
    model, (tokens, _) = model_of(variant), prompts()
    model.set_use_attn_result(True)
    run = partial(model.run_with_cache, tokens, return_type="loss", return_cache_object=False)
    _, whole = run(incl_bwd=True)
    gradients = {f"{name}_grad" for name in model.hook_dict if not name.endswith(INTEGER)}
    assert set(whole) == set(model.hook_dict) | gradients
    for kind, (pos_slice, index) in SLICES.items():
        with_gradients = kind in ("int", "list")
        with torch.set_grad_enabled(with_gradients):
            _, sliced = run(pos_slice=pos_slice, incl_bwd=with_gradients)
        assert set(sliced) == (set(whole) if with_gradients else set(model.hook_dict))
        for name, value in sliced.items():
            assert_same(value, at_positions(whole[name], name, index), f"{name}, {kind}")
    model.zero_grad()


def test_pos_slice_without_batch_dim(model_of: Any) -> None:
    model, (tokens, _) = model_of("qwen2_moe"), prompts(batch=1)
    _, whole = model.run_with_cache(tokens, return_cache_object=False)
    _, sliced = model.run_with_cache(
        tokens, pos_slice=(2, 4), remove_batch_dim=True, return_cache_object=False
    )
    for name, value in whole.items():
        torch.testing.assert_close(sliced[name], at_positions(value, name, slice(2, 4))[0], msg=name)


# --- names that match nothing -------------------------------------------------------------------------------

NOWHERE: dict[str, Any] = {
    "name": "blocks.0.mlp.hook_router_logit",
    "layer": "blocks.7.hook_resid_pre",
    "module": "blocks.0.mlp",
    "predicate": lambda name: name.endswith("hook_mlp_in"),
}


@pytest.mark.parametrize("filter_kind", NOWHERE)
@pytest.mark.parametrize("variant", FAMILIES)
def test_what_matches_nothing_raises(model_of: Any, variant: str, filter_kind: str) -> None:
    """Through every door, and nothing is left behind, though an earlier entry of the list was fine."""
    model, (tokens, _) = model_of(variant), prompts()
    nowhere = NOWHERE[filter_kind]

    def keep(value: Tensor, hook: Any) -> None:
        return None

    good = ("blocks.0.hook_resid_pre", keep)
    with pytest.raises(ValueError, match="hook"):
        model.run_with_cache(tokens, names_filter=nowhere)
    with pytest.raises(ValueError, match="hook"):
        model.run_with_hooks(tokens, fwd_hooks=[good, (nowhere, keep)])
    with pytest.raises(ValueError, match="hook"):
        model.run_with_hooks(tokens, fwd_hooks=[good], bwd_hooks=[(nowhere, keep)])
    with pytest.raises(ValueError, match="hook"), model.hooks(fwd_hooks=[good, (nowhere, keep)]):
        pass
    with pytest.raises(ValueError, match="hook"), model.hooks(bwd_hooks=[(nowhere, keep)]):
        pass
    with pytest.raises(ValueError, match="hook"):
        model.add_hook(nowhere, keep)
    with pytest.raises(ValueError, match="hook"):
        model.add_perma_hook(nowhere, keep)
    with pytest.raises(ValueError, match="hook"):
        model.add_caching_hooks(nowhere)
    assert model.context_level == 0


def test_a_list_with_one_wrong_name_raises_and_says_which(model_of: Any) -> None:
    model, (tokens, _) = model_of("olmoe"), prompts()
    names = ["blocks.0.mlp.hook_router_logits", "blocks.0.mlp.hook_router_logit"]
    with pytest.raises(ValueError, match=r"hook_router_logit'.*hook_router_logits"):
        model.run_with_cache(tokens, names_filter=names)
    with pytest.raises(ValueError, match="empty"):
        model.run_with_cache(tokens, names_filter=[])


def test_hooks_of_a_family_without_them_are_unknown(model_of: Any) -> None:
    """A hook that other families have is not silently dead in one that has not."""
    tokens, _ = prompts()
    for variant, name in [
        ("olmoe", "blocks.0.mlp.hook_shared_out"),
        ("deepseek_v2", "blocks.1.mlp.hook_shared_gate"),
        ("deepseek_v2", "blocks.0.mlp.hook_router_logits"),
        ("qwen3_moe", "blocks.0.mlp.hook_post"),
    ]:
        with pytest.raises(ValueError, match="no hook named"):
            model_of(variant).run_with_cache(tokens, names_filter=name)


def test_a_hook_that_the_run_did_not_reach_raises(model_of: Any) -> None:
    """Stopping early is no reason for silence about a hook asked for by its name."""
    model, (tokens, _) = model_of("mixtral"), prompts()
    late = "blocks.1.hook_resid_post"
    with pytest.raises(RuntimeError, match=late):
        model.run_with_cache(tokens, names_filter=[late], stop_at_layer=1)
    with pytest.raises(RuntimeError, match=late):
        model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=[(late, lambda value, hook: None)])


def test_hooks_are_gone_after_an_error(model_of: Any) -> None:
    """A hook that raises takes its error out, and leaves nothing on the model."""
    model, (tokens, _) = model_of("mixtral"), prompts()

    def fail(value: Tensor, hook: Any) -> None:
        raise KeyError("from the hook")

    with pytest.raises(KeyError, match="from the hook"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", fail)])

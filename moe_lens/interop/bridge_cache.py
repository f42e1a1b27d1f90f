"""What a TransformerBridge's cache holds, under this library's names and in its shapes.

Most of a bridge's hooks have our name and meaning: streams, what attention and MLP wrote, norms' scales (the
denominator) and normalised streams, patterns, z. These do not:

    attn.hook_z (latent attention)      cut into pieces of another width than a head's; the numbers are in our order
    attn.hook_v (latent attention)      `batch head pos d`, ours is `batch pos head d`
    attn.hook_v (where values are cut)  the projection, before the clip; ours is what is attended to
    mlp.hook_shared_...                 `shared_expert` and `shared_experts`, the one flattened over batch and
                                        positions, its gate in logits and its output before the gate
    mlp.hook_expert_post                is nowhere in a bridge; it is computed anew from what the layer read, its
                                        choice and its weights

Each is made from the bridge's values by what the model itself does with them; nothing is estimated. Where the run was
edited between what is read and what is made of it (an expert's output, say), parts do not sum to the whole, as in a
HookedMoE whose `hook_expert_out` was edited; the results' `completeness_error` tells, and in half precision, where
`rounding` takes what is left, their `rounding_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache

from moe_lens.config import GroupedQueryAttentionConfig
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.moe import MoE

Value = Float[Tensor, "batch pos *rest"]


class Reading(NamedTuple):
    """How one of our values is read from a bridge: from which hooks, and what is made of their values."""

    hooks: tuple[str, ...]
    make: Callable[..., Value]


def bridge_hooks(view: HookedMoE, names: Sequence[str]) -> list[str]:
    """The bridge's hooks that these of ours are read from. `view` has the bridge's weights."""
    return list(dict.fromkeys(hook for name in names for hook in _reading(view, name).hooks))


def translated(
    view: HookedMoE,
    cache: ActivationCache | Mapping[str, Tensor],
    names: Sequence[str],
    stream: str,
    *,
    listed_by: str,
) -> dict[str, Tensor]:
    """A bridge's cached values under our names.

    Args:
        view: with the bridge's weights.
        names: the hooks that are wanted, of ours.
        stream: one of them, `[batch, pos, d_model]` on both sides, which says what batch and positions are.
        listed_by: the call that lists the bridge's hooks, for the error where one is missing.

    Raises:
        KeyError: the cache lacks some of the bridge's hooks, which are named.
        ValueError: the cache is without its batch axis, or of part of the positions where a value is flattened over
            them.
    """
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    missing = [hook for hook in bridge_hooks(view, names) if hook not in stored]
    if missing:
        raise KeyError(
            f"the cache lacks {', '.join(missing)}; with attach(bridge): bridge.run_with_cache(..., "
            f"names_filter={listed_by}) caches what is needed"
        )
    if stored[stream].ndim != 3:
        raise ValueError(
            f"{stream} in the cache is {tuple(stored[stream].shape)}, without its batch and position axes; cache with "
            f"remove_batch_dim=False and positions kept"
        )
    batch_and_pos = stored[stream].shape[:2]
    values: dict[str, Tensor] = {}
    for name in names:
        hooks, make = _reading(view, name)
        values[name] = make(*(_placed(stored[hook], hook, batch_and_pos) for hook in hooks))
    return values


def _placed(value: Tensor, hook: str, batch_and_pos: Sequence[int]) -> Tensor:
    """A value that is flattened over tokens, in batch and positions."""
    if value.ndim != 2:
        return value
    if len(value) != batch_and_pos[0] * batch_and_pos[1]:
        raise ValueError(
            f"{hook} in the cache is {tuple(value.shape)}, which is not of the {tuple(batch_and_pos)} batch rows and "
            f"positions of the stream; it is flattened over them, so cache it without pos_slice"
        )
    return value.unflatten(0, tuple(batch_and_pos))


def _reading(view: HookedMoE, name: str) -> Reading:
    cfg = view.cfg
    latent = not isinstance(cfg.attention, GroupedQueryAttentionConfig)
    if name.endswith("attn.hook_z") and latent:
        return Reading(
            (name,), lambda z: z.flatten(2).unflatten(2, (cfg.attention.n_heads, cfg.attention.d_value))
        )
    if name.endswith("attn.hook_v") and latent:
        return Reading((name,), lambda v: rearrange(v, "b head p d -> b p head d"))
    if name.endswith("attn.hook_v") and cfg.attention.clip is not None:  # type: ignore[union-attr]
        limit = cfg.attention.clip  # type: ignore[union-attr]
        return Reading((name,), lambda v: v.clamp(-limit, limit))
    if name.endswith("mlp.hook_expert_post"):
        mlp: Any = view.get_submodule(name.removesuffix(".hook_expert_post"))
        inputs = (
            name.replace("hook_expert_post", "hook_in"),
            name.replace("hook_expert_post", "hook_expert_indices"),
        )
        return Reading(inputs, lambda x, indices: _neurons(mlp, x, indices))
    layer, separator, part = name.partition(".mlp.hook_shared_")
    if not separator:
        return Reading((name,), lambda value: value)
    assert cfg.shared is not None
    expert, gate = f"{layer}.mlp.shared_expert", f"{layer}.mlp.shared_expert_gate.hook_out"
    if not cfg.shared.gated:
        return Reading((f"{expert}s.hook_{part}",), lambda value: value)
    if part == "gate":
        return Reading((gate,), lambda logits: logits.sigmoid())
    if part == "out":
        return Reading((gate, f"{expert}.hook_out"), lambda logits, out: logits.sigmoid() * out)
    return Reading((f"{expert}.hook_{part}",), lambda value: value)


@torch.no_grad()
def _neurons(
    mlp: MoE, x: Float[Tensor, "batch pos d_model"], indices: Int[Tensor, "batch pos k"]
) -> Float[Tensor, "batch pos k d_expert"]:
    """The activations of the chosen experts' neurons, by the layer's own code."""
    kept: list[Tensor] = []

    def keep(point: nn.Module, args: Any, activations: Tensor) -> None:
        kept.append(activations)

    device = mlp.router.weight.device
    handle = mlp.hook_expert_post.register_forward_hook(keep)
    try:
        mlp.run_experts(x.detach().to(device), indices.to(device))
    finally:
        handle.remove()
    return kept[0]

"""This library's routing hooks and attributions on a TransformerBridge.

TransformerLens 4.3's bridge runs a transformers model with TransformerLens's hook points, but sees little of its
experts: the router's flattened logits, which cannot be edited to re-route, and the layer's output. `attach(bridge)`
adds the points of `moe_lens.interop.transformers` to the bridge's own `hook_dict`, and `router_logit_attrs` and
`logit_attrs` read caches that the bridge makes.

Of this library's families TransformerLens 4.3 has an adapter for each:

| family | adapter of | what its hooks mean otherwise than ours (see `bridge_cache`) |
|---|---|---|
| OLMoE | `OlmoeForCausalLM` | values before the clip, where the config has one |
| Qwen1.5-MoE | `Qwen2MoeForCausalLM` | the shared expert flattened, its gate before the sigmoid |
| DeepSeek-V2 | `DeepseekV2ForCausalLM` | values with heads before positions, z in other pieces |
| Qwen3-MoE | `Qwen3MoeForCausalLM` | |
| Mixtral | `MixtralForCausalLM` | |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from moe_lens.interop import transformers as on_transformers
from moe_lens.interop.bridge_cache import bridge_hooks, translated
from moe_lens.interop.expert_layers import unwrapped
from moe_lens.interop.shared_weights import hooked_view
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing import attribution, logit_attribution
from moe_lens.routing.attribution import RouterLogitAttrs
from moe_lens.routing.logit_attribution import LogitAttrs, Positions, Tokens

_VIEWS: WeakKeyDictionary[PreTrainedModel, tuple[tuple[tuple[int, int], ...], HookedMoE]] = (
    WeakKeyDictionary()
)
"""The view of each bridge's model that was asked for, with where its weights lay."""


@contextmanager
def attach(bridge: TransformerBridge) -> Iterator[TransformerBridge]:
    """Give a bridge this library's hook points on its MoE layers, for the time of the context.

        with attach(bridge):
            logits, cache = bridge.run_with_cache(tokens)
            cache["blocks.3.mlp.hook_expert_contrib"]

    The points are those of `moe_lens.interop.transformers.attach`, with its shapes and what its edits do:
    `blocks.{l}.mlp.hook_router_logits` (an edit re-routes), `hook_expert_indices`, `hook_routing_weights`,
    `hook_expert_out` and `hook_expert_contrib`. They stand in `bridge.hook_dict` and on `bridge.blocks[l].mlp`, and
    `run_with_cache`, `run_with_hooks`, `hooks` and `add_hook` of the bridge know them by these names.

    `blocks.{l}.mlp.hook_expert_indices` is otherwise the bridge's other name for `mlp.gate.hook_expert_indices`, which
    is flattened; in the context it is ours, and the bridge's own keeps its first name. The bridge's points on its
    router (`mlp.gate...`) can be read in the context; an edit of its choice or weights there raises, since hooks on
    ours have seen others.

    Args:
        bridge: any that runs a transformers MoE which uses transformers' experts interface. Its modules, its hook
            points and its model are as before when the context ends, also by an exception; hooks that were left on
            the points are gone.

    Returns:
        A context manager; it gives the bridge.

    Raises:
        TypeError: not a bridge, or one that runs no transformers model in this process.
        ValueError: a model that `moe_lens.interop.transformers.attach` refuses (without experts, say), one that is
            attached already, or an MoE layer that is not some `blocks[l].mlp` of the bridge.
        RouterNotUnderstood, SlotSumError: in a run, see `moe_lens.interop.transformers.attach`.
    """
    with on_transformers.attach(_model_of(bridge)) as attached, ExitStack() as restore:
        for layer in attached.layers:
            _show(bridge, layer.where.name, layer.where.block, dict(layer.points.named_children()), restore)
        yield bridge


def _model_of(bridge: TransformerBridge) -> PreTrainedModel:
    """The transformers model that a bridge runs.

    Raises:
        TypeError: there is none.
    """
    if not isinstance(bridge, TransformerBridge):
        raise TypeError(
            f"not a TransformerBridge but a {type(bridge).__name__}; for a transformers model there is "
            f"moe_lens.interop.transformers.attach, and a HookedMoE has these hook points itself"
        )
    model = getattr(bridge, "original_model", None)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"this bridge runs no transformers model in this process but {type(model).__name__}")
    return model


def _show(
    bridge: TransformerBridge, name: str, block: nn.Module, points: Mapping[str, Any], restore: ExitStack
) -> None:
    """Put a layer's hook points into a bridge, with what takes them out again."""
    try:
        component: Any = bridge.get_submodule(name)
    except AttributeError:
        component = None
    if component is None or unwrapped(component) is not block:
        raise ValueError(f"the bridge has no component {name} for the {type(block).__name__} of its model")
    # Where the bridge has another point under one of these names, the name now leads to ours.
    own_aliases = component.hook_aliases
    component.hook_aliases = {alias: alias if alias in points else to for alias, to in own_aliases.items()}
    restore.callback(setattr, component, "hook_aliases", own_aliases)
    for short, point in points.items():
        assert isinstance(point, HookPoint)
        _put(bridge._hook_registry, f"{name}.{short}", point, restore)  # type: ignore[arg-type]
        _put(component.__dict__, short, point, restore)


def _put(table: dict[str, Any], key: str, value: Any, restore: ExitStack) -> None:
    """Set an entry, to be put back as it was."""
    if key in table:
        restore.callback(table.__setitem__, key, table[key])
    else:
        # Whoever scanned the bridge anew may have dropped it already.
        restore.callback(table.pop, key, None)
    table[key] = value


def attribution_hooks(bridge: TransformerBridge, receivers: Sequence[int], *, by: str = "layer") -> list[str]:
    """The bridge's hook names that `router_logit_attrs` reads for these receivers: a `names_filter` for
    `bridge.run_with_cache`, inside `attach`.

    Raises:
        ValueError: a receiver that is no MoE layer, an unknown granularity, or weights that the bridge has processed.
        TypeError, UnsupportedCheckpoint, CheckpointMismatch: see `router_logit_attrs`.
    """
    view = _view_of(bridge)
    return bridge_hooks(view, attribution.attribution_hooks(view, receivers, by=by))


def router_logit_attrs(
    bridge: TransformerBridge,
    cache: ActivationCache | Mapping[str, Tensor],
    *,
    receiver: int,
    by: str = "layer",
) -> RouterLogitAttrs:
    """`moe_lens.routing.attribution.router_logit_attrs` of a cache that a bridge made: the logits of one router,
    divided among the components that wrote into the stream it reads.

    Args:
        bridge: the one that the cache is of; its model's weights are read where they are (`hooked_view`).
        cache: of `bridge.run_with_cache` inside `attach`, with at least the hooks of `attribution_hooks`, and with its
            batch axis and all positions.
        receiver: the MoE layer whose router is explained.
        by: `"layer"`, `"head"`, `"source"`, `"expert"` or `"neuron"`.

    Returns:
        Scores `[sender, batch, pos, expert]` in router logits, with the error of their sum.

    Raises:
        KeyError: the cache lacks hooks, which are named.
        ValueError: as `moe_lens.routing.attribution.router_logit_attrs`; a cache of part of the positions; weights
            that the bridge has processed (`enable_compatibility_mode`).
        TypeError: not a bridge that runs a transformers model.
        UnsupportedCheckpoint, CheckpointMismatch: its model is not of a family that `hooked_view` reads.
    """
    view = _view_of(bridge)
    needed = attribution.attribution_hooks(view, [receiver], by=by)
    listed_by = f"attribution_hooks(bridge, [{receiver}], by={by!r})"
    values = translated(view, cache, needed, attribution.receiver_hooks(receiver)[0], listed_by=listed_by)
    return attribution.router_logit_attrs(view, values, receiver=receiver, by=by)


def logit_attribution_hooks(bridge: TransformerBridge, *, by: str = "layer") -> list[str]:
    """The bridge's hook names that `logit_attrs` reads: a `names_filter` for `bridge.run_with_cache`, inside `attach`.

    Raises:
        ValueError, TypeError, UnsupportedCheckpoint, CheckpointMismatch: see `attribution_hooks`.
    """
    view = _view_of(bridge)
    return bridge_hooks(view, logit_attribution.logit_attribution_hooks(view, by=by))


def logit_attrs(
    bridge: TransformerBridge,
    cache: ActivationCache | Mapping[str, Tensor],
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    by: str = "layer",
    positions: Positions | None = None,
) -> LogitAttrs:
    """`moe_lens.routing.logit_attribution.logit_attrs` of a cache that a bridge made: the logits of some tokens, or
    their difference from those of others, divided among the components that wrote them.

    Args:
        bridge: the one that the cache is of; its model's weights are read where they are (`hooked_view`).
        cache: of `bridge.run_with_cache` inside `attach`, with at least the hooks of `logit_attribution_hooks`, and
            with its batch axis.
        tokens, incorrect_tokens, positions: as there.
        by: `"layer"`, `"head"`, `"source"`, `"expert"` or `"neuron"`.

    Returns:
        Scores `[sender, batch, pos]` in logits, with the error of their sum.

    Raises:
        KeyError, ValueError, TypeError, UnsupportedCheckpoint, CheckpointMismatch: see `router_logit_attrs`, and
            `moe_lens.routing.logit_attribution.logit_attrs` for tokens and positions.
    """
    view = _view_of(bridge)
    needed = logit_attribution.logit_attribution_hooks(view, by=by)
    listed_by = f"logit_attribution_hooks(bridge, by={by!r})"
    values = translated(view, cache, needed, logit_attribution.final_hooks(view)[0], listed_by=listed_by)
    return logit_attribution.logit_attrs(view, values, tokens, incorrect_tokens, by=by, positions=positions)


def _view_of(bridge: TransformerBridge) -> HookedMoE:
    """The bridge's weights as a HookedMoE.

    Raises:
        TypeError, ValueError, UnsupportedCheckpoint, CheckpointMismatch: see `router_logit_attrs`.
    """
    model = _model_of(bridge)
    if bridge._weights_processed:
        raise ValueError(
            "the bridge has processed its weights (folded norms, centred or folded others), so that its components "
            "write and read other vectors than the model's; use a bridge without that, or with "
            "enable_compatibility_mode(no_processing=True)"
        )
    # A view is made in a second where there are thousands of experts, and one is asked for at every router.
    memory = tuple((id(parameter), parameter.data_ptr()) for parameter in model.parameters())
    if model not in _VIEWS or _VIEWS[model][0] != memory:
        _VIEWS[model] = memory, hooked_view(model)
    view = _VIEWS[model][1]
    view.tokenizer = bridge.tokenizer
    return view

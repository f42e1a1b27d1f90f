"""Where a transformers model has its Mixture-of-Experts layers, and what each is called here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_ROUTER_NAMES = ("gate", "router")
# Under which name a component of a TransformerBridge holds the module in whose place it stands.
_WRAPPED = "_original_component"


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One MoE layer of a transformers model.

    Attributes:
        name: here, `blocks.{l}.mlp`, with the name of its stack of layers in front where a model has several.
        path: of the experts, in the model.
        block: the module that calls router and experts.
        experts, router: those.
    """

    name: str
    path: str
    block: nn.Module
    experts: Any
    router: nn.Module

    def __str__(self) -> str:
        return f"{self.name} ({type(self.router).__name__} and {type(self.experts).__name__} at {self.path})"


def require_transformers_model(model: object, otherwise: str) -> None:
    """See that something is a transformers model.

    Args:
        otherwise: what there is for models held in another way, for the error.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"not a transformers model but a {type(model).__name__}; give the model itself (of a wrapper, what it "
            f"wraps). {otherwise}"
        )


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's class is experts that dispatch through `ALL_EXPERTS_FUNCTIONS`, which is what
    `use_experts_implementation` makes of a class."""
    forward = type(module).forward
    if not inspect.isfunction(forward) or not hasattr(forward, "__wrapped__"):
        return False
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") is ALL_EXPERTS_FUNCTIONS


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """The MoE layers of a model, in the order of its modules.

    Raises:
        ValueError: no module uses the experts interface, a layer's router is not found beside its experts, the
            experts are split over devices, or two layers would have one name.
    """
    modules = dict(model.named_modules())
    paths = [path for path, module in modules.items() if uses_interface(module)]
    if not paths:
        raise ValueError(_what_is_missing(model, modules))
    names = layer_names(paths)
    if len(set(names.values())) < len(names):
        raise ValueError(f"layers at different paths would have the same name: {names}")
    return [_layer(path, names[path], modules) for path in paths]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where a TransformerBridge has put a component in its place."""
    while _WRAPPED in module._modules:
        inner = module._modules[_WRAPPED]
        assert inner is not None
        module = inner
    return module


def _layer(path: str, name: str, modules: dict[str, nn.Module]) -> ExpertLayer:
    experts: Any = modules[path]
    # Where the experts stand, in a component's place or not.
    place = path.removesuffix(f".{_WRAPPED}")
    block = modules[place.rpartition(".")[0]]
    routers = [unwrapped(child) for key, child in block.named_children() if key in _ROUTER_NAMES]
    if len(routers) != 1:
        raise ValueError(
            f"{path}: its router is sought beside it in {type(block).__name__}, under the name "
            f"{' or '.join(_ROUTER_NAMES)}; there are {', '.join(key for key, _ in block.named_children())}"
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{path}: its experts are split over devices (expert parallelism), so none has all slots of a token"
        )
    return ExpertLayer(name, path, block, experts, routers[0])


def _what_is_missing(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    like = sorted({type(m).__name__ for m in modules.values() if "expert" in type(m).__name__.lower()})
    if not like:
        return f"{kind} ({type(model).__name__}) has no experts: attach takes a Mixture-of-Experts model"
    return (
        f"{kind} ({type(model).__name__}) does not use transformers' experts interface: its {', '.join(like)} would "
        f"have to be decorated with transformers.integrations.use_experts_implementation and dispatch through "
        f"ALL_EXPERTS_FUNCTIONS (experts replaced by a quantizer do not)"
    )


def layer_names(paths: list[str]) -> dict[str, str]:
    """`blocks.{l}.mlp` for each path to experts, `l` being its index in the model's list of layers.

    Layers whose paths differ in more than the index are of several stacks (a vision tower beside a language
    model, experts for each modality). There each name begins with the parts that only that stack's paths have.
    """
    split = {path: _around_index(path) for path in paths}
    stacks = list(dict.fromkeys((before, after) for before, _, after in split.values()))
    if len(stacks) == 1:
        return {path: f"blocks.{index}.mlp" for path, (_, index, _) in split.items()}
    parts = [[*before.split("."), *after.split(".")] for before, after in stacks]
    shared = set(parts[0]).intersection(*parts[1:])
    labels = {
        stack: ".".join(part for part in own if part and part not in shared)
        for stack, own in zip(stacks, parts, strict=True)
    }
    return {
        path: f"{labels[before, after]}.blocks.{index}.mlp".lstrip(".")
        for path, (before, index, after) in split.items()
    }


def _around_index(path: str) -> tuple[str, str, str]:
    """What stands before the last number in a path, the number, what comes after."""
    parts = path.split(".")
    at = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), None)
    if at is None:
        return ".".join(parts[:-1]), "0", parts[-1]
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])

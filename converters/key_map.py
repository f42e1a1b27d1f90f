"""Where each tensor of a checkpoint goes.

A key map sends the checkpoint's tensor names to places in the model, with `{layer}` and `{expert}` standing
for numbers:

    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": "blocks.{layer}.mlp.experts.W_down[{expert}].T"

A place is a tensor of the model under its own name, an entry of a stack (`[{expert}]`), or the transpose of
either (`.T`): always a view of one parameter, into which the tensor is copied. `None` marks tensors that are
recomputed from the config. A place that a model does not have (the bias of a family that has none, the
experts of a dense layer) takes no part; every parameter must be covered, so nothing can be forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lens.config import MoEConfig
from moe_lens.converters.errors import CheckpointMismatch

KeyMap = dict[str, str | None]

# Shared by all families whose transformers module is named in the Llama way.
DECODER: KeyMap = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{layer}.input_layernorm.weight": "blocks.{layer}.ln1.w",
    "model.layers.{layer}.post_attention_layernorm.weight": "blocks.{layer}.ln2.w",
    "model.norm.weight": "ln_final.w",
    "lm_head.weight": "unembed.weight",
    # Old checkpoints carry the rotary frequencies; the config gives them.
    "model.layers.{layer}.self_attn.rotary_emb.inv_freq": None,
}

ATTENTION: KeyMap = {
    f"model.layers.{{layer}}.self_attn.{name}_proj.{part}": f"blocks.{{layer}}.attn.{name}_proj.{part}"
    for name in ("q", "k", "v", "o")
    for part in ("weight", "bias")
}

QUERY_KEY_NORM: KeyMap = {
    "model.layers.{layer}.self_attn.q_norm.weight": "blocks.{layer}.attn.q_norm",
    "model.layers.{layer}.self_attn.k_norm.weight": "blocks.{layer}.attn.k_norm",
}

ROUTED_EXPERTS: KeyMap = {
    "model.layers.{layer}.mlp.gate.weight": "blocks.{layer}.mlp.router.weight",
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": "blocks.{layer}.mlp.experts.W_gate[{expert}]",
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": "blocks.{layer}.mlp.experts.W_up[{expert}]",
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": "blocks.{layer}.mlp.experts.W_down[{expert}].T",
}

DENSE_MLP: KeyMap = {
    "model.layers.{layer}.mlp.gate_proj.weight": "blocks.{layer}.mlp.W_gate",
    "model.layers.{layer}.mlp.up_proj.weight": "blocks.{layer}.mlp.W_up",
    "model.layers.{layer}.mlp.down_proj.weight": "blocks.{layer}.mlp.W_down.T",
}

_PLACE = re.compile(r"(?P<path>[\w.]+?)(\[(?P<entry>\d+)\])?(?P<transposed>\.T)?")


@dataclass(frozen=True)
class Place:
    """A view of one of a model's parameters."""

    path: str
    entry: int | None
    transposed: bool

    @classmethod
    def parse(cls, text: str) -> Place:
        match = _PLACE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no place in a model")
        entry = match["entry"]
        return cls(match["path"], None if entry is None else int(entry), match["transposed"] is not None)

    def view(self, model: nn.Module) -> Tensor | None:
        """The tensor to copy into (it shares its parameter's memory); None where the model has no such place."""
        owner_path, _, attribute = self.path.rpartition(".")
        try:
            tensor = getattr(model.get_submodule(owner_path), attribute)
        except AttributeError:
            return None
        if tensor is None:
            return None
        if self.entry is not None:
            tensor = tensor[self.entry]
        return tensor.T if self.transposed else tensor


def placements(key_map: KeyMap, cfg: MoEConfig, model: nn.Module) -> dict[str, Place | None]:
    """Every checkpoint name the model needs, with its place; names with None are read past.

    Args:
        model: the model, or its shape alone (on the meta device).

    Raises:
        CheckpointMismatch: the map fills some parameter twice, or not wholly: an error in the map.
    """
    result: dict[str, Place | None] = {}
    covered: dict[int, int] = {}
    for name, place in key_map.items():
        for layer in range(cfg.n_layers) if "{layer}" in name else (0,):
            for expert in range(cfg.n_experts) if "{expert}" in name else (0,):
                numbered = name.format(layer=layer, expert=expert)
                if place is None:
                    result[numbered] = None
                    continue
                target = Place.parse(place.format(layer=layer, expert=expert))
                view = target.view(model)
                if view is None:
                    continue
                if cfg.tied_embeddings and target.path == "unembed.weight":
                    result[numbered] = None
                    continue
                result[numbered] = target
                owner = id(view if view._base is None else view._base)
                covered[owner] = covered.get(owner, 0) + view.numel()
    for name, parameter in model.named_parameters():
        if covered.get(id(parameter), 0) != parameter.numel():
            raise CheckpointMismatch(
                f"the key map of {cfg.model_type} fills {covered.get(id(parameter), 0)} of {parameter.numel()} "
                f"numbers of {name}"
            )
    return result


def check_tensors(
    needed: dict[str, Place | None], found: dict[str, tuple[int, ...]], model: nn.Module, model_type: str
) -> None:
    """Match a checkpoint's tensors (name to shape) with the model's, exactly.

    Raises:
        CheckpointMismatch: naming what is missing, surplus or misshapen.
    """
    problems = []
    missing = [name for name, place in needed.items() if place is not None and name not in found]
    surplus = [name for name in found if name not in needed]
    if missing:
        problems.append(f"missing {_some(missing)}")
    if surplus:
        problems.append(f"surplus {_some(surplus)}")
    for name, place in needed.items():
        if place is None or name not in found:
            continue
        view = place.view(model)
        assert view is not None
        if tuple(view.shape) != found[name]:
            problems.append(f"{name} has shape {list(found[name])}, the config asks for {list(view.shape)}")
    if problems:
        raise CheckpointMismatch(
            f"the checkpoint is not the {model_type} model of its config: {_some(problems, '; ')}"
        )


def _some(names: list[str], separator: str = ", ", at_most: int = 5) -> str:
    more = len(names) - at_most
    return separator.join(names[:at_most]) + (f" and {more} more" if more > 0 else "")

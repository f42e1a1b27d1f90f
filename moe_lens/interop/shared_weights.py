"""A transformers model's weights as a HookedMoE: the same memory under other names.

`hooked_view` makes a HookedMoE without weights of its own. Which tensor goes where is the converters' key map, as it
is for a checkpoint on disk, and transformers' own table says under which name it holds a checkpoint's tensors. So
for each parameter there is one tensor of the transformers model, as it is or transposed:

    experts.W_gate_up   [expert, 2 d_expert, d_model]   experts.gate_up_proj
    experts.W_down      [expert, d_expert, d_model]     experts.down_proj with its last two axes exchanged
    all others          one of their own, dense and shared experts' `W_down` transposed

Dense layers and shared experts are the exception. There transformers holds gate and up apart, where a HookedMoE has
both in one tensor, which no view of two can be; the view has them apart as well (`SplitGatedMLP`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from moe_lens.config import MoEConfig
from moe_lens.converters import CheckpointMismatch, converter_for
from moe_lens.converters.key_map import KeyMap, placements
from moe_lens.converters.loading import convert_config
from moe_lens.interop.expert_layers import require_transformers_model, unwrapped
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.mlp import DenseMLP, GatedMLP


def hooked_view(hf_model: PreTrainedModel, tokenizer: Any = None) -> HookedMoE:
    """A HookedMoE on the weights of a transformers model, without a copy of any.

    Its parameters are views of the model's: a change of the one in place is a change of the other. They are
    parameters of their own, with gradients apart from the model's, and they stay what they are when the model gets
    other tensors in their place (`to`, `load_state_dict(assign=True)`): make the view after that. Hooks and patched
    forwards of the transformers model have no part in the view. Dense layers and shared experts have gate and up
    weights apart, so that their products are two and not one: those may round otherwise than `from_pretrained`'s, and
    results' provenance tells the two models apart.

    Args:
        hf_model: of a family that has a converter, as transformers 5 makes it; also on the `meta` device, for the
            structure alone, and also inside a TransformerBridge (its `original_model`).
        tokenizer: for text; None goes without.

    Returns:
        The model, in eval mode, on the transformers model's device and in its dtype; each parameter requires a
        gradient where the model's does.

    Raises:
        TypeError: not a transformers model.
        UnsupportedCheckpoint: no converter for the model type, or a config feature that is not implemented.
        CheckpointMismatch: tensors that are missing, surplus (an adapter's, say), of another shape or dtype than the
            config asks for (quantised ones, say), on several devices, or tied against what the config says; named.
        NotImplementedError: a family of which transformers holds a parameter in several tensors.
    """
    require_transformers_model(
        hf_model, "That of a TransformerBridge is its original_model, and a HookedMoE needs no view"
    )
    hf_config = hf_model.config
    key_map = converter_for(hf_config.model_type).key_map
    cfg = convert_config(
        hf_config,
        name=hf_config.name_or_path or hf_config.model_type,
        dtype=hf_model.dtype,
        device=hf_model.device,
    )
    cfg = replace(cfg, **_generation_ids(hf_model))
    with torch.device("meta"):
        view = HookedMoE(cfg, tokenizer).to(cfg.dtype)
        _hold_gate_and_up_apart(view, cfg)
    sources = _sources(key_map, cfg, view)
    tensors = _checked(hf_model, cfg, view, sources)
    for name, source in sources.items():
        owner, _, attribute = name.rpartition(".")
        tensor = tensors[source.name]
        shared = nn.Parameter(source.view(tensor.detach()), requires_grad=tensor.requires_grad)
        setattr(view.get_submodule(owner), attribute, shared)
    view.cfg = cfg
    view.tie_embeddings()
    return view


class SplitGatedMLP(GatedMLP):
    """A gated MLP whose gate and up weights lie in two tensors."""

    def __init__(self, *sizes: Any):
        super().__init__(*sizes)
        gate, up = self.W_gate_up.chunk(2)
        del self.W_gate_up
        self.gate, self.up = nn.Parameter(gate), nn.Parameter(up)

    @property
    def W_gate(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.gate

    @property
    def W_up(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.up

    def project_in(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_mlp"], Float[Tensor, "batch pos d_mlp"]]:
        return F.linear(x, self.gate), F.linear(x, self.up)


class SplitDenseMLP(SplitGatedMLP, DenseMLP):
    """The MLP of a layer without experts, likewise."""


def _hold_gate_and_up_apart(view: HookedMoE, cfg: MoEConfig) -> None:
    for layer in range(cfg.n_layers):
        block: Any = view.blocks[layer]
        if isinstance(block.mlp, DenseMLP):
            block.mlp = SplitDenseMLP(cfg)
        elif block.mlp.shared is not None:
            assert cfg.shared is not None
            block.mlp.shared = SplitGatedMLP(cfg.d_model, cfg.shared.d_shared, cfg.act_fn)
    view.to(cfg.dtype)
    # The new modules' hook points get their names.
    view.setup()


@dataclass(frozen=True)
class _Source:
    """The transformers model's tensor that a parameter is a view of, and whether its last two axes are exchanged."""

    name: str
    transposed: bool

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self.transposed else tensor


def _sources(key_map: KeyMap, cfg: MoEConfig, view: HookedMoE) -> dict[str, _Source]:
    """For every parameter of the view its source."""
    # A parameter's places (a stack's entries, its halves) are views of it.
    names = {id(parameter): name for name, parameter in view.named_parameters()}
    transforms = get_checkpoint_conversion_mapping(cfg.model_type) or []
    found: dict[str, set[_Source]] = {}
    for name, place in placements(key_map, cfg, view).items():
        if place is None:
            continue
        for transform in transforms:
            name, _ = transform.rename_source_key(name)
        tensor = place.view(view)
        assert tensor is not None
        parameter = tensor if tensor._base is None else tensor._base
        found.setdefault(names[id(parameter)], set()).add(_Source(name, place.transposed))
    several = {name: sources for name, sources in found.items() if len(sources) > 1}
    if several:
        raise NotImplementedError(f"transformers holds in several tensors what a view has in one: {several}")
    return {name: source for name, (source,) in found.items()}


def _checked(
    hf_model: PreTrainedModel, cfg: MoEConfig, view: HookedMoE, sources: Mapping[str, _Source]
) -> dict[str, Tensor]:
    """The tensors that the sources name, after they were found to be all of the model's and what the config asks for.

    Raises:
        CheckpointMismatch: see `hooked_view`.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, source in sources.items():
        tensor = _tensor_at(hf_model, source.name)
        if tensor is None:
            problems.append(f"missing {source.name}")
            continue
        tensors[source.name] = tensor
        wanted, got = source.view(view.get_parameter(name)).shape, tensor.shape
        if got != wanted:
            problems.append(f"{source.name} has shape {list(got)}, the config asks for {list(wanted)}")
        if tensor.dtype != cfg.dtype:
            problems.append(f"{source.name} is in {tensor.dtype}, the model in {cfg.dtype}")
        if tensor.device != cfg.device:
            problems.append(f"{source.name} is on {tensor.device}, the model on {cfg.device}")
    embedding: Any = hf_model.get_input_embeddings()
    unembedding: Any = hf_model.get_output_embeddings()
    if cfg.tied_embeddings and unwrapped(unembedding).weight is not unwrapped(embedding).weight:
        problems.append(
            "the config says tie_word_embeddings=true, but the unembedding is a tensor of its own"
        )
    used = {id(tensor) for tensor in tensors.values()}
    problems += [f"surplus {name}" for name, tensor in hf_model.named_parameters() if id(tensor) not in used]
    if problems:
        raise CheckpointMismatch(
            f"{type(hf_model).__name__} is not the {cfg.model_type} model of its config, so that no HookedMoE can be a "
            f"view of it: {'; '.join(problems[:5])}{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}"
        )
    return tensors


def _tensor_at(hf_model: nn.Module, name: str) -> Tensor | None:
    """The parameter of this name, also where a TransformerBridge has put components between; None if there is none."""
    *path, attribute = name.split(".")
    module = hf_model
    for part in path:
        child = unwrapped(module)._modules.get(part)
        if child is None:
            return None
        module = child
    return unwrapped(module)._parameters.get(attribute)


def _generation_ids(hf_model: PreTrainedModel) -> dict[str, Any]:
    """Which tokens end a text, and which one fills a row that has ended."""

    def read(field: str) -> Any:
        stored = getattr(getattr(hf_model, "generation_config", None), field, None)
        return stored if stored is not None else getattr(hf_model.config, field, None)

    end = read("eos_token_id")
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return {"eos_token_ids": ends, "pad_token_id": read("pad_token_id")}

"""What every family's config reading has in common."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_lens.config import RotaryConfig
from moe_lens.converters.errors import UnsupportedCheckpoint

# Scalings whose frequencies do not change with the length of the input.
_STATIC_SCALINGS = ("linear", "yarn", "llama3")


def require(hf: Any, field: str, *implemented: Any, because: str = "") -> None:
    """Refuse a config whose `field` has a value that is not implemented; an absent field is None."""
    value = getattr(hf, field, None)
    if value not in implemented:
        wanted = " or ".join(repr(v) for v in implemented)
        raise UnsupportedCheckpoint(
            f"{hf.model_type}: config field {field}={value!r} is not implemented, only {wanted}"
            + (f" ({because})" if because else "")
        )


def decoder_facts(hf: Any) -> dict[str, Any]:
    """The fields of `MoEConfig` that every family's config gives under the same names.

    Raises:
        UnsupportedCheckpoint: a quantised checkpoint: its tensors are not the weights.
    """
    require(hf, "quantization_config", None, because="load the unquantised checkpoint")
    return {
        "model_name": hf.name_or_path,
        "n_layers": hf.num_hidden_layers,
        "d_model": hf.hidden_size,
        "d_vocab": hf.vocab_size,
        "n_ctx": hf.max_position_embeddings,
        "eps": hf.rms_norm_eps,
        "act_fn": hf.hidden_act,
        "tied_embeddings": hf.tie_word_embeddings,
    }


def read_rotary(hf: Any, d_rotary: int, pairs: Literal["halves", "adjacent"]) -> RotaryConfig:
    """Frequencies and scaling as transformers computes them from the config's `rope_parameters`."""
    parameters = dict(hf.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedCheckpoint(
            f"{hf.model_type}: config field rope_parameters.partial_rotary_factor="
            f"{parameters['partial_rotary_factor']} is not implemented, only 1.0"
        )
    if kind == "default":
        exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32) / d_rotary
        frequencies, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    elif kind in _STATIC_SCALINGS:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    else:
        raise UnsupportedCheckpoint(
            f"{hf.model_type}: config field rope_parameters.rope_type={kind!r} is not implemented, only "
            f"'default', {', '.join(map(repr, _STATIC_SCALINGS))}"
        )
    if frequencies.numel() != d_rotary // 2:
        raise UnsupportedCheckpoint(
            f"{hf.model_type}: rope_parameters give {frequencies.numel()} frequencies where {d_rotary} rotated "
            f"coordinates need {d_rotary // 2}"
        )
    return RotaryConfig(tuple(frequencies.tolist()), float(scaling), pairs)


def d_head_of(hf: Any) -> int:
    """The width of a head: the config's `head_dim`, else d_model shared out evenly."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def moe_layers_by_step(hf: Any) -> tuple[int, ...]:
    """The MoE layers of a Qwen config: every `decoder_sparse_step`-th, but those in `mlp_only_layers`."""
    return tuple(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers
        and hf.num_experts > 0
        and (layer + 1) % hf.decoder_sparse_step == 0
    )

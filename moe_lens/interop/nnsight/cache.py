"""`routing_cache`: the values of hook points, from a model in nnsight."""

from __future__ import annotations

from typing import Any

from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import NamesFilter

from moe_lens.interop.nnsight.jobs import Analysis, Job, Remote, Step, run
from moe_lens.interop.nnsight.model import facts_of, inputs_of, structure_of, tokens_of
from moe_lens.interop.nnsight.shipped.values import read_values
from moe_lens.model.hooked_moe import HookedMoE

INSIDE_THE_KERNEL = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")
"""Hook points that are not served: transformers' attention does not let them out."""


def served_points(structure: HookedMoE) -> list[str]:
    """The hook points whose values a trace can read, in the order in which they are made."""
    return [name for name in structure.hook_dict if not name.endswith(INSIDE_THE_KERNEL)]


def points_wanted(structure: HookedMoE, names_filter: NamesFilter) -> list[str]:
    """The hook points that a filter selects among those served; see `HookedMoE.matching_hooks`.

    Raises:
        ValueError: a name that does not exist, or is not served.
    """
    matched = structure.matching_hooks(names_filter)
    inside = [name for name in matched if name.endswith(INSIDE_THE_KERNEL)]
    if inside and names_filter is not None and not callable(names_filter):
        raise ValueError(
            f"{inside[0]} lies inside attention's kernel and cannot be read in a trace; HookedMoE has it, and here all "
            f"hook points but {', '.join(INSIDE_THE_KERNEL)}"
        )
    wanted = [name for name in matched if name not in inside]
    if not wanted:
        raise ValueError("the names filter matches only hook points inside attention's kernel")
    return wanted


def value_bytes(structure: HookedMoE, names: list[str], shape: tuple[int, int]) -> int:
    """Bytes of hook values `[batch, pos, ...]` of so many positions."""
    cfg = structure.cfg
    n_tokens, width = shape[0] * shape[1], cfg.dtype.itemsize
    per_token = 0
    for name in names:
        point = name.rpartition(".")[2]
        per_token += {
            "hook_scale": 4,
            "hook_q": cfg.n_heads * cfg.d_head * width,
            "hook_k": cfg.n_key_value_heads * cfg.d_head * width,
            "hook_v": cfg.n_key_value_heads * cfg.attention.d_value * width,
            "hook_z": cfg.n_heads * cfg.attention.d_value * width,
            "hook_result": cfg.n_heads * cfg.d_model * width,
            "hook_router_logits": cfg.n_experts * (4 if cfg.router.float32_logits else width),
            "hook_expert_weights": cfg.n_experts * 4,
            "hook_expert_indices": cfg.top_k * 8,
            "hook_routing_weights": cfg.top_k * (4 if cfg.router.float32_weights else width),
            "hook_expert_pre": cfg.top_k * cfg.d_expert * width,
            "hook_expert_pre_linear": cfg.top_k * cfg.d_expert * width,
            "hook_expert_post": cfg.top_k * cfg.d_expert * width,
            "hook_expert_out": cfg.top_k * cfg.d_model * width,
            "hook_expert_contrib": cfg.top_k * cfg.d_model * width,
            "hook_shared_gate": width,
            "hook_shared_out": cfg.d_model * width,
            **dict.fromkeys(
                ("hook_shared_pre", "hook_shared_pre_linear", "hook_shared_post"),
                0 if cfg.shared is None else cfg.shared.d_shared * width,
            ),
            **dict.fromkeys(("hook_pre", "hook_pre_linear", "hook_post"), cfg.d_mlp * width),
        }.get(point, cfg.d_model * width)
    return n_tokens * per_token


def cache_analysis(
    lm: TransformersModel,
    text: Any,
    *,
    names_filter: NamesFilter = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
) -> Analysis[ActivationCache]:
    """See `routing_cache`."""
    structure = structure_of(lm)
    wanted = points_wanted(structure, names_filter)
    tokens, mask = tokens_of(structure, text, attention_mask, prepend_bos)
    shape = (tokens.shape[0], tokens.shape[1])
    job = Job(
        function=read_values,
        arguments={"facts": facts_of(structure.cfg), "wanted": wanted, "shape": list(shape)},
        steps=[Step(inputs_of(tokens, mask))],
        result_bytes=value_bytes(structure, wanted, shape),
    )

    def finish(results: list[list[Any]]) -> ActivationCache:
        values = results[0][0]
        return ActivationCache({name: values[name] for name in wanted}, structure)

    return Analysis("routing_cache", [job], finish)


def routing_cache(
    lm: TransformersModel,
    text: Any,
    *,
    names_filter: NamesFilter = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    remote: Remote = False,
    verbose: bool = False,
) -> ActivationCache:
    """Run a text and keep the values of hook points, under the names and with the shapes that HookedMoE gives them.

    Args:
        lm: an nnsight `TransformersModel` of one of the five families; its weights need not be here where it runs
            remotely.
        text: one or several, padded on the right as HookedMoE pads them; or tokens `[batch, pos]`.
        names_filter: a name, several, or a predicate; None is every point that a trace can read. Ask for what you
            need: `bytes_down` of the plan says what it costs.
        attention_mask: of tokens; padding may lie on either side, and values there mean nothing.
        prepend_bos: as in `HookedMoE.tokenize`.
        remote: `False`, `True`, `"local"` or a URL; see `moe_lens.interop.nnsight.jobs`.
        verbose: print the plan first.

    Returns:
        What `HookedMoE.run_with_cache` gives on the same tokens, on the CPU where it ran remotely. Expert outputs and
        neurons are computed again from the experts' inputs; `attn.hook_rot_q`, `hook_rot_k`, `hook_attn_scores` and
        `hook_pattern` are not there. The cache's model has no weights, so methods of the cache that need them
        (`stack_head_results`, `logit_attrs`) do not work on it.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these.
        ValueError: an unknown hook name or one that is not served; tokens that make no sense; a wrong `remote`.
    """
    analysis = cache_analysis(
        lm, text, names_filter=names_filter, attention_mask=attention_mask, prepend_bos=prepend_bos
    )
    return run(lm, analysis, remote, verbose=verbose)

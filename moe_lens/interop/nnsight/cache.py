"""`routing_cache`: the values of hook points, from a model in nnsight."""

from __future__ import annotations

from typing import Any

from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import NamesFilter

from moe_lens.interop.nnsight.jobs import Analysis, Job, Remote, Step, run
from moe_lens.interop.nnsight.model import attention_facts, facts_of, inputs_of, structure_of, tokens_of
from moe_lens.interop.nnsight.shipped.values import read_values
from moe_lens.model.hooked_moe import HookedMoE

INSIDE_ATTENTION = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
"""Hook points whose values are computed again, for which angles and mask travel."""


def value_bytes(structure: HookedMoE, names: list[str], shape: tuple[int, int]) -> int:
    """Bytes of hook values `[batch, pos, ...]` of so many positions."""
    cfg = structure.cfg
    in_pattern = [name for name in names if name.endswith(("hook_attn_scores", "hook_pattern"))]
    n_tokens, width = shape[0] * shape[1], cfg.dtype.itemsize
    per_token = 0
    for name in set(names).difference(in_pattern):
        point = name.rpartition(".")[2]
        per_token += {
            "hook_scale": 4,
            **dict.fromkeys(("hook_q", "hook_rot_q"), cfg.n_heads * cfg.d_head * width),
            **dict.fromkeys(("hook_k", "hook_rot_k"), cfg.n_key_value_heads * cfg.d_head * width),
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
    return n_tokens * (per_token + len(in_pattern) * cfg.n_heads * shape[1] * width)


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
    wanted = structure.matching_hooks(names_filter)
    tokens, mask = tokens_of(structure, text, attention_mask, prepend_bos)
    shape = (tokens.shape[0], tokens.shape[1])
    facts = facts_of(structure.cfg)
    if any(name.endswith(INSIDE_ATTENTION) for name in wanted):
        facts.update(attention_facts(structure.cfg, mask))
    job = Job(
        function=read_values,
        arguments={"facts": facts, "wanted": wanted, "shape": list(shape)},
        steps=[Step(inputs_of(tokens, mask))],
        result_bytes=value_bytes(structure, wanted, shape),
    )

    def finish(results: list[list[Any]]) -> ActivationCache:
        values = results[0][0]
        for name in wanted:
            # The pattern's positions are its queries.
            axes = (0, 2) if name.endswith(("hook_attn_scores", "hook_pattern")) else (0, 1)
            if name not in values or tuple(values[name].shape[axis] for axis in axes) != shape:
                got = tuple(values[name].shape) if name in values else "nothing"
                raise RuntimeError(
                    f"{name} of {shape} batch rows and positions was asked for, and {got} came back"
                )
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
        names_filter: a name, several, or a predicate; None is every point (`attn.hook_result` by
            its name alone). Ask for what you need: `bytes_down` of the plan says what it costs.
        attention_mask: of tokens; padding may lie on either side, and values there mean nothing.
        prepend_bos: as in `HookedMoE.tokenize`.
        remote: `False`, `True`, `"local"` or a URL; see `moe_lens.interop.nnsight.jobs`.
        verbose: print the plan first.

    Returns:
        What `HookedMoE.run_with_cache` gives on the same tokens, on the CPU where it ran remotely. What transformers
        does not let out is computed again from what it does: expert outputs and neurons from the experts' inputs, and,
        where they are asked for, rotations, scores and pattern from queries and keys. The cache's model has no
        weights, so methods of the cache that need them (`stack_head_results`, `logit_attrs`) do not work on it.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these.
        ValueError: an unknown hook name; tokens that make no sense; a wrong `remote`.
        RuntimeError: a pattern that, computed again, does not make the model's z; an answer that is not what was asked
            for.
    """
    analysis = cache_analysis(
        lm, text, names_filter=names_filter, attention_mask=attention_mask, prepend_bos=prepend_bos
    )
    return run(lm, analysis, remote, verbose=verbose)

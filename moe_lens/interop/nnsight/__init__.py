"""Routing values, exact decompositions and ablations of a model that is held in nnsight, here or on a server.

    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoTokenizer
    from moe_lens.interop import nnsight as routing

    name = "Qwen/Qwen3-30B-A3B"
    tokenizer = AutoTokenizer.from_pretrained(name)
    lm = TransformersModel(name, task="text-generation", tokenizer=tokenizer)   # its structure; no weights
    print(routing.plan(routing.routing_cache, lm, text, remote=True)) # jobs, bytes, whether it is being served
    cache = routing.routing_cache(lm, text, names_filter=lambda name: name.endswith("router_logits"), remote=True)

What is computed is computed inside the trace, so that only scores or statistics come back.
`moe_lens.interop.nnsight.jobs` says where `remote=` runs a thing, `moe_lens.interop.nnsight.shipped` what travels.
"""

import inspect
from collections.abc import Callable
from typing import Any

from nnsight.modeling.transformers import TransformersModel

from moe_lens.interop.nnsight.ablation import AblationResults, ablate, ablate_analysis
from moe_lens.interop.nnsight.attribution import (
    logit_attrs,
    logit_attrs_analysis,
    router_logit_attrs,
    router_logit_attrs_analysis,
)
from moe_lens.interop.nnsight.cache import cache_analysis, routing_cache
from moe_lens.interop.nnsight.contributions import contributions_analysis, routing_contributions
from moe_lens.interop.nnsight.jobs import Analysis, Plan, Remote, Traffic, plan_of, traffic

_PREPARED: dict[Callable[..., Any], Callable[..., Analysis[Any]]] = {
    routing_cache: cache_analysis,
    router_logit_attrs: router_logit_attrs_analysis,
    logit_attrs: logit_attrs_analysis,
    ablate: ablate_analysis,
    routing_contributions: contributions_analysis,
}


def plan(
    function: Callable[..., Any], lm: TransformersModel, *args: Any, remote: Remote = True, **settings: Any
) -> Plan:
    """What a function of this module would send, before it sends anything: jobs, bytes, whether the model is served.

        print(plan(router_logit_attrs, lm, text, receiver=5, by="head", remote=True))

    Args:
        function: `routing_cache`, `router_logit_attrs`, ...
        lm, args, settings: as the function takes them; `verbose` changes nothing here.
        remote: as the function takes it.

    Raises:
        TypeError: not a function of this module; an argument that it does not take.
        ConnectionError: a server is asked, and does not answer.
        Others: as the function raises before it runs.
    """
    if function not in _PREPARED:
        names = ", ".join(known.__name__ for known in _PREPARED)
        raise TypeError(f"a plan is made for {names}, not for {function!r}")
    try:
        inspect.signature(function).bind(lm, *args, **settings)
    except TypeError as error:
        raise TypeError(f"{function.__name__}: {error}") from error
    # Whether the function would print its plan is no part of one.
    settings.pop("verbose", None)
    return plan_of(lm, _PREPARED[function](lm, *args, **settings), remote)


__all__ = [
    "AblationResults",
    "Plan",
    "Traffic",
    "ablate",
    "logit_attrs",
    "plan",
    "router_logit_attrs",
    "routing_cache",
    "routing_contributions",
    "traffic",
]

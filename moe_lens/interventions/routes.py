"""Route experiments: the choice of experts is changed, and contributions and losses are measured beside the unchanged.

    found = top_k_sensitivity(model, texts, ks=(4, 16, "all"))
    found.to_frame()                          # loss, its change, and how alike the maps of variance are
    found["K = 4"].contributions.variance["rest"]
    found.stripes()                           # do the same senders persist?

Contributions and losses come from the same forward passes, one for each batch and condition.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), appendices I, L
and M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from moe_lens.interventions.arguments import Layers, integer, layer_numbers, parse_expert
from moe_lens.interventions.receipt import UnfiredIntervention
from moe_lens.interventions.route_experiment import RouteCondition, RouteExperiment
from moe_lens.interventions.route_runs import Condition, RouteSettings, run_conditions
from moe_lens.interventions.spec import Ablate, RouterOnly, SwapRanks, TopK
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.contributions import Batches

__all__ = ["RouteCondition", "RouteExperiment", "rank_swaps", "silence", "top_k_sensitivity"]


def top_k_sensitivity(
    model: HookedMoE,
    batches: Batches,
    ks: Sequence[int | Literal["all"]] | int | Literal["all"] | None = None,
    *,
    layers: Layers = None,
    **settings: Any,
) -> RouteExperiment:
    """Do contributions and losses depend on how many experts a router takes?

    Conditions are named `K = 4`.

    Args:
        batches: as for `routing_contributions`. Each is run once for every k, and once unchanged.
        ks: how many experts are taken; `"all"` is every one that the router may take (under group-limited routing
            those of as many groups as it takes). None is half as many as the model's K, twice as many, and all: the
            source's 4, 16 and 64 for K = 8.
        layers: the MoE layers that take k; None is all, as in the source.
        settings: `by`, `receivers`, `attention_mask`, `bos_is_lead`, `memory_budget`, `batch_size`, `verbose`; see
            `RouteSettings`.

    Raises:
        ValueError, UnfiredIntervention: see `run_conditions`.

    Source: appendix L, figure 25.
    """
    router = model.cfg.router
    most = router.top_k_groups * (router.n_experts // router.n_groups)
    if ks is None:
        numbers = [k for k in (router.top_k // 2, 2 * router.top_k, most) if 1 <= k <= most]
        numbers = list(dict.fromkeys(numbers))
    else:
        listed = [ks] if isinstance(ks, (str, int)) else list(ks)
        numbers = [most if k == "all" else integer(k, "k") for k in listed]
    conditions = [Condition(f"K = {k}", (TopK(k, layers=_layers(layers)),)) for k in numbers]
    _require_distinct(conditions, "ks")
    return run_conditions(model, batches, "top_k_sensitivity", conditions, RouteSettings(**settings))


def rank_swaps(
    model: HookedMoE,
    batches: Batches,
    js: Sequence[int | Literal["last"]] | int | Literal["last"] | None = None,
    *,
    weights: Literal["own", "slot"] = "own",
    layers: Layers = None,
    **settings: Any,
) -> RouteExperiment:
    """Does it matter that the last chosen expert is the one it is? Rank K leaves the choice, and rank j comes.

    Conditions are named `rank 8 -> 9`.

    Args:
        batches: as for `routing_contributions`. Each is run once for every j, and once unchanged.
        js: ranks, counted from 1 for the heaviest; `"last"` is the last of all experts. None is K + 1, K + 2 and the
            last, as in the source.
        weights: which weight the expert that comes gets; see `SwapRanks`. The source does not say.
        layers: the MoE layers where ranks are swapped; None is all. The source names no layer, and its maps are of all.
        settings: as for `top_k_sensitivity`.

    Raises:
        ValueError, UnfiredIntervention: see `run_conditions`.

    Source: appendix M, figure 26.
    """
    k, n_experts = model.cfg.top_k, model.cfg.n_experts
    if k == n_experts:
        raise ValueError(
            f"all {k} experts of a layer are chosen, so none is left to take the place of rank {k}"
        )
    if js is None:
        ranks = list(dict.fromkeys(j for j in (k + 1, k + 2, n_experts) if j <= n_experts))
    else:
        listed = [js] if isinstance(js, (str, int)) else list(js)
        ranks = [n_experts if j == "last" else integer(j, "j") for j in listed]
    ranks = [j if j > 0 else n_experts + 1 + j for j in ranks]
    conditions = [
        Condition(f"rank {k} -> {j}", (SwapRanks(k, j, weights=weights, layers=_layers(layers)),))
        for j in ranks
    ]
    _require_distinct(conditions, "js")
    return run_conditions(model, batches, "rank_swaps", conditions, RouteSettings(**settings))


def silence(model: HookedMoE, batches: Batches, expert: str, **settings: Any) -> RouteExperiment:
    """What an expert does through the scores it gives to later routers, and what it does by its output.

    Three conditions beside the unchanged one:

        score, outputs held   no later router sees what it wrote; layers still write what they write in the same
                              stream by their own choice, so the stream and the loss stay as they are, and only what
                              routers read and choose shows the change
        score                 no later router sees what it wrote, and the layers follow the new choices
        output                it writes nothing anywhere, so neither routers nor anything else see it

    In the first two the contributions are those that the routers were given: without the expert's, alone and in its
    layer (`Unread`). They sum to the routers' logits there too. By expert the first is left out: where outputs are
    held, what a layer writes is not what the experts of its new choice put out, and by expert its contributions are
    simply the unchanged ones without the one expert's.

    Args:
        batches: as for `routing_contributions`. Each is run once for every condition.
        expert: `"M1E9"`, or `"M1S"` the shared experts. Its layer must come before the last router.
        settings: as for `top_k_sensitivity`.

    Raises:
        ValueError: no such expert; see also `run_conditions`.
        UnfiredIntervention: it is active nowhere in the corpus.

    Source: section 7.2 and appendix I, figure 20: (a) to (c) are the first of these, (d) to (f) the last.
    """
    parse_expert(expert)
    measured = RouteSettings(**settings)
    held = RouterOnly(expert, hold_outputs=True, inactive="allow")
    conditions = [
        Condition("score, outputs held", (held,), unread=expert),
        Condition("score", (RouterOnly(expert, inactive="allow"),), unread=expert),
        Condition("output", (Ablate(expert, inactive="allow"),)),
    ]
    if measured.by == "expert":
        del conditions[0]
    found = run_conditions(model, batches, "silence", conditions, measured)
    receipt = found["output"].receipt
    if receipt is not None and receipt.fired == 0:
        raise UnfiredIntervention(
            f"{expert} is active nowhere in this corpus, so there is nothing to silence"
        )
    return found


def _layers(layers: Layers) -> Any:
    return None if layers is None else layer_numbers(layers)


def _require_distinct(conditions: Sequence[Condition], name: str) -> None:
    """Raises:
    ValueError: none, or two that are the same.
    """
    names = [condition.name for condition in conditions]
    if not names:
        raise ValueError(f"{name} is empty, so there is nothing to compare")
    twice = [one for one in dict.fromkeys(names) if names.count(one) > 1]
    if twice:
        raise ValueError(f"{name} has one twice: {twice[0]}")

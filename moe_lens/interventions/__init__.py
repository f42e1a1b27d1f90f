"""Test: change one thing, exactly, and say what was done."""

from moe_lens.interventions.branches import heaviest_slots, single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import ExpertReference, expert_reference
from moe_lens.interventions.hooks import as_hooks, intervene, run_with_interventions
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.replay import Branches, Change, Replayed, replay
from moe_lens.interventions.routes import RouteExperiment, rank_swaps, silence, top_k_sensitivity
from moe_lens.interventions.spec import Ablate, ForbidExperts, ForceExperts, RouterOnly, SwapRanks, TopK

__all__ = [
    "Ablate",
    "Branches",
    "Change",
    "CleanRun",
    "ExpertReference",
    "ForbidExperts",
    "ForceExperts",
    "LogitDifference",
    "Receipt",
    "Replayed",
    "RouteExperiment",
    "RouterOnly",
    "SwapRanks",
    "TopK",
    "UnfiredIntervention",
    "as_hooks",
    "expert_reference",
    "heaviest_slots",
    "intervene",
    "rank_swaps",
    "replay",
    "run_with_interventions",
    "silence",
    "single_slots",
    "top_k_sensitivity",
]

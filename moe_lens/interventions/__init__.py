"""Test: change one thing, exactly, and say what was done."""

from moe_lens.interventions.branches import heaviest_slots, single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import ExpertReference, expert_reference
from moe_lens.interventions.hooks import as_hooks, intervene, run_with_interventions
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.patching import (
    AttributionPatching,
    NameMovers,
    PatchResults,
    PathPatching,
    activation_patch,
    attribution_patch,
    name_movers,
    patch_hooks,
    path_patch,
    path_patching_hooks,
)
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.replay import Branches, Change, Replayed, replay
from moe_lens.interventions.routes import RouteExperiment, rank_swaps, silence, top_k_sensitivity
from moe_lens.interventions.spec import Ablate, ForbidExperts, ForceExperts, RouterOnly, SwapRanks, TopK
from moe_lens.interventions.streamed_replay import ToReplay, replay_documents

__all__ = [
    "Ablate",
    "AttributionPatching",
    "Branches",
    "Change",
    "CleanRun",
    "ExpertReference",
    "ForbidExperts",
    "ForceExperts",
    "LogitDifference",
    "NameMovers",
    "PatchResults",
    "PathPatching",
    "Receipt",
    "Replayed",
    "RouteExperiment",
    "RouterOnly",
    "SwapRanks",
    "ToReplay",
    "TopK",
    "UnfiredIntervention",
    "activation_patch",
    "as_hooks",
    "attribution_patch",
    "expert_reference",
    "heaviest_slots",
    "intervene",
    "name_movers",
    "patch_hooks",
    "path_patch",
    "path_patching_hooks",
    "rank_swaps",
    "replay",
    "replay_documents",
    "run_with_interventions",
    "silence",
    "single_slots",
    "top_k_sensitivity",
]

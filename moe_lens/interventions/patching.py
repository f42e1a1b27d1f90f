"""Patching: activations from another run put into this one; along all paths, along chosen paths, or by gradient.

activation_patch     a hook's value from the clean run, for every layer, position, head, expert: exact, a run each
path_patch           a sender's output, with everything between it and the receiver held by a named rule
attribution_patch    gradient times difference, all heads and experts at once, with its error
"""

from moe_lens.interventions.activation_patching import PatchResults, activation_patch, patch_hooks
from moe_lens.interventions.attribution_patching import attribution_patch
from moe_lens.interventions.attribution_result import AttributionPatching
from moe_lens.interventions.name_movers import NameMovers, name_movers
from moe_lens.interventions.path_patching import path_patch, path_patching_hooks
from moe_lens.interventions.path_result import PathPatching

__all__ = [
    "AttributionPatching",
    "NameMovers",
    "PatchResults",
    "PathPatching",
    "activation_patch",
    "attribution_patch",
    "name_movers",
    "patch_hooks",
    "path_patch",
    "path_patching_hooks",
]

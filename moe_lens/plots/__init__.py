"""Figures of routing and of interventions, as plotly figures that a paper could print.

Blank cells have no value: the sender comes after the receiver, say. Tokens and labels that a caller gives are shown
literally, whatever markup they look like. No name of a document goes into a figure, and the name of a model only where
a figure sets several side by side (those of audits): a column `label` says what else to call it.
"""

from moe_lens.plots.audit import control_lines, scope_pairs
from moe_lens.plots.census import census_lines, loss_change_distribution
from moe_lens.plots.correlation import rank_correlation
from moe_lens.plots.effect_forest import effect_forest
from moe_lens.plots.experts import embedding_line, expert_lines
from moe_lens.plots.heads import head_map, own_block_head_map
from moe_lens.plots.load import load_heatmap
from moe_lens.plots.name_movers import name_mover_maps
from moe_lens.plots.progressive import progressive_lines
from moe_lens.plots.redistribution import redistribution_chains
from moe_lens.plots.routes import route_maps
from moe_lens.plots.sources import source_heatmap, source_maps
from moe_lens.plots.stripes import stripes
from moe_lens.plots.style import literal
from moe_lens.plots.tokens import token_projection
from moe_lens.plots.values import MEASURE_NAMES, POSITION_NAMES, UNITS
from moe_lens.plots.waterfall import waterfall

__all__ = [
    "MEASURE_NAMES",
    "POSITION_NAMES",
    "UNITS",
    "census_lines",
    "control_lines",
    "effect_forest",
    "embedding_line",
    "expert_lines",
    "head_map",
    "literal",
    "load_heatmap",
    "loss_change_distribution",
    "name_mover_maps",
    "own_block_head_map",
    "progressive_lines",
    "rank_correlation",
    "redistribution_chains",
    "route_maps",
    "scope_pairs",
    "source_heatmap",
    "source_maps",
    "stripes",
    "token_projection",
    "waterfall",
]

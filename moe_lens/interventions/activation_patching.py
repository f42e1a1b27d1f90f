"""Activation patching at any hook point: values of a clean run take their places in a corrupted run.

One helper for all points, those of routers and experts included:

    _, clean_cache = model.run_with_cache(clean, names_filter=patch_hooks(model, "attn.hook_z", over=("layer", "head")))
    results = activation_patch(model, corrupted, clean_cache, metric, "attn.hook_z", over=("layer", "head"))
    results.to_frame()  # layer, head, value, effect

Each number is one forward pass of the corrupted tokens in which one part of one kind of activation is what it was in
the clean run, and everything after it is computed from that. How well a part restores the clean run's metric says how
much of what the two inputs do differently passes through it. (Meng et al., "Locating and Editing Factual Associations
in GPT", 2022, causal tracing; Heimersheim & Nanda, "How to use and interpret activation patching", arXiv:2404.15255.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache

from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.patch_sites import find_site
from moe_lens.interventions.patcher import Metric, Patcher
from moe_lens.interventions.positions import Positions
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.text import Text


@dataclass(frozen=True, eq=False)
class PatchResults:
    """The metric under each patch.

    Attributes:
        values: the metric of the patched runs, in its own units and dtype, on the CPU; one axis for each of `axes`.
        axes: their names, as given in `over`.
        labels: what lies along each: numbers of layers, positions (columns of the batch), heads, experts, ...
        baseline: the metric of the corrupted run, unpatched.
        activation: what was patched.
        n_runs: how many patched runs were made. The other patches would put what is there already (an expert that is
            active in neither run, a key that a query does not see), or are of padding (over `batch` and `pos`): their
            value is the baseline, exactly.
    """

    values: Float[Tensor, "*axes"]
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]
    baseline: float
    activation: str
    n_runs: int

    def __repr__(self) -> str:
        shape = " x ".join(f"{len(self.labels[axis])} {axis}" for axis in self.axes)
        return f"<PatchResults of {self.activation}: {shape or 'one number'}, baseline {self.baseline:.4g}>"

    def to_frame(self) -> pd.DataFrame:
        """One row per patch: a column for each axis, the metric as `value`, and `effect`, it minus the baseline."""
        grids = np.meshgrid(*(np.asarray(self.labels[axis]) for axis in self.axes), indexing="ij")
        values = self.values.double().numpy().ravel()
        return pd.DataFrame(
            {axis: grid.ravel() for axis, grid in zip(self.axes, grids, strict=True)}
            | {"value": values, "effect": values - self.baseline}
        )


def patch_hooks(
    model: HookedMoE,
    activation: str,
    *,
    over: Sequence[str] | str = (),
    layers: Layers = None,
) -> list[str]:
    """The hook names that `activation_patch` reads from the clean cache: a `names_filter` for `run_with_cache`.

    Raises:
        ValueError: see `activation_patch`.
    """
    return find_site(model, activation, over, layers).cached_names()


def activation_patch(
    model: HookedMoE,
    corrupted_tokens: Int[Tensor, "batch pos"] | Text,
    clean_cache: ActivationCache | Mapping[str, Tensor],
    metric: Metric,
    activation: str,
    *,
    over: Sequence[str] | str,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    clean_attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    layers: Layers = None,
    positions: Positions = None,
    verbose: bool = False,
) -> PatchResults:
    """Run the corrupted tokens with parts of one kind of activation taken from a clean run, one part at a time.

    Only real tokens are patched: at padding the corrupted run keeps its own values, columns that are padding in every
    row get no entry, and in a column that is padding in some rows the others are patched. All rows of the batch are
    patched together, unless `over` names `batch`. Hooks that are on the model act in every run, before the patch.

    Args:
        corrupted_tokens: what is run, once for each patch and once without.
        clean_cache: of a run of as many rows and positions, with the same padding; it needs the points of
            `patch_hooks`.
        metric: from logits to one number. Runs are made without gradients.
        activation: a hook point's name within a block (`hook_resid_pre`, `attn.hook_pattern`,
            `mlp.hook_router_logits`, ...) or a global one's (`hook_embed`, `ln_final.hook_scale`).
        over: the axes of which one index is patched at a time; along all others a patch is whole (without `layer`, all
            layers together; `()` is one patch of everything). Of `layer` and the point's own: `batch`, `pos` (the
            query's), `key`, `head` (the key-value head for `attn.hook_k`, `hook_v` and `hook_rot_k`), `expert`,
            `slot` (by rank, whichever expert has it), `neuron`, `d_head`, `d_model`.
        attention_mask: of the corrupted tokens, true where real.
        clean_attention_mask: of the clean ones; None is the same.
        layers: those to patch; None is all that have the point.
        positions: the places to patch: a column of every row (negative from the end of the batch's columns), one for
            each row, or a bool mask `[batch, pos]`; None is every real token. Padding raises.
        verbose: show a progress bar.

    What a patch means where it is not plain:
        `mlp.hook_expert_contrib` over `expert`: by identity. What the expert contributed in the clean run (nothing
            where it was not active) replaces what it contributes in the corrupted run (nothing where it is not), so
            `hook_mlp_out` receives the first minus the second. Choice and weights of the corrupted run stay.
        `mlp.hook_expert_indices`: the clean run's choice. Its weights are read, by the family's rule, from the
            corrupted run's probabilities for it. Slots are one choice, and not patched alone.
        `mlp.hook_router_logits`, `mlp.hook_expert_weights` over `expert`: that expert's entry alone; probabilities
            (after logits), choice and weights follow.
        `mlp.hook_routing_weights`: the weights that were applied in the clean run, by rank, on the corrupted choice.

    Raises:
        ValueError: an unknown activation, axis, layer or position; clean and corrupted run of other shapes or padding;
            a metric that is no single number, or NaN (it is said for which patch).
        KeyError: the cache lacks a point, which is named.
        RuntimeError: a hook did not run exactly once in a pass.
    """
    site = find_site(model, activation, over, layers)
    patcher = Patcher.of(
        model,
        corrupted_tokens,
        clean_cache,
        metric,
        site,
        attention_mask=attention_mask,
        clean_attention_mask=clean_attention_mask,
        positions=positions,
    )
    labels = {axis: patcher.labels(axis) for axis in site.over}
    cells = list(product(*labels.values()))
    values = [
        patcher.value(dict(zip(labels, cell, strict=True)))
        for cell in tqdm(cells, desc=f"patching {activation}", disable=not verbose)
    ]
    return PatchResults(
        values=torch.stack(values).view([len(labels[axis]) for axis in site.over]),
        axes=site.over,
        labels=labels,
        baseline=float(patcher.baseline),
        activation=activation,
        n_runs=patcher.n_runs,
    )

"""What `attach` can do with every type of the installed transformers: `python -m tests.interop_table` writes the page.

For each type, a tiny random model. "Exact": its output under attach is bit for bit its output without. "Sums": the
largest error of sum over slots of weight times output, against the experts' own output, relative to the layer's
largest. "Re-routes": the logits of a layer are edited to run backwards over the experts, and the output is that of
the same model, unattached, with that router's rows turned round. "Forced choice": an edit of the indices to the same
ones in another order gives the same weights in that order and the same output, and other ones give another output.
Each kind of router that a type has is tried. Where a router does not allow an edit, its reason stands.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moe_lens.interop.router_trace import RouterNotUnderstood
from moe_lens.interop.transformers import AttachedLayer, attach
from tests.interop_types import inputs, interface_types, tiny_model

PAGE = Path(__file__).parent.parent / "docs" / "transformers_types.md"
LIMIT = 1e-5
WORKS = "works"


@dataclass(frozen=True)
class Row:
    """What was found of one type."""

    folder: str
    model: str
    n_layers: int
    exact: bool
    sum_error: float
    rerouted: str
    forced: str

    @property
    def works(self) -> bool:
        return self.exact and self.sum_error < LIMIT and self.rerouted.startswith(WORKS)


def turned_round(logits: Tensor, n_experts: int) -> Tensor:
    """Logits that run backwards over the experts; columns that are none stay."""
    return torch.cat([logits[..., :n_experts].flip(-1), logits[..., n_experts:]], dim=-1)


def with_router_turned_round(model: Any, path: str, n_experts: int, width: int) -> Any:
    """The model, with one router's rows now running backwards: what makes logits, and nothing else.

    Args:
        path: of the experts beside the router.
        width: how many logits the router shows; those past the experts keep their rows.
    """
    block = model.get_submodule(path.rpartition(".")[0])
    router = next(child for name, child in block.named_children() if name in ("gate", "router"))
    rows = [
        (owner, name, parameter)
        for owner in router.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if name == "weight" and parameter.ndim == 2 and parameter.shape[0] >= width
    ]
    owner, _name, weight = rows[-1]
    with torch.no_grad():
        weight.copy_(turned_round(weight.T, n_experts).T)
        if isinstance(getattr(owner, "bias", None), nn.Parameter):
            owner.bias.copy_(turned_round(owner.bias, n_experts))
    return model


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value; 0 where both are all zeros."""
    difference = float((ours - theirs).abs().max())
    return difference / float(theirs.abs().max()) if difference else 0.0


@torch.no_grad()
def row(folder: str) -> Row:
    """Try one type: whether all it does is exact, and what edits of each kind of router that it has do."""
    model, given = tiny_model(folder), inputs(folder)
    unhooked = model(**given)[0]
    experts_out: dict[str, Tensor] = {}
    with attach(model) as attached, ExitStack() as handles:
        for layer in attached.layers:
            keep = partial(_keep_output, experts_out, layer.where.name)
            handles.callback(layer.where.experts.register_forward_hook(keep).remove)
        out, cache = attached.run_with_cache(**given)
        sums = [
            relative_error(cache[f"{name}.hook_expert_contrib"].sum(2).flatten(), total.flatten())
            for name, total in experts_out.items()
        ]
        kinds = {
            (type(x.where.router).__name__, x.where.name.partition("blocks")[0]): x for x in attached.layers
        }
        rerouted = {kind[0]: _reroute(attached, layer, folder, unhooked) for kind, layer in kinds.items()}
        forced = {kind[0]: _force(attached, layer, folder, unhooked) for kind, layer in kinds.items()}
    n_silent = len(attached.layers) - len(experts_out)
    assert n_silent == 0, f"{n_silent} MoE layers of {folder} did not run"
    return Row(
        folder,
        type(model).__name__,
        len(attached.layers),
        torch.equal(out[0], unhooked),
        max(sums),
        _in_words(rerouted),
        _in_words(forced),
    )


def _keep_output(kept: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Tensor) -> None:
    kept[name] = output


def _in_words(outcomes: dict[str, str]) -> str:
    """One outcome where all are alike, else what works and which router's does not."""
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    return WORKS + "".join(f"; not {kind}: {why}" for kind, why in outcomes.items() if why != WORKS)


def _reroute(attached: Any, layer: AttachedLayer, folder: str, unhooked: Tensor) -> str:
    name, n_experts = layer.where.name, int(layer.where.experts.num_experts)
    widths: list[int] = []

    def edit(logits: Tensor, hook: Any) -> Tensor:
        widths.append(logits.shape[-1])
        return turned_round(logits, n_experts)

    try:
        out = attached.run_with_hooks(**inputs(folder), fwd_hooks=[(f"{name}.hook_router_logits", edit)])[0]
    except RouterNotUnderstood as reason:
        return str(reason).partition(": ")[2]
    other = with_router_turned_round(tiny_model(folder), layer.where.path, n_experts, widths[0])
    if relative_error(out, unhooked) < 1e-4:
        return "the edit changed nothing"
    error = relative_error(out, other(**inputs(folder))[0])
    return WORKS if error < LIMIT else f"differs from the router turned round by {error:.1e}"


def _force(attached: Any, layer: AttachedLayer, folder: str, unhooked: Tensor) -> str:
    name, n_experts = layer.where.name, int(layer.where.experts.num_experts)

    def forced(choose: Any) -> tuple[Tensor, Tensor]:
        with attached.hooks([(f"{name}.hook_expert_indices", choose)]):
            out, cache = attached.run_with_cache(
                **inputs(folder), names_filter=f"{name}.hook_routing_weights"
            )
        return out[0], cache[f"{name}.hook_routing_weights"]

    _, natural = attached.run_with_cache(**inputs(folder), names_filter=f"{name}.hook_routing_weights")
    try:
        same, reversed_weights = forced(lambda indices, hook: indices.flip(-1))
        other, other_weights = forced(lambda indices, hook: (indices + 1) % n_experts)
    except RouterNotUnderstood as reason:
        return str(reason).partition(": ")[2]
    errors = [
        relative_error(reversed_weights.flip(-1), natural[f"{name}.hook_routing_weights"]),
        relative_error(same, unhooked),
    ]
    if max(errors) > LIMIT:
        return f"the same choice in another order differs by {max(errors):.1e}"
    if relative_error(other, unhooked) < 1e-4 or not bool(other_weights.isfinite().all()):
        return "another choice changes nothing, or has weights that are not finite"
    return WORKS


def page(rows: list[Row]) -> str:
    """The page: one line for each type."""
    works = sum(r.works for r in rows)
    lines = [
        "# Which transformers models `attach` works on",
        "",
        f"Written by `python -m tests.interop_table` with transformers {transformers.__version__}, from a tiny random",
        f"model of each of the {len(rows)} types whose code uses the experts interface: {works} work.",
        "",
        *(f"{line}" for line in (__doc__ or "").split("\n\n", 1)[1].strip().splitlines()),
        "",
        "| type | model | MoE layers | exact | sums | re-routes | forced choice |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sums = "below 1e-5" if r.sum_error < LIMIT else f"{r.sum_error:.1e}"
        lines.append(
            f"| {r.folder} | {r.model} | {r.n_layers} | {'yes' if r.exact else 'no'} | {sums} | {r.rerouted} | "
            f"{r.forced} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page([row(folder) for folder in interface_types()]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()

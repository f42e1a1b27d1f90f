"""The noise floor of a census in half precision: how far its numbers are from float32's, beside what hooks would give.

For a sample of ablations, the change of the loss is computed three times: by replay and by hooked full forward passes,
both in the model's dtype, and by replay in float32. The criterion of exactness in half precision is that the replay's
median error is at most 1.5 times that of the hooked full forward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.interventions.branches import single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.hooks import run_with_interventions
from moe_lens.interventions.replay import Branches, replay
from moe_lens.interventions.spec import Ablate
from moe_lens.model.hooked_moe import HookedMoE

CRITERION = 1.5
"""How many times the hooked full forward's median error the replay's may be."""

Rows = Sequence[tuple[tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]], Int[Tensor, " n"]]]
"""Documents as (tokens, mask), each with its tokens that have a next one, as places among its real ones."""

Errors = tuple[float, float, float, float, float]
"""Of one ablation: effect, replay's error, that without the null branch, the hooked forward's, the null branch's."""


@dataclass(frozen=True)
class NoiseFloor:
    """Medians over a sample of ablations (`zero`, at one token), nats.

    Attributes:
        n_samples: ablations that were compared.
        n_routed_otherwise: ablations drawn whose expert float32, or the full forward pass with its padding, does not
            choose there, so that there is nothing to compare with. Where that are all, the medians are NaN.
        median_effect: of |change of the loss| in float32.
        replay_error: of |replay's change - float32's|, counted from the null branch.
        replay_error_without_null: the same counted from the clean run.
        hooked_error: of |hooked full forward's change - float32's|.
        null_error: of |loss of the null branch - clean loss|.
    """

    n_samples: int
    n_routed_otherwise: int
    median_effect: float
    replay_error: float
    replay_error_without_null: float
    hooked_error: float
    null_error: float

    @classmethod
    def of(cls, found: Sequence[Errors], n_routed_otherwise: int) -> NoiseFloor:
        """The medians."""
        medians = np.median(np.array(found), axis=0).tolist() if found else [float("nan")] * 5
        effect, error, without_null, hooked_error, null_error = medians
        return cls(len(found), n_routed_otherwise, effect, error, without_null, hooked_error, null_error)

    @classmethod
    def in_facts(cls, facts: Mapping[str, Any] | None) -> NoiseFloor | None:
        """The one that a census's provenance has; None where none was measured, as in float32."""
        floor = None if facts is None else facts.get("noise_floor")
        return None if floor is None else cls(**floor)

    @property
    def ratio(self) -> float:
        """The replay's error over the hooked full forward's; NaN where that is zero."""
        return self.replay_error / self.hooked_error if self.hooked_error > 0 else float("nan")

    @property
    def meets_criterion(self) -> bool:
        return self.replay_error <= CRITERION * self.hooked_error


def require_room_for_float32(model: HookedMoE) -> None:
    """Raises:
    NotEnoughMemory: a float32 copy of the model does not fit beside it.
    """
    from moe_lens.converters.errors import NotEnoughMemory
    from moe_lens.converters.loading import free_memory

    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    free = free_memory(model.cfg.device)
    if needed > free:
        raise NotEnoughMemory(
            f"the noise floor is measured against a float32 copy of {model.cfg.model_name}, which takes "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; noise_samples=0 leaves it out"
        )


@torch.no_grad()
def noise_floor(
    model: HookedMoE,
    documents: Rows,
    *,
    layers: Sequence[int],
    n_samples: int,
    seed: int = 0,
    memory_budget: int = 2**30,
    verbose: bool = False,
) -> NoiseFloor:
    """Measure it on a sample of single-expert ablations, spread over documents, positions, layers and slots.

    Args:
        model: in half precision (in float32 all errors are of the order of 1e-7).
        documents: to draw from.
        layers: MoE layers to draw from.
        n_samples: ablations; each is one hooked full forward pass.
        seed: of the draw.
        memory_budget: bytes for the replays.
        verbose: show a progress bar.

    Raises:
        ValueError: no documents.
        NotEnoughMemory: a float32 copy of the model does not fit.
    """
    if not documents:
        raise ValueError("there are no documents to measure the noise floor on")
    require_room_for_float32(model)
    of_document = drawn(documents, layers, model.cfg.top_k, n_samples, seed)
    exact = copy.deepcopy(model, {id(model.tokenizer): model.tokenizer}).float()
    found: list[Errors] = []
    n_routed_otherwise = 0
    progress = tqdm(total=n_samples, desc="noise floor", unit=" ablations", disable=not verbose)
    for number, samples in of_document.items():
        (tokens, mask), _ = documents[number]
        runs = [CleanRun.of(of, tokens, mask) for of in (model, exact)]
        full_loss = _full_loss(model, tokens, mask)
        for place, layer, slot in samples:
            progress.update()
            row = torch.tensor([place], device=runs[0].tokens.device)
            # Routing may differ between the dtypes where experts are nearly tied: the expert is what is compared.
            expert = int(runs[0].moe(layer).indices[place, slot])
            in_exact = (runs[1].moe(layer).indices[place] == expert).nonzero()
            if len(in_exact) == 0:
                n_routed_otherwise += 1
                continue
            slots = single_slots(model.cfg.top_k, row.device)
            half, full = (
                replay(run, [Branches(layer, slots[[s]])], rows=row, memory_budget=memory_budget)
                for run, s in zip(runs, (slot, int(in_exact[0, 0])), strict=True)
            )
            column = int(runs[0].columns[place])
            spec = Ablate(f"M{layer}E{expert}", pos=column, inactive="allow")
            hooked, receipt = run_with_interventions(
                model, tokens[None], spec, attention_mask=mask[None], return_type="loss", loss_per_token=True
            )
            if receipt.fired == 0:
                n_routed_otherwise += 1
                continue
            truth = float(full.loss[0][0, 0] - runs[1].loss[place])
            assert half.null is not None
            null = float(half.null["loss"][0][0])
            clean = float(runs[0].loss[place])
            changed = float(half.loss[0][0, 0])
            found.append(errors(truth, changed, null, clean, float(hooked[0, column] - full_loss[column])))
    progress.close()
    return NoiseFloor.of(found, n_routed_otherwise)


def drawn(
    documents: Rows, layers: Sequence[int], k: int, n_samples: int, seed: int
) -> dict[int, list[tuple[int, int, int]]]:
    """A sample of ablations: of each document that has any, their (place, layer, slot)."""
    generator = np.random.default_rng(seed)
    of_document: dict[int, list[tuple[int, int, int]]] = {}
    for _ in range(n_samples):
        number = int(generator.integers(len(documents)))
        place = int(generator.choice(documents[number][1].numpy()))
        layer = int(generator.choice(list(layers)))
        of_document.setdefault(number, []).append((place, layer, int(generator.integers(k))))
    return of_document


def errors(truth: float, changed: float, null: float, clean: float, hooked_change: float) -> Errors:
    """Of one ablation.

    Args:
        truth: the change of the loss in float32.
        changed, null, clean: the losses of the replay, its null branch and the clean run.
        hooked_change: of the hooked full forward.
    """
    return (
        abs(truth),
        abs(changed - null - truth),
        abs(changed - clean - truth),
        abs(hooked_change - truth),
        abs(null - clean),
    )


def _full_loss(model: HookedMoE, tokens: Int[Tensor, " pos"], mask: Bool[Tensor, " pos"]) -> Tensor:
    return model(tokens[None], attention_mask=mask[None], return_type="loss", loss_per_token=True)[0]

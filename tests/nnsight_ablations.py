"""What the tests of `ablate` share: ablations to try, and both sides held against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.interop.nnsight import ablate
from moe_lens.interventions import Ablate, ForceExperts, TopK, UnfiredIntervention, run_with_interventions
from tests.families import FAMILIES
from tests.intervention_cases import MASK, POSITIONS
from tests.reference import assert_same

VARIANTS = [*FAMILIES, "qwen2_moe_no_bias", "deepseek_v2_groups"]


def layers_of(model: Any) -> tuple[int, int]:
    """The first and the last with experts."""
    there = model.cfg.moe_layers
    return there[0], there[-1]


@torch.no_grad()
def active_at(model: Any, tokens: Tensor, mask: Tensor, layer: int, place: tuple[int, int]) -> list[int]:
    """The experts of a place, heaviest first."""
    name = f"blocks.{layer}.mlp.hook_expert_indices"
    return model.run_with_cache(tokens, attention_mask=mask, names_filter=name)[1][name][place].tolist()


@torch.no_grad()
def expected_loss(model: Any, tokens: Tensor, mask: Tensor, item: Any) -> tuple[Tensor, Any]:
    return run_with_interventions(
        model, tokens, item, attention_mask=mask, return_type="loss", loss_per_token=True
    )


def lines_of(receipt: Any) -> dict[Any, Any]:
    return {key: (line.asked, line.fired) for key, line in receipt.lines.items()}


def assert_as_hooked_moe(
    lm: Any, model: Any, tokens: Tensor, mask: Tensor, items: list[Any], remote: Any = False
) -> Any:
    """Every loss to 1e-5 of the largest, NaN at the same places; every receipt to the unit."""
    found = ablate(lm, tokens, items, attention_mask=mask, remote=remote)
    for number, item in enumerate(items):
        loss, receipt = expected_loss(model, tokens, mask, item)
        ours = found.losses[number]
        assert torch.equal(ours.isnan(), loss.isnan())
        assert_same(ours.nan_to_num(), loss.nan_to_num(), str(item), tolerance=1e-5)
        assert lines_of(found.receipts[number]) == lines_of(receipt), item
        assert found.receipts[number].n_runs == 1
    with torch.no_grad():
        clean = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert_same(found.clean.nan_to_num(), clean.nan_to_num(), "clean", tolerance=1e-5)
    assert torch.equal(found.effects.nan_to_num(), (found.losses - found.clean).nan_to_num())
    return found


def changes_of(how: str, reference: Any) -> dict[str, Any]:
    return {"how": how, **({"reference": reference, "seed": 3} if how in ("mean", "resample") else {})}


def ablations(model: Any, tokens: Tensor, mask: Tensor, how: str, reference: Any) -> list[Any]:
    """In one way, what can be ablated: ranks and experts, here and there, alone and with others."""
    change = changes_of(how, reference)
    first, last = layers_of(model)
    k, place = model.cfg.top_k, (1, 4)
    there = active_at(model, tokens, mask, first, place)
    one_place = torch.zeros(2, 9, dtype=torch.bool)
    one_place[place] = True
    items: list[Any] = [Ablate(ranks=1, layers=first, pos=pos, **change) for pos, _ in POSITIONS.values()]
    items += [
        Ablate(ranks=k, **change),
        Ablate(tuple(there[: k - 1]), layers=first, pos=one_place, **change),
        Ablate(there[0], layers=first, **change),
        Ablate(there[0], layers=first, all_but=True, pos=one_place, **change),
        [Ablate(ranks=1, layers=first, **change), Ablate(ranks=2, layers=first, pos=4)],
        [Ablate(ranks=1, layers=first, pos=3, **change), Ablate(ranks=1, layers=last, **change)],
        [TopK(k - 1 if model.cfg.router.n_groups > 1 else k + 1), Ablate(ranks=1, layers=last, **change)],
        [TopK(3, pos=4, layers=first), Ablate(ranks=1, layers=first, pos=4, **change)],
    ]
    if k > 2:
        named = (there[0], there[0] ^ 1)  # of one group, where there are groups
        items.append(Ablate(named, layers=(first, last), inactive="allow", **change))
    if how not in ("renormalize", "reroute"):
        items += [
            Ablate(ranks=tuple(range(1, k + 1)), layers=last, **change),
            Ablate(all_but=True, layers=last, pos=MASK, **change),
            [TopK(1, layers=first, pos=4), Ablate(all_but=True, layers=first, pos=4, **change)],
        ]
    if how == "reroute":
        # Under groups too few would be left of two of them.
        items += [[Ablate(ranks=1, layers=first, pos=3, **change), ForceExperts(7, layers=first, pos=4)]]
    elif model.cfg.shared is not None:
        shared = [] if how == "renormalize" else [Ablate(-1, layers=(first, last), pos=MASK, **change)]
        items += [*shared, [Ablate(ranks=1, layers=first, **change), Ablate(f"M{first}S", pos=5)]]
    if model.cfg.shared is not None and how not in ("renormalize", "reroute"):
        items += [
            Ablate(f"M{last}S", **change),
            [Ablate(f"M{first}S", pos=3), Ablate(f"M{first}S", pos=5, **change)],
            Ablate((f"M{first}S", f"M{first}E{there[0]}"), pos=one_place, **change),
        ]
    return items


def assert_same_refusal(
    lm: Any, model: Any, tokens: Tensor, mask: Tensor, item: Any, remote: Any = False
) -> Exception:
    with pytest.raises((ValueError, TypeError, UnfiredIntervention)) as theirs:
        expected_loss(model, tokens, mask, item)
    with pytest.raises(type(theirs.value)) as ours:
        ablate(lm, tokens, [Ablate(ranks=1), item], attention_mask=mask, remote=remote)
    assert str(ours.value) == str(theirs.value)
    assert ours.value.__notes__ == [
        f"ablation 1: {', '.join(map(str, item if isinstance(item, list) else [item]))}"
    ]
    return ours.value

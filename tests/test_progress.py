"""Every long run shows, when asked, how much is done, at what rate, and what time is left; and nothing unasked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_lens.audit import audit, census, expert_metrics, noise_floor, progressive, redistribution
from moe_lens.indirect_object import indirect_object_prompts
from moe_lens.interventions.activation_patching import activation_patch
from moe_lens.interventions.attribution_patching import attribution_patch
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.interventions.name_movers import name_movers
from moe_lens.interventions.path_patching import path_patch
from moe_lens.interventions.routes import rank_swaps, silence, top_k_sensitivity
from moe_lens.model.corpus_passes import run_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.score_maps import mean_score_variance_maps
from moe_lens.routing.super_experts import super_expert_table, super_experts
from tests.families import prompts

TOKENS, MASK = prompts("right", batch=3, length=9)
CORRUPTED = (TOKENS + 1) % 100
BATCHES = [(TOKENS, MASK)]


def logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5].mean()


def audited(model: Any, **how: Any) -> object:
    return audit(census(model, TOKENS), expert_metrics(model, TOKENS), **how)


RUNS: dict[str, Callable[..., object]] = {
    "routing_contributions": lambda model, **how: routing_contributions(model, BATCHES, **how),
    "census": lambda model, **how: census(model, TOKENS, **how),
    "noise_floor": lambda model, **how: noise_floor(
        model, [((TOKENS[0], MASK[0].bool()), torch.arange(2))], layers=[0], n_samples=2, **how
    ),
    "expert_metrics": lambda model, **how: expert_metrics(model, BATCHES, **how),
    "expert_metrics as released": lambda model, **how: expert_metrics(
        model, BATCHES, as_released="olmoe", pad_token=0, **how
    ),
    "expert_reference": lambda model, **how: expert_reference(model, BATCHES, **how),
    "audit": audited,
    "progressive": lambda model, **how: progressive(model, TOKENS, **how),
    "redistribution": lambda model, **how: redistribution(model, BATCHES, **how),
    "activation_patch": lambda model, **how: activation_patch(
        model,
        CORRUPTED,
        model.run_with_cache(TOKENS)[1],
        logit,
        "hook_resid_pre",
        over=["layer", "pos"],
        **how,
    ),
    "attribution_patch": lambda model, **how: attribution_patch(
        model, TOKENS, CORRUPTED, logit, exact="all", **how
    ),
    "path_patch": lambda model, **how: path_patch(
        model, TOKENS, CORRUPTED, ["A0", "M0"], receiver="M2", **how
    ),
    "top_k_sensitivity": lambda model, **how: top_k_sensitivity(model, BATCHES, (1,), **how),
    "rank_swaps": lambda model, **how: rank_swaps(model, BATCHES, "last", **how),
    "silence": lambda model, **how: silence(model, BATCHES, "M0E1", **how),
    "super_experts": lambda model, **how: super_experts(model, BATCHES, **how),
    "super_expert_table": lambda model, **how: super_expert_table(
        model, BATCHES, routing_contributions(model, BATCHES, by="expert"), **how
    ),
    "mean_score_variance_maps": lambda model, **how: mean_score_variance_maps(
        model, [(TOKENS, MASK, 1, 0)], 2, **how
    ),
    "run_batches": lambda model, **how: run_batches(model, BATCHES, **how),
}
SHOWN = re.compile(r"100%\|.*\| \S+/\S+ \[\d\d:\d\d<\d\d:\d\d, +[\d.]+[^\]/]*/[^\]]+\]")


@pytest.mark.parametrize("run", RUNS)
def test_a_bar_with_rate_and_time_left(model_of: Any, capsys: pytest.CaptureFixture[str], run: str) -> None:
    model = model_of("olmoe")
    capsys.readouterr()
    RUNS[run](model)
    printed = capsys.readouterr()
    assert "%|" not in printed.err
    assert printed.out == ""
    RUNS[run](model, verbose=True)
    assert SHOWN.search(printed := capsys.readouterr().err), printed


def test_streamed_models_too(streamed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("expert_metrics", "expert_reference", "redistribution", "super_experts", "run_batches"):
        RUNS[name](streamed("olmoe"), verbose=True)
        assert SHOWN.search(printed := capsys.readouterr().err), printed


def test_name_movers(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_lens import HookedMoE

    model = HookedMoE.from_pretrained("mini", dtype=torch.float32, device="cpu", verbose=False)
    name_movers(model, indirect_object_prompts(2), verbose=True)
    assert SHOWN.search(printed := capsys.readouterr().err), printed

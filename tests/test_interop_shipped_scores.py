"""The formulas that travel against those that they repeat, on the same hook values: to the last digits, in half
precision too, where two runs of a model are never so close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens.interop.nnsight.attribution import plain_groups
from moe_lens.interop.nnsight.model import facts_of
from moe_lens.interop.nnsight.shipped import scores as shipped
from moe_lens.routing.attribution import scores_with_rounding
from moe_lens.routing.logit_attribution import logit_directions
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import GRANULARITIES, senders_of_all
from moe_lens.routing.token_scores import along, scores_along
from moe_lens.routing.writes import sender_scores, written_by
from tests.checkpoints import load
from tests.families import hf_model, prompts
from tests.reference import assert_same
from tests.routing_cases import VARIANTS, final_run, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_formulas_are_those_of_the_analyses(
    checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype
) -> None:
    model = load(checkpoint(variant), dtype=dtype)
    # A module has the same attributes as its envoy.
    lm: Any = hf_model(checkpoint(variant), dtype)
    batch, facts = prompts(length=6), facts_of(model.cfg)
    directions = logit_directions(model, *targets(batch))
    readout = router_readout(model, model.cfg.moe_layers[-1])
    roundoff = shipped.unit_roundoff(torch.zeros(1, dtype=dtype))
    assert roundoff == (None if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    for by in GRANULARITIES:
        cache, senders = final_run(model, batch, by), senders_of_all(model.cfg, by, n_sources=6)
        stream = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
        on_rows: list[torch.Tensor] = []
        written: Any = None
        for group, plain in zip(senders.groups, plain_groups(model, senders), strict=True):
            values = {name.rpartition(".")[2]: cache[name] for name in plain["hooks"]}
            values["written"] = cache[plain["written_at"]]
            weights, n_experts = shipped.weights_of(lm, facts, plain, values), facts["n_experts"]
            on_rows.append(shipped.group_on_rows(plain, values, weights, readout, n_experts))
            expected = sender_scores(model, group, cache, readout)
            assert_same(on_rows[-1], expected, f"{group} on rows", tolerance=2e-6)
            ours = shipped.group_along(plain, values, weights, directions, n_experts)
            assert_same(ours, scores_along(model, group, cache, directions), f"{group}", tolerance=2e-6)
            if roundoff is not None:
                vector, sizes = shipped.written_by(plain, values, weights)
                expected_vector, expected_sizes = written_by(model, group, cache)
                assert_same(vector, expected_vector, f"{group} written", tolerance=2e-6)
                assert (sizes is None) == (expected_sizes is None)
                if sizes is not None and expected_sizes is not None:
                    assert_same(sizes, expected_sizes, f"{group} sizes", tolerance=2e-6)
                written = shipped.added(written, roundoff, vector, sizes)
        got, ratio = shipped.with_rounding(on_rows, written, stream, readout)
        expected, _, expected_ratio = scores_with_rounding(
            model,
            senders,
            cache,
            stream,
            of_group=lambda group, cache=cache: sender_scores(model, group, cache, readout),
            of_vector=lambda vector: vector @ readout.T,
        )
        assert_same(got, expected, by, tolerance=2e-6)
        assert (expected_ratio is None) == (not ratio)
        if expected_ratio is not None:
            assert float(ratio["rounding_ratio"].max()) == pytest.approx(expected_ratio, rel=1e-3)
            rounding = stream.float() - written["total"]
            by_token = shipped.with_rounding([], written, stream, directions)[0][0]
            assert_same(by_token, along(rounding, directions), f"{by} rounding")

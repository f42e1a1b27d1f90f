"""The same questions asked in five ways on the same tokens have the same answers: HookedMoE; nnsight in this process;
nnsight through a server; transformers with `attach`; a TransformerBridge with `attach`.

The float32 answers agree to 1e-5 of the largest value, and the chosen experts are identical.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.interop import nnsight as in_nnsight
from moe_lens.interop import transformer_lens as on_bridge
from moe_lens.interop import transformers as on_transformers
from moe_lens.interventions import Ablate, run_with_interventions
from moe_lens.model.loss import loss_per_token
from moe_lens.routing import logit_attrs, router_logit_attrs
from tests.families import FAMILIES, prompts
from tests.nnsight_cases import traced_model
from tests.nnsight_server import client
from tests.reference import assert_same

Load = Callable[[str], Any]
POINTS = ("router_logits", "expert_indices", "routing_weights", "expert_out", "expert_contrib")
PADDINGS = ("none", "left", "right")


@pytest.fixture
def ways(
    checkpoint: Callable[[str], Path], hf: Load, model_of: Load, nnsight_server: Any
) -> Callable[[str], dict[str, Any]]:
    """Of a family: the model in each way."""

    def of(family: str) -> dict[str, Any]:
        return {
            "HookedMoE": model_of(family),
            "nnsight": traced_model(checkpoint(family)),
            "server": client(checkpoint(family)),
            "transformers": hf(family),
            "bridge": TransformerBridge.boot_transformers(
                str(checkpoint(family)), dtype=torch.float32, device="cpu"
            ),
        }

    return of


def answers_agree(answers: dict[str, Tensor], what: str) -> None:
    expected = answers["HookedMoE"]
    assert len(answers) >= 4
    for way, answer in answers.items():
        assert answer.dtype == expected.dtype, f"{what}, {way}"
        assert_same(answer, expected, f"{what}, {way}", tolerance=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_routing_values(ways: Callable[[str], dict[str, Any]], family: str, padding: str) -> None:
    """Router logits, choice, weights, each slot's output and contribution, at every MoE layer and real token."""
    (tokens, mask), models = prompts(padding), ways(family)
    given = {"attention_mask": mask}
    caches: dict[str, Any] = {}
    with torch.no_grad():
        _, caches["HookedMoE"] = models["HookedMoE"].run_with_cache(tokens, **given)
        with on_transformers.attach(models["transformers"]) as attached:
            _, caches["transformers"] = attached.run_with_cache(tokens, **given)
        with on_bridge.attach(models["bridge"]):
            _, caches["bridge"] = models["bridge"].run_with_cache(tokens, **given)
    names = [f"blocks.{r}.mlp.hook_{p}" for r in models["HookedMoE"].cfg.moe_layers for p in POINTS]
    for way, remote in (("nnsight", False), ("server", True)):
        caches[way] = in_nnsight.routing_cache(
            models[way], tokens, names_filter=names, remote=remote, **given
        )
    for name in names:
        values = {way: cache[name][mask.bool()] for way, cache in caches.items()}
        assert len(values) == 5
        answers_agree(values, name)


@pytest.mark.parametrize("by", ["layer", "head", "expert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decompositions(ways: Callable[[str], dict[str, Any]], family: str, by: str) -> None:
    """Of the last router's logits, and of a logit difference."""
    (tokens, mask), models = prompts("left"), ways(family)
    model, real = models["HookedMoE"], mask.bool()
    receiver = model.cfg.moe_layers[-1]
    asked = dict(tokens=[5, 6], incorrect_tokens=[7, 8], by=by)
    with torch.no_grad(), on_bridge.attach(models["bridge"]):
        _, here = model.run_with_cache(tokens, attention_mask=mask)
        _, on = models["bridge"].run_with_cache(tokens, attention_mask=mask)
        routers = {
            "HookedMoE": router_logit_attrs(model, here, receiver=receiver, by=by),
            "bridge": on_bridge.router_logit_attrs(models["bridge"], on, receiver=receiver, by=by),
        }
        logits = {
            "HookedMoE": logit_attrs(model, here, **asked),
            "bridge": on_bridge.logit_attrs(models["bridge"], on, **asked),
        }
    for way, remote in (("nnsight", False), ("server", True)):
        sent = {"attention_mask": mask, "remote": remote}
        routers[way] = in_nnsight.router_logit_attrs(models[way], tokens, receiver=receiver, by=by, **sent)
        logits[way] = in_nnsight.logit_attrs(models[way], tokens, **asked, **sent)
    assert all(list(answer.senders) == list(routers["HookedMoE"].senders) for answer in routers.values())
    assert all(answer.completeness_error < 1e-5 for answer in (*routers.values(), *logits.values()))
    answers_agree({way: answer.values[:, real] for way, answer in routers.items()}, "router logits")
    answers_agree({way: answer.values[:, real] for way, answer in logits.items()}, "logit differences")


def without(expert: int) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """A hook's arithmetic: the slots of an expert set to 0, given the choice."""
    return lambda value, hook, indices: value.masked_fill((indices == expert)[..., None], 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ablation(ways: Callable[[str], dict[str, Any]], family: str) -> None:
    """An expert's contribution zeroed wherever it is active, as a spec or as plain hooks: the same losses."""
    (tokens, mask), models = prompts("right"), ways(family)
    layer, expert = models["HookedMoE"].cfg.moe_layers[0], 3
    spec = Ablate(f"M{layer}E{expert}")
    losses, _ = run_with_interventions(
        models["HookedMoE"], tokens, spec, attention_mask=mask, return_type="loss", loss_per_token=True
    )
    answers = {"HookedMoE": losses.detach()}
    for way, remote in (("nnsight", False), ("server", True)):
        results = in_nnsight.ablate(models[way], tokens, [spec], attention_mask=mask, remote=remote)
        answers[way] = results.losses[0]
        assert results.receipts[0].fired > 0
        assert not torch.equal(results.clean, results.losses[0])

    chosen: dict[str, Tensor] = {}
    hooks = [
        (f"blocks.{layer}.mlp.hook_expert_indices", lambda value, hook: chosen.update(now=value)),
        (
            f"blocks.{layer}.mlp.hook_expert_contrib",
            lambda value, hook: without(expert)(value, hook, chosen["now"]),
        ),
    ]
    with torch.no_grad():
        with on_transformers.attach(models["transformers"]) as attached:
            logits = attached.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks).logits
            answers["transformers"] = loss_per_token(logits, tokens, mask.bool())
        with on_bridge.attach(models["bridge"]):
            logits = models["bridge"].run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
            answers["bridge"] = loss_per_token(logits, tokens, mask.bool())
    there = ~answers["HookedMoE"].isnan()
    assert len(answers) == 5
    answers_agree({way: answer[there] for way, answer in answers.items()}, str(spec))

"""The reference of router-only changes against transformers, whose routers are handed another stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import prompts
from tests.reference import assert_same, reference_cache
from tests.reference_interventions import SHARED, Place, real_places, router_only_run, routers_after
from tests.transformers_hooks import PLACES, VARIANTS, WITH_SHARED, expert_alone, transformers_logits


def written_by(model: Any, tokens: Tensor, mask: Tensor, sender: str) -> Tensor:
    """`[b, p, d]`: what a sender writes, read off transformers' modules."""
    seen: dict[str, Any] = {}

    def listen(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[key] = args, output[0] if isinstance(output, tuple) else output

        return hook

    if sender == "embed":
        transformers_logits(model, tokens, mask, (model.model.embed_tokens, listen("embed")))
        return seen["embed"][1]
    layer = model.model.layers[int(sender[1])]
    if sender[0] == "A":
        o_proj, d_v = layer.self_attn.o_proj, layer.self_attn.o_proj.in_features // 4
        transformers_logits(model, tokens, mask, (layer.self_attn, listen("A")), (o_proj, listen("o")))
        if len(sender) == 2:
            return seen["A"][1]
        head = slice(int(sender[3]) * d_v, (int(sender[3]) + 1) * d_v)
        return seen["o"][0][0][..., head] @ o_proj.weight[:, head].T
    with torch.no_grad():
        transformers_logits(model, tokens, mask, (layer.mlp, listen("M")))
        if len(sender) == 2:
            return seen["M"][1]
        out = torch.zeros_like(seen["M"][1])
        expert = SHARED if sender[2] == "S" else int(sender[3])
        weights, experts = layer.mlp.gate.forward(seen["M"][0][0])[1:]
        for row in range(len(out)):
            for column in range(out.shape[1]):
                token = row * out.shape[1] + column
                weight = (weights[token] * (experts[token] == expert)).sum() if expert != SHARED else 1.0
                out[row, column] = weight * expert_alone(layer.mlp, seen["M"][0][0][row, column], expert)
        return out


def hooks_of_receiver(
    model: Any, receiver: int, vectors: Tensor, places: Iterable[Place], logits: dict[int, Tensor]
) -> list[Any]:
    """Hooks that take gain * z / scale off what one router is handed, and keep its logits `[b, p, expert]`."""
    layer = model.model.layers[receiver]
    scale: list[Tensor] = []

    def keep_scale(norm: Any, args: Any, output: Tensor) -> None:
        scale[:] = [(args[0].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()]

    def change(gate: Any, args: Any, output: Any) -> Any:
        states = args[0].reshape(*vectors.shape[:2], -1).clone()
        taken = layer.post_attention_layernorm.weight * vectors / scale[0]
        for place in places:
            states[place] -= taken[place]
        answer = gate.forward(states.flatten(0, 1))
        logits[receiver] = answer[0].reshape(*vectors.shape[:2], -1)
        return answer

    return [(layer.post_attention_layernorm, keep_scale), (layer.mlp.gate, change)]


CASES = [
    (variant, sender)
    for variant in VARIANTS
    for sender in ("embed", "A1", "M1", "A1H2", "M1E3", "M1S")
    if not (sender == "M1S" and variant not in WITH_SHARED)
    and not (sender in ("M1E3", "M1S") and variant == "qwen2_moe_no_bias")  # layer 1 is dense
    and not (sender.startswith("M") and variant == "mixtral")  # no router after layer 1
]


@pytest.mark.parametrize(("variant", "sender"), CASES)
def test_router_only(hf: Any, variant: str, sender: str) -> None:
    """All receivers at all places; one receiver at some; all receivers with the outputs of their layers held."""
    model, (tokens, mask) = hf(variant), prompts("left")
    real, after = mask.bool(), routers_after(model, sender)
    vectors = written_by(model, tokens, mask, sender)
    clean = reference_cache(model, tokens, mask)
    clean_logits = transformers_logits(model, tokens, mask)

    for receivers, places, hold in [(None, None, False), (after[-1:], PLACES, False), (None, PLACES, True)]:
        router_logits: dict[int, Tensor] = {}
        hooks = []
        for receiver in receivers or after:
            where = places or real_places(tokens, mask)
            hooks += hooks_of_receiver(model, receiver, vectors, where, router_logits)
            if hold:
                held = clean[f"blocks.{receiver}.hook_mlp_out"]
                hooks.append((model.model.layers[receiver].mlp, lambda *_, held=held: held))
        expected = transformers_logits(model, tokens, mask, *hooks)
        logits, cache = router_only_run(model, tokens, mask, sender, receivers, places, hold)
        assert_same(logits[real], expected)
        for receiver, value in router_logits.items():
            name = f"blocks.{receiver}.mlp.hook_router_logits"
            assert_same(cache[name][real], value[real], name)
            assert (cache[name] - clean[name])[PLACES[0]].abs().max() > (1e-4 if sender != "M1E3" else -1)
        if hold:
            assert_same(logits[real], clean_logits)
        elif places is None:
            assert (expected - clean_logits).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_senders_together_are_the_logits(hf: Any, variant: str) -> None:
    """What a router's logits lose, sender by sender, sums to the logits, as no router has a bias."""
    model, (tokens, mask) = hf(variant), prompts("right")
    receiver = routers_after(model, "embed")[-1]
    name = f"blocks.{receiver}.mlp.hook_router_logits"
    clean = reference_cache(model, tokens, mask)[name]
    senders = ["embed", *(f"{kind}{layer}" for layer in range(receiver + 1) for kind in "AM")][:-1]
    lost = [
        clean - router_only_run(model, tokens, mask, sender, [receiver])[1][name][..., :]
        for sender in senders
    ]
    assert_same(torch.stack(lost).sum(0)[mask.bool()], clean[mask.bool()])
    assert torch.equal(lost[0][~mask.bool()], torch.zeros_like(lost[0][~mask.bool()]))


def test_receivers_come_after_the_sender(hf: Any) -> None:
    """A router sees the attention of its own layer, not the experts'."""
    model, batch = hf("deepseek_v2"), prompts()
    assert routers_after(model, "A1H3") == [1, 2]
    assert routers_after(model, "M1S") == [2]
    assert routers_after(model, "embed") == [1, 2]  # layer 0 is dense
    with pytest.raises(AssertionError, match=r"M1 is not before \[1\]"):
        router_only_run(model, *batch, "M1", [1])

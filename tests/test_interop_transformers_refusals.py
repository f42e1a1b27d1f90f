"""What `attach` refuses, and what a model, a router or a hook may not do while it lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lens.interop.router_trace import RouterNotUnderstood
from moe_lens.interop.transformers import SlotSumError, attach
from tests.families import hf_model, prompts
from tests.interop_types import inputs, tiny_model
from tests.test_interop_transformers import force_others, halve_second_slot


def test_a_wrong_slot_raises(hf: Any) -> None:
    """An implementation whose output is not the sum of its slots is found, and its layer named."""

    def damaged(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, x, indices, weights)
        return out * (1 + 1e-4) if indices.shape[-1] > 1 else out

    theirs = hf("mixtral")
    own = theirs.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS["damaged"] = damaged
    try:
        theirs.config._experts_implementation_internal = "damaged"
        with (
            torch.no_grad(),
            attach(theirs) as attached,
            pytest.raises(SlotSumError, match=r"blocks\.0\.mlp .*1\.\de-04"),
        ):
            attached(prompts("none")[0])
    finally:
        theirs.config._experts_implementation_internal = own
        del ALL_EXPERTS_FUNCTIONS["damaged"]


def test_masked_expert(hf: Any) -> None:
    """A group-limited router that weighs by masked scores says which expert has no weight."""
    with torch.no_grad(), attach(hf("deepseek_v2_groups")) as attached:
        hook = ("blocks.0.mlp.hook_expert_indices", force_others)
        with pytest.raises(
            RouterNotUnderstood, match=r"cannot be forced at token .* \(its group is not among"
        ):
            attached.run_with_hooks(prompts("none")[0], fwd_hooks=[hook])


def test_choice_by_token_can_be_read_not_edited() -> None:
    """DeepSeek-V4's first layers choose by a table of tokens: logits are read there, an edit raises by name."""
    model, given = tiny_model("deepseek_v4"), inputs("deepseek_v4")
    with torch.no_grad(), attach(model) as attached:
        name = "blocks.0.mlp.hook_router_logits"
        _, cache = attached.run_with_cache(**given, names_filter=name)
        assert cache[name].shape == (2, 9, 8)
        with pytest.raises(
            RouterNotUnderstood, match=r"blocks\.0\.mlp \(DeepseekV4HashRouter .* can be read but not"
        ):
            attached.run_with_hooks(**given, fwd_hooks=[(name, lambda v, hook: v.flip(-1))])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v, hook: torch.zeros_like(v), "gives a token the same expert twice"),
        (lambda v, hook: v + 100, "names an expert outside 0..7"),
        (lambda v, hook: v.float(), "holds integers"),
    ],
)
def test_forced_indices_are_checked(hf: Any, edit: Any, message: str) -> None:
    with torch.no_grad(), attach(hf("olmoe")) as attached, pytest.raises(ValueError, match=message):
        attached.run_with_hooks(prompts("none")[0], fwd_hooks=[("blocks.1.mlp.hook_expert_indices", edit)])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", "llama .* has no experts: attach takes a Mixture-of-Experts model"),
        (
            "llama4_text",
            "does not use transformers' experts interface: .*Llama4TextExperts.*ALL_EXPERTS_FUNCTIONS",
        ),
    ],
)
def test_models_that_do_not_use_the_interface(model_type: str, message: str) -> None:
    sizes = dict(
        hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, vocab_size=64
    )
    config = AutoConfig.for_model(
        model_type, **sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message), attach(model):
        pass


def test_attached_twice(hf: Any) -> None:
    with attach(hf("olmoe")) as attached:
        with pytest.raises(ValueError, match="attached already"), attach(hf("olmoe")):
            pass
        assert "blocks.0.mlp.hook_router_logits" in attached.hook_dict
        with pytest.raises(
            ValueError, match=r"no hook named 'blocks\.0\.mlp\.hook_router_logit'; nearest are"
        ):
            attached.add_hook("blocks.0.mlp.hook_router_logit", print)


def test_after_the_context(hf: Any) -> None:
    """What attach gave runs nothing any more, where no hook would see it; the model does."""
    tokens, _ = prompts("none")
    with torch.no_grad():
        with attach(hf("olmoe")) as attached:
            pass
        runs: list[Callable[[], Any]] = [
            lambda: attached(tokens),
            lambda: attached.run_with_cache(tokens),
            lambda: attached.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, halve_second_slot)]),
        ]
        for run in runs:
            with pytest.raises(RuntimeError, match=r"the context of attach has ended.*attach again"):
                run()
        with attach(hf("olmoe")) as again:
            assert torch.equal(again(tokens).logits, hf("olmoe")(tokens).logits)
            with pytest.raises(RuntimeError, match="the context of attach has ended"):
                attached(tokens)


def test_what_is_no_transformers_model(hf: Any, model_of: Callable[[str], Any]) -> None:
    for wrong in (model_of("olmoe"), torch.nn.Sequential(hf("olmoe")), "olmoe", None):
        with (
            pytest.raises(TypeError, match=f"not a transformers model but a {type(wrong).__name__}"),
            attach(wrong),  # type: ignore[arg-type]
        ):
            pass


@pytest.mark.parametrize("given", ["some text", ["some text"], [[1, 2]], {"input_ids": torch.ones(1, 2)}])
def test_what_are_no_tokens(hf: Any, given: Any) -> None:
    with (
        attach(hf("olmoe")) as attached,
        pytest.raises(TypeError, match=r"takes tokens, a tensor \[batch, pos\], not (str|list|dict)"),
    ):
        attached.run_with_cache(given)


def test_a_block_without_its_experts_raises(hf: Any) -> None:
    """A kernel in a block's place would leave the points silent."""
    theirs = hf("mixtral")
    block = theirs.model.layers[1].mlp
    block.forward = lambda hidden_states: hidden_states
    try:
        with (
            torch.no_grad(),
            attach(theirs) as attached,
            pytest.raises(RuntimeError, match=r"blocks\.1\.mlp .* ran without"),
        ):
            attached(prompts("none")[0])
    finally:
        del block.forward


def test_implementation_set_while_attached(checkpoint: Any) -> None:
    theirs = hf_model(checkpoint("olmoe"))
    with torch.no_grad(), attach(theirs) as attached:
        theirs.set_experts_implementation("batched_mm")
        with pytest.raises(RuntimeError, match="set to 'batched_mm' while attached; set it before attach"):
            attached(prompts("none")[0])


def test_noise_in_training(hf: Any) -> None:
    """A router that runs again would draw other noise: an edit in training mode raises, reading does not."""
    theirs = hf("mixtral")
    hook = ("blocks.0.mlp.hook_router_logits", lambda v, hook: v.flip(-1))
    try:
        with torch.no_grad(), attach(theirs.train()) as attached:
            attached.run_with_cache(prompts("none")[0])
            with pytest.raises(RuntimeError, match=r"call eval\(\) on the model first"):
                attached.run_with_hooks(prompts("none")[0], fwd_hooks=[hook])
    finally:
        theirs.eval()

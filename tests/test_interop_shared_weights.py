"""`hooked_view`: a HookedMoE on a transformers model's memory, equal to the one that is loaded from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lens import HookedMoE
from moe_lens.converters import CheckpointMismatch, UnsupportedCheckpoint
from moe_lens.interop.shared_weights import hooked_view
from moe_lens.interop.transformers import attach
from moe_lens.routing.provenance import weights_fingerprint
from tests.checkpoints import load
from tests.families import FAMILIES, PLAIN_VARIANTS, hf_model, prompts, variant_config

# Biases, dense layers, widths that no kernel is made for, low-rank queries, ties.
VARIANTS = sorted(
    {
        *FAMILIES,
        "olmoe_bias_odd_width",
        "qwen2_moe_sparse_step",
        "qwen2_moe_no_bias",
        "deepseek_v2_groups",
        "deepseek_v2_bias",
        "qwen3_moe_dense_bias",
        "mixtral_head_dim_odd_width",
    }
)
assert set(VARIANTS) <= set(PLAIN_VARIANTS)


def storages(model: Any) -> dict[int, int]:
    """The memory of a model's parameters and buffers: where each piece begins, and its bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def assert_same(view: HookedMoE, loaded: HookedMoE, tolerance: float) -> None:
    """Logits and all cached hooks, on a padded batch; expert indices are identical. At real queries: a pattern has
    them on its third axis."""
    tokens, mask = prompts("left")
    logits, cache = view.run_with_cache(tokens, attention_mask=mask)
    expected_logits, expected = loaded.run_with_cache(tokens, attention_mask=mask)
    assert list(cache) == list(expected)
    pairs = {name: (cache[name], expected[name]) for name in expected} | {"": (logits, expected_logits)}
    for name, (got, wanted) in pairs.items():
        assert got.dtype == wanted.dtype, name
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            got, wanted = (t.nan_to_num(neginf=0.0).transpose(1, 2) for t in (got, wanted))
        got, wanted = got[mask.bool()], wanted[mask.bool()]
        if name.endswith("hook_expert_indices"):
            assert torch.equal(got, wanted), name
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loaded_model(hf: Callable[[str], Any], hooked: Any, variant: str) -> None:
    with torch.no_grad():
        view = hooked_view(hf(variant))
        assert view.cfg == replace(hooked(variant).cfg, model_name=view.cfg.model_name)
        assert_same(view, hooked(variant), 1e-5)


@pytest.mark.parametrize("variant", FAMILIES)
def test_equals_the_loaded_model_in_bfloat16(checkpoint: Any, variant: str) -> None:
    """The same arithmetic on another layout in memory: at most a few roundings of bfloat16 apart."""
    theirs = hf_model(checkpoint(variant), torch.bfloat16)
    loaded = load(checkpoint(variant), dtype=torch.bfloat16)
    with torch.no_grad():
        assert_same(hooked_view(theirs), loaded, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_memory_of_its_own(hf: Callable[[str], Any], variant: str) -> None:
    view, theirs = hooked_view(hf(variant)), storages(hf(variant))
    assert set(storages(view)) <= set(theirs)
    assert sum(p.numel() for p in view.parameters()) == sum(p.numel() for p in hf(variant).parameters())
    layer = view.cfg.moe_layers[-1]
    experts, own = view.blocks[layer].mlp.experts, hf(variant).model.layers[layer].mlp.experts
    assert experts.W_gate_up.data_ptr() == own.gate_up_proj.data_ptr()
    assert experts.W_down.data_ptr() == own.down_proj.data_ptr()


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_change_in_place_is_seen(checkpoint: Any, variant: str) -> None:
    """Of every weight, in the outputs and by the weights' fingerprint; and the other way round."""
    theirs = hf_model(checkpoint(variant))
    view, (tokens, _) = hooked_view(theirs), prompts("none")
    with torch.no_grad():
        for parameter in theirs.parameters():
            before = weights_fingerprint(view)
            parameter.mul_(1.01)
            assert weights_fingerprint(view) != before
        logits = theirs(tokens).logits
        torch.testing.assert_close(view(tokens), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
        view.blocks[1].mlp.experts.W_down[0, 1] = 7.0
        assert bool((theirs.model.layers[1].mlp.experts.down_proj[0, :, 1] == 7).all())


def test_gradients_are_its_own(checkpoint: Any) -> None:
    theirs = hf_model(checkpoint("qwen2_moe"))
    theirs.lm_head.weight.requires_grad_(False)
    view, (tokens, _) = hooked_view(theirs), prompts("none")
    view(tokens, return_type="loss").backward()
    assert view.unembed.weight.grad is None
    theirs(tokens, labels=tokens).loss.backward()
    own = theirs.model.layers[1].mlp.experts.down_proj.grad
    got = view.blocks[1].mlp.experts.W_down.grad
    torch.testing.assert_close(got.mT, own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_structure_alone(variant: str) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(variant_config(variant))
    view = hooked_view(theirs)
    assert view.cfg.device.type == "meta"
    assert all(p.is_meta for p in view.parameters())
    with torch.device("meta"):
        plain = HookedMoE(view.cfg)
    assert list(view.hook_dict) == list(plain.hook_dict)
    assert {name: point.name for name, point in view.hook_dict.items()} == {
        name: name for name in plain.hook_dict
    }


def test_tokenizer_and_text(hf: Callable[[str], Any], hooked: Any) -> None:
    view = hooked_view(hf("olmoe"), hooked("olmoe").tokenizer)
    with torch.no_grad():
        assert view.generate("The router", 4) == hooked("olmoe").generate("The router", 4)


def test_of_an_attached_model(hf: Callable[[str], Any], hooked: Any) -> None:
    """What is attached to the transformers model has no part in the view."""
    with torch.no_grad(), attach(hf("olmoe")) as attached:
        attached.add_hook("blocks.0.mlp.hook_expert_out", lambda v, hook: v * 0)
        assert_same(hooked_view(hf("olmoe")), hooked("olmoe"), 1e-5)


def test_unknown_model_type() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    with pytest.raises(UnsupportedCheckpoint, match="no converter for model type 'llama'; known model types"):
        hooked_view(AutoModelForCausalLM.from_config(config))


def test_what_is_no_transformers_model(hf: Callable[[str], Any], hooked: Any) -> None:
    for wrong in (hooked("olmoe"), torch.nn.Sequential(hf("olmoe")), "olmoe", None):
        with pytest.raises(TypeError, match=f"not a transformers model but a {type(wrong).__name__}"):
            hooked_view(wrong)  # type: ignore[arg-type]


def narrower(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :, :-1])


def in_half(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.to(torch.bfloat16)


def quantised(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.flatten()[:, None].to(torch.uint8), requires_grad=False)


def without_norm(model: Any) -> None:
    model.model.norm = torch.nn.Identity()


def with_adapter(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.lora_A = torch.nn.Linear(64, 2, bias=False)


def elsewhere(model: Any) -> None:
    model.lm_head.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            narrower,
            r"layers\.1\.mlp\.experts\.down_proj has shape \[8, 64, 31\], the config asks for \[8, 64, 32\]",
        ),
        (in_half, r"layers\.0\.self_attn\.q_proj\.weight is in torch\.bfloat16, the model in torch\.float32"),
        (quantised, r"q_proj\.weight has shape \[4096, 1\].*q_proj\.weight is in torch\.uint8"),
        (without_norm, r"OlmoeForCausalLM is not the olmoe model of its config.*missing model\.norm\.weight"),
        (with_adapter, r"surplus model\.layers\.1\.self_attn\.o_proj\.lora_A\.weight"),
        (elsewhere, r"lm_head\.weight is on meta, the model on cpu"),
    ],
)
def test_changed_models(checkpoint: Callable[[str], Path], change: Any, message: str) -> None:
    theirs = hf_model(checkpoint("olmoe"))
    change(theirs)
    with pytest.raises(CheckpointMismatch, match=message):
        hooked_view(theirs)


def test_untied_against_the_config(checkpoint: Callable[[str], Path]) -> None:
    theirs = hf_model(checkpoint("qwen2_moe_sparse_step"))
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    with pytest.raises(
        CheckpointMismatch, match="tie_word_embeddings=true, but the unembedding is a tensor of its own"
    ):
        hooked_view(theirs)

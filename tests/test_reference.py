"""The reference implementation against transformers: all that a forward hook on its modules can see."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from tests.families import VARIANTS, VOCABULARY, hf_model, prompts, write_checkpoint
from tests.reference import (
    assert_same,
    reference_cache,
    reference_logits,
    reference_loss_per_token,
    reference_run,
    visible_keys,
)

PADDINGS = ("none", "left", "right")


@contextmanager
def everything_transformers_shows(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Inputs and outputs of all its modules, as `name.in`, `name.out`, and what its attention is handed."""
    seen: dict[str, list[Any]] = {}

    def keep(key: str, value: Any) -> None:
        copies = [part.clone() if isinstance(part, Tensor) else part for part in value]
        seen[key] = copies

    def listen(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            keep(f"{name}.in", args or (kwargs.get("hidden_states"),))
            keep(f"{name}.out", output if isinstance(output, tuple) else (output,))

        return hook

    handles = [
        module.register_forward_hook(listen(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    source = importlib.import_module(type(model).__module__)
    eager = source.eager_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = eager(module, query, key, value, *args, **kwargs)
        by_position = [part.transpose(1, 2) for part in (query, key, value)]
        keep(f"model.layers.{module.layer_idx}.attention", [*by_position, *output])
        return output

    with patch.object(source, "eager_attention_forward", attention):
        yield seen
    for handle in handles:
        handle.remove()


def additive_mask(attention_mask: Tensor) -> Tensor:
    """The mask that the reference uses, in the form that transformers passes through untouched."""
    visible = visible_keys(attention_mask.bool()).unsqueeze(1)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@torch.no_grad()
def transformers_cache(model: Any, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Those hook points whose value transformers computes somewhere, under their names."""
    with everything_transformers_shows(model) as seen:
        logits = model(tokens, attention_mask=additive_mask(attention_mask), use_cache=False).logits
    batch, length = tokens.shape
    values: dict[str, Tensor] = {"logits": logits, "hook_embed": seen["model.embed_tokens.out"][0]}
    gains = {"ln_final.": ("model.norm", model.model.norm)}
    for index, layer in enumerate(model.model.layers):
        source, name = f"model.layers.{index}.", f"blocks.{index}."
        gains[name + "ln1."] = (source + "input_layernorm", layer.input_layernorm)
        gains[name + "ln2."] = (source + "post_attention_layernorm", layer.post_attention_layernorm)
        values[name + "hook_resid_pre"] = seen[source[:-1] + ".in"][0]
        values[name + "hook_resid_mid"] = seen[source + "post_attention_layernorm.in"][0]
        values[name + "hook_resid_post"] = seen[source[:-1] + ".out"][0]
        values[name + "hook_attn_out"] = seen[source + "self_attn.out"][0]
        values[name + "hook_mlp_out"] = seen[source + "mlp.out"][0]

        q, k, v, z, pattern = seen[source + "attention"]
        values |= {name + "attn.hook_rot_q": q, name + "attn.hook_rot_k": k, name + "attn.hook_v": v}
        values |= {name + "attn.hook_z": z, name + "attn.hook_pattern": pattern}
        q_source = "q_proj.out" if f"{source}self_attn.q_proj.out" in seen else "q_b_proj.out"
        values[name + "attn.hook_q"] = seen[f"{source}self_attn.{q_source}"][0].view(q.shape)
        if f"{source}self_attn.k_proj.out" in seen:
            values[name + "attn.hook_k"] = seen[source + "self_attn.k_proj.out"][0].view(k.shape)

        def flat(key: str, at: str = source) -> Tensor:
            return seen[f"{at}mlp.{key}"][0].view(batch, length, -1)

        if hasattr(layer.mlp, "experts"):
            router_logits, weights, indices = (
                part.view(batch, length, -1) for part in seen[source + "mlp.gate.out"]
            )
            weights, order = weights.sort(-1, descending=True)
            values[name + "mlp.hook_router_logits"] = router_logits
            values[name + "mlp.hook_routing_weights"] = weights
            values[name + "mlp.hook_expert_indices"] = indices.gather(-1, order)
            for shared in ("shared_expert", "shared_experts"):
                if hasattr(layer.mlp, shared):
                    values[name + "mlp.hook_shared_pre"] = flat(f"{shared}.gate_proj.out")
                    values[name + "mlp.hook_shared_pre_linear"] = flat(f"{shared}.up_proj.out")
                    values[name + "mlp.hook_shared_post"] = flat(f"{shared}.down_proj.in")
            if hasattr(layer.mlp, "shared_expert_gate"):
                values[name + "mlp.hook_shared_gate"] = flat("shared_expert_gate.out").sigmoid()
            values[name + "mlp.sum of contributions"] = flat("experts.out")
        else:
            values[name + "mlp.hook_pre"] = flat("gate_proj.out")
            values[name + "mlp.hook_pre_linear"] = flat("up_proj.out")
            values[name + "mlp.hook_post"] = flat("down_proj.in")
    for name, (source, norm) in gains.items():
        values[name + "hook_normalized"] = seen[source + ".out"][0] / norm.weight
    return values


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_transformers(hf: Any, variant: str, padding: str) -> None:
    """Every value that transformers shows, at all positions, and logits under its own mask at real ones."""
    model = hf(variant)
    tokens, mask = prompts(padding)
    expected = transformers_cache(model, tokens, mask)
    with torch.no_grad():
        logits, cache = reference_run(model, tokens, mask)
        own_mask = model(tokens, attention_mask=mask, use_cache=False).logits
    assert_same(logits, expected.pop("logits"), "logits")
    assert_same(logits[mask.bool()], own_mask[mask.bool()], "logits under transformers' own mask")
    for name, value in expected.items():
        if name.endswith("sum of contributions"):
            actual = cache[name.replace("sum of contributions", "hook_expert_contrib")].sum(2)
        else:
            actual = cache[name]
        if not value.is_floating_point():
            assert torch.equal(actual, value), name
        else:
            assert_same(actual, value, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_adds_up(hf: Any, variant: str) -> None:
    """What transformers does not show is tied to what it does: parts sum to wholes, factors to products."""
    model = hf(variant)
    tokens, mask = prompts("left")
    cache = reference_cache(model, tokens, mask)
    for index, layer in enumerate(model.model.layers):

        def at(name: str, block: int = index) -> Tensor:
            return cache[f"blocks.{block}.{name}"]

        bias = layer.self_attn.o_proj.bias
        written = at("attn.hook_result").sum(2) + (0 if bias is None else bias)
        assert_same(written, at("hook_attn_out"), "results and bias")
        assert_same(at("attn.hook_attn_scores").softmax(-1), at("attn.hook_pattern"), "pattern")
        assert_same(at("hook_resid_pre") + at("hook_attn_out"), at("hook_resid_mid"), "resid_mid")
        assert_same(at("ln1.hook_normalized") * at("ln1.hook_scale"), at("hook_resid_pre"), "scale")
        if hasattr(layer.mlp, "experts"):
            whole = at("mlp.hook_expert_contrib").sum(2)
            if f"blocks.{index}.mlp.hook_shared_out" in cache:
                whole = whole + at("mlp.hook_shared_out")
            assert_same(whole, at("hook_mlp_out"), "slots and shared experts")
            product = at("mlp.hook_routing_weights").unsqueeze(-1) * at("mlp.hook_expert_out")
            assert_same(product, at("mlp.hook_expert_contrib"), "weight times output")
            assert (at("mlp.hook_routing_weights").diff(dim=-1) <= 0).all()
            assert_same(at("mlp.hook_expert_weights").sum(-1), torch.ones(tokens.shape), "probabilities")


@pytest.mark.parametrize("variant", VARIANTS)
def test_expert_out_is_that_of_transformers_alone(hf: Any, variant: str) -> None:
    """Slot k of token t is what transformers' experts module gives for that one expert at that one token."""
    model = hf(variant)
    tokens, _ = prompts()
    with everything_transformers_shows(model) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    cache = reference_cache(model, tokens)
    index = max(index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    x = seen[f"model.layers.{index}.post_attention_layernorm.out"][0]
    indices = cache[f"blocks.{index}.mlp.hook_expert_indices"]
    for row, position, slot in [(0, 0, 0), (1, 4, 1), (1, tokens.shape[1] - 1, indices.shape[-1] - 1)]:
        expert = indices[row, position, slot].view(1, 1)
        with torch.no_grad():
            alone = model.model.layers[index].mlp.experts(
                x[row, position].unsqueeze(0), expert, torch.ones(1, 1)
            )
        assert_same(
            cache[f"blocks.{index}.mlp.hook_expert_out"][row, position, slot], alone[0], "expert alone"
        )


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_per_token(hf: Any, padding: str) -> None:
    """Its mean is transformers' loss; positions without a next token are NaN."""
    model = hf("qwen2_moe")
    tokens, mask = prompts(padding)
    loss = reference_loss_per_token(model, tokens, mask)
    assert loss.shape == (tokens.shape[0], tokens.shape[1] - 1)
    assert torch.equal(loss.isnan(), ~(mask[:, :-1] * mask[:, 1:]).bool())
    with torch.no_grad():
        labels = tokens.masked_fill(mask == 0, -100)
        if padding == "left":  # the first real token is predicted from padding there, which is no row here
            labels[torch.arange(len(labels)), mask.argmax(-1)] = -100
        expected = model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss
    assert_same(loss[~loss.isnan()].mean(), expected)


def test_an_edit_changes_what_follows_and_nothing_before(hf: Any) -> None:
    """Edits act at their place: earlier hook points keep their values, later ones and the logits move."""
    model = hf("olmoe")
    tokens, _ = prompts()
    clean = reference_cache(model, tokens)
    edited_logits, edited = reference_run(model, tokens, edits={"blocks.1.hook_mlp_out": lambda x: 0 * x})
    names = list(clean)
    place = names.index("blocks.1.hook_mlp_out")
    assert all(torch.equal(clean[name], edited[name]) for name in names[:place])
    assert not torch.equal(clean["blocks.2.hook_resid_pre"], edited["blocks.2.hook_resid_pre"])
    assert not torch.equal(edited_logits, reference_logits(model, tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_are_worth_testing_with(hf: Any, variant: str) -> None:
    """Logits of order one, routing decisive and varied, gains and biases that matter."""
    model = hf(variant)
    tokens, _ = prompts(batch=4, length=24)
    with torch.no_grad():
        assert 0.3 < model(tokens, use_cache=False).logits.std() < 10
    cache = reference_cache(model, tokens)
    routers = [name for name in cache if name.endswith("hook_expert_indices")]
    assert routers
    for name in routers:
        assert len(cache[name].unique()) == 8, f"{name} leaves experts out"
        weights = cache[name.replace("indices", "weights")]
        assert 0.2 < weights.amax(-1).mean() < 0.9
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.02, f"{name} is trivial"


def test_checkpoints_are_in_hub_layout(tmp_path: Path) -> None:
    """Experts are stored one by one, in several files where asked for, in the dtype asked for."""
    directory = write_checkpoint("mixtral_bf16_sharded", tmp_path)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    stored: dict[str, torch.dtype] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            stored |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    assert set(stored.values()) == {torch.bfloat16}
    assert "lm_head.weight" not in stored


def test_checkpoints_are_seeded(tmp_path: Path) -> None:
    """The same seed writes the same weights, another one others."""
    models = [
        hf_model(write_checkpoint("olmoe", tmp_path / str(n), seed=seed)) for n, seed in enumerate((0, 0, 1))
    ]
    weights = [model.model.layers[0].mlp.gate.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tokenizer_round_trip(checkpoint: Any) -> None:
    """It loads with transformers, fits the tiny vocabulary and gives text back."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("olmoe"))
    text = "When Mary spoke, the router sent 42 tokens to expert 7!"
    ids = tokenizer(text).input_ids
    assert max(ids) < VOCABULARY
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text

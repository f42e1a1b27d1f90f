"""TransformerLens's `ActivationCache` methods on caches of `HookedMoE`, against arithmetic on the reference.

The expected values come from `tests.reference` (transformers' weights, one step at a time) and from the
checkpoint's own tensors; nothing here asks moe_lens what the answer is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.tools.analysis import logit_lens

from moe_lens import HookedMoE
from tests.families import prompts
from tests.reference import reference_cache, reference_logits

# Every family, and with them: output biases, grouped queries, latent attention with a value width of its own,
# dense layers at the front and in the middle, tied embeddings.
CASES = (
    "olmoe_bias_odd_width",
    "olmoe_gqa_clip",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_bias",
    "deepseek_v2_two_dense",
    "qwen3_moe_dense_bias",
    "mixtral",
)
WITH_OUTPUT_BIAS = (
    "olmoe_bias_odd_width",
    "deepseek_v2_bias",
    "deepseek_v2_two_dense",
    "qwen3_moe_dense_bias",
)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding, relative to the largest entry."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < 2e-5, f"relative error {error:.1e}"


@dataclass
class Run:
    """One left-padded batch through the hooked model, and through the reference."""

    model: HookedMoE
    cache: ActivationCache
    hf: Any
    tokens: Tensor
    reference: dict[str, Tensor]
    reference_logits: Tensor

    @property
    def n_layers(self) -> int:
        return len(self.hf.model.layers)

    def at(self, layer: int, name: str) -> Tensor:
        return self.reference[f"blocks.{layer}.{name}"]

    def scale(self, layer: int, mlp_input: bool = False) -> Tensor:
        """The denominator of the norm that reads the stream at `layer`; `n_layers` is the final one."""
        if layer == self.n_layers:
            return self.reference["ln_final.hook_scale"]
        return self.at(layer, "ln2.hook_scale" if mlp_input else "ln1.hook_scale")

    def stream(self, layer: int, mlp_input: bool = False) -> Tensor:
        """The residual stream at the same place."""
        if layer == self.n_layers:
            return self.at(layer - 1, "hook_resid_post")
        return self.at(layer, "hook_resid_mid" if mlp_input else "hook_resid_pre")

    def output_bias(self, layer: int) -> Tensor:
        bias = self.hf.model.layers[layer].self_attn.o_proj.bias
        return torch.zeros(self.tokens.shape[0], 1, self.hf.config.hidden_size) if bias is None else bias

    def directions(self, tokens: Any) -> Tensor:
        """Rows of the unembedding with the final gain folded in."""
        return self.hf.lm_head.weight[torch.as_tensor(tokens)] * self.hf.model.norm.weight

    def places(self) -> list[tuple[int, bool]]:
        """Every place of the stream that a norm reads: (layer, before its MLP?)."""
        inside = [(layer, mlp_input) for layer in range(self.n_layers) for mlp_input in (False, True)]
        return [*inside, (self.n_layers, False)]


@pytest.fixture(scope="module")
def run(checkpoint: Callable[[str], Path], hf: Callable[[str], Any]) -> Callable[[str], Run]:
    @cache
    @torch.no_grad()
    def run_variant(variant: str) -> Run:
        model = HookedMoE.from_pretrained(checkpoint(variant), device="cpu", verbose=False)
        tokens, mask = prompts("left")
        _, cached = model.run_with_cache(tokens, attention_mask=mask)
        assert isinstance(cached, ActivationCache)
        return Run(
            model,
            cached,
            hf(variant),
            tokens,
            reference_cache(hf(variant), tokens, mask),
            reference_logits(hf(variant), tokens, mask),
        )

    return run_variant


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# --- decompose_resid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_decompose_resid_is_embedding_attentions_and_mlps(run: Any, variant: str) -> None:
    """Each component is the reference's, in order and under its label; together they are the stream."""
    r = run(variant)
    for layer, mlp_input in r.places():
        expected, names = [r.reference["hook_embed"]], ["embed"]
        for block in range(layer):
            expected += [r.at(block, "hook_attn_out"), r.at(block, "hook_mlp_out")]
            names += [f"{block}_attn_out", f"{block}_mlp_out"]
        if mlp_input:
            expected.append(r.at(layer, "hook_attn_out"))
            names.append(f"{layer}_attn_out")
        stack, labels = r.cache.decompose_resid(layer, mlp_input=mlp_input, return_labels=True)
        assert labels == names
        assert_same(stack, torch.stack(expected))
        assert_same(stack.sum(0), r.stream(layer, mlp_input))


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("mode", ["attn", "mlp"])
def test_decompose_resid_of_one_kind(run: Any, variant: str, mode: str) -> None:
    r = run(variant)
    expected = torch.stack([r.at(layer, f"hook_{mode}_out") for layer in range(r.n_layers)])
    stack, labels = r.cache.decompose_resid(mode=mode, incl_embeds=False, return_labels=True)
    assert labels == [f"{layer}_{mode}_out" for layer in range(r.n_layers)]
    assert_same(stack, expected)
    assert_same(r.cache.decompose_resid(mode=mode)[0], r.reference["hook_embed"])


@pytest.mark.parametrize("variant", CASES)
def test_decompose_resid_through_the_norm(run: Any, variant: str) -> None:
    """`apply_ln` divides every component by the true scale of the place that reads them."""
    r = run(variant)
    for layer, mlp_input in r.places():
        plain = r.cache.decompose_resid(layer, mlp_input=mlp_input)
        normed = r.cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
        assert_same(normed, plain / r.scale(layer, mlp_input))
        assert_same(normed.sum(0), r.stream(layer, mlp_input) / r.scale(layer, mlp_input))


@pytest.mark.parametrize("variant", ["deepseek_v2", "mixtral"])
@pytest.mark.parametrize("positions", [-1, (2, 5), [0, 3]])
def test_decompose_resid_at_some_positions(run: Any, variant: str, positions: Any) -> None:
    r = run(variant)
    index = slice(*positions) if isinstance(positions, tuple) else positions
    stack = r.cache.decompose_resid(apply_ln=True, pos_slice=positions)
    stream, scale = (value[:, index] for value in (r.stream(r.n_layers), r.scale(r.n_layers)))
    assert_same(stack.sum(0), stream / scale)


# --- accumulated_resid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("incl_mid", [False, True])
def test_accumulated_resid(run: Any, variant: str, incl_mid: bool) -> None:
    r = run(variant)
    expected, names = [], []
    for layer in range(r.n_layers):
        expected.append(r.at(layer, "hook_resid_pre"))
        names.append(f"{layer}_pre")
        if incl_mid:
            expected.append(r.at(layer, "hook_resid_mid"))
            names.append(f"{layer}_mid")
    expected.append(r.at(r.n_layers - 1, "hook_resid_post"))
    stack, labels = r.cache.accumulated_resid(incl_mid=incl_mid, return_labels=True)
    assert labels == [*names, "final_post"]
    assert_same(stack, torch.stack(expected))

    # The final norm takes every state's own scale, and multiplies by its gain.
    final = r.hf.model.norm
    own_scale = (torch.stack(expected).pow(2).mean(-1, keepdim=True) + final.variance_epsilon).sqrt()
    through_norm = r.cache.accumulated_resid(incl_mid=incl_mid, apply_ln=True)
    assert_same(through_norm, torch.stack(expected) / own_scale * final.weight)


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("mlp_input", [False, True])
def test_accumulated_resid_up_to_a_layer(run: Any, variant: str, mlp_input: bool) -> None:
    r = run(variant)
    layer = 1
    expected = [r.at(0, "hook_resid_pre"), r.at(1, "hook_resid_pre")]
    expected += [r.at(1, "hook_resid_mid")] if mlp_input else []
    stack = r.cache.accumulated_resid(layer, mlp_input=mlp_input, apply_ln=True)
    assert_same(stack, torch.stack(expected) / r.scale(layer, mlp_input))


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_stack_head_results(run: Any, variant: str) -> None:
    """Every head's row is what the reference writes for it; a layer's heads sum to attn_out minus its bias."""
    r = run(variant)
    stack, labels = r.cache.stack_head_results(return_labels=True)
    n_heads = r.hf.config.num_attention_heads
    assert labels == [f"L{layer}H{head}" for layer in range(r.n_layers) for head in range(n_heads)]
    for layer in range(r.n_layers):
        rows = stack[layer * n_heads : (layer + 1) * n_heads]
        assert_same(rows, r.at(layer, "attn.hook_result").movedim(2, 0))
        assert_same(rows.sum(0), r.at(layer, "hook_attn_out") - r.output_bias(layer))


@pytest.mark.parametrize("variant", CASES)
def test_stack_head_results_with_remainder_and_norm(run: Any, variant: str) -> None:
    r = run(variant)
    n_heads = r.hf.config.num_attention_heads
    for layer in range(1, r.n_layers + 1):
        stack, labels = r.cache.stack_head_results(layer, incl_remainder=True, return_labels=True)
        assert len(stack) == len(labels) == layer * n_heads + 1
        assert labels[-1] == "remainder"
        heads = sum(r.at(block, "attn.hook_result").sum(2) for block in range(layer))
        assert_same(stack[-1], r.stream(layer) - heads)
        assert_same(stack.sum(0), r.stream(layer))
        normed = r.cache.stack_head_results(layer, incl_remainder=True, apply_ln=True)
        assert_same(normed, stack / r.scale(layer))
    last = r.cache.stack_head_results(pos_slice=-1)
    assert_same(last[0], r.at(0, "attn.hook_result")[:, -1, 0])


@pytest.mark.parametrize("variant", CASES)
def test_compute_head_results(run: Any, checkpoint: Any, variant: str) -> None:
    """From z alone, after the run; and during the run with `set_use_attn_result(True)`: the same numbers."""
    r = run(variant)
    _, mask = prompts("left")
    model = HookedMoE.from_pretrained(checkpoint(variant), device="cpu", verbose=False)
    logits, later = model.run_with_cache(r.tokens, attention_mask=mask)
    assert not any("hook_result" in name for name in later)
    later.compute_head_results()

    model.set_use_attn_result(True)
    assert model.cfg.use_attn_result
    same_logits, at_once = model.run_with_cache(r.tokens, attention_mask=mask)
    assert_same(same_logits, logits)
    for layer in range(r.n_layers):
        assert_same(at_once["result", layer], r.at(layer, "attn.hook_result"))
        assert_same(later["result", layer], r.at(layer, "attn.hook_result"))
        weight = r.hf.model.layers[layer].self_attn.o_proj.weight
        assert_same(model.blocks[layer].attn.W_O.flatten(0, 1), weight.T)

    model.set_use_attn_result(False)
    _, without = model.run_with_cache(r.tokens, attention_mask=mask)
    assert not any("hook_result" in name for name in without)


# --- logit attribution and the logit lens -------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("kind", ["components", "heads and mlps"])
def test_logit_attrs_sum_to_the_logits(run: Any, variant: str, kind: str) -> None:
    """Components alone give the logits and their differences, at every position: nothing is left over."""
    r = run(variant)
    if kind == "components":
        stack = r.cache.decompose_resid()
    else:
        stack = r.cache.get_full_resid_decomposition(expand_neurons=False)
    right, wrong = torch.tensor([17, 90]), torch.tensor([5, 33])
    rows = torch.arange(2)
    expected_right, expected_wrong = r.reference_logits[rows, :, right], r.reference_logits[rows, :, wrong]
    assert_same(r.cache.logit_attrs(stack, right).sum(0), expected_right)
    assert_same(r.cache.logit_attrs(stack, right, wrong).sum(0), expected_right - expected_wrong)


@pytest.mark.parametrize("variant", CASES)
def test_logit_attrs_of_each_component(run: Any, variant: str) -> None:
    """A component's share: divided by the true final scale, times the gain, along the token's unembedding."""
    r = run(variant)
    stack = r.cache.decompose_resid()
    components = [r.reference["hook_embed"]]
    for layer in range(r.n_layers):
        components += [r.at(layer, "hook_attn_out"), r.at(layer, "hook_mlp_out")]
    normed = torch.stack(components) / r.scale(r.n_layers)
    tokenizer = r.model.tokenizer
    text, other = "e", "t"
    token, wrong = (tokenizer.convert_tokens_to_ids(part) for part in (text, other))
    single = normed @ r.directions(token)
    assert_same(r.cache.logit_attrs(stack, text), single)
    assert_same(r.cache.logit_attrs(stack, token), single)
    assert_same(r.cache.logit_attrs(stack, torch.tensor(token)), single)
    difference = normed @ (r.directions(token) - r.directions(wrong))
    assert_same(r.cache.logit_attrs(stack, text, other), difference)
    assert_same(r.cache.logit_attrs(stack, token, wrong), difference)
    everywhere = r.cache.logit_attrs(stack, r.tokens)  # a token for each row and position
    assert_same(everywhere, (normed * r.directions(r.tokens)).sum(-1))
    last = r.cache.logit_attrs(r.cache.decompose_resid(pos_slice=-1), token, pos_slice=-1)
    assert_same(last, single[:, :, -1])
    one_row = r.cache.logit_attrs(stack, token, batch_slice=1)
    assert_same(one_row, single[:, 1])


@pytest.mark.parametrize("variant", CASES)
def test_logit_lens(run: Any, variant: str) -> None:
    """Every state through the final norm and the unembedding; the last one gives the model's logits."""
    r = run(variant)
    result = r.cache.logit_lens(positions=None, incl_mid=True)
    assert result.labels[-1] == "final_post"
    assert_same(result.values[-1], r.reference_logits)
    for label, values in zip(result.labels[:-1], result.values[:-1], strict=True):
        layer, place = label.split("_")
        expected = r.hf.lm_head(r.hf.model.norm(r.at(int(layer), f"hook_resid_{place}")))
        assert_same(values, expected)

    token = r.model.tokenizer.convert_tokens_to_ids("e")
    ranks = r.cache.logit_lens(targets="e").rank_trajectory("e")
    logits = r.reference_logits[:, -1]
    assert torch.equal(ranks[-1], (logits > logits[:, [token]]).sum(-1))


def test_logit_lens_runs_the_model_itself(run: Any) -> None:
    """Given tokens, TransformerLens runs the model, and checks its readout against the model's own logits."""
    r = run("deepseek_v2")
    result = logit_lens(r.model, r.tokens, positions=None)
    assert_same(result.values[-1], reference_logits(r.hf, r.tokens))


# --- the full decomposition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_full_resid_decomposition(run: Any, variant: str) -> None:
    """Heads, MLPs, embedding and biases: each row the reference's, all rows together the stream."""
    r = run(variant)
    n_heads = r.hf.config.num_attention_heads
    for layer, mlp_input in r.places():
        stack, labels = r.cache.get_full_resid_decomposition(
            layer, mlp_input=mlp_input, expand_neurons=False, return_labels=True
        )
        rows = dict(zip(labels, stack, strict=True))
        attentions = layer + int(mlp_input)
        assert len(rows) == len(labels) == attentions * n_heads + layer + 2
        for block in range(attentions):
            for head in range(n_heads):
                assert_same(rows[f"L{block}H{head}"], r.at(block, "attn.hook_result")[:, :, head])
        for block in range(layer):
            assert_same(rows[f"{block}_mlp_out"], r.at(block, "hook_mlp_out"))
        assert_same(rows["embed"], r.reference["hook_embed"])
        biases = sum((r.output_bias(block) for block in range(attentions)), torch.zeros(1))
        assert_same(rows["bias"], biases.expand_as(rows["embed"]).contiguous())
        assert_same(stack.sum(0), r.stream(layer, mlp_input))

        normed = r.cache.get_full_resid_decomposition(
            layer, mlp_input=mlp_input, expand_neurons=False, apply_ln=True
        )
        assert_same(normed, stack / r.scale(layer, mlp_input))


@pytest.mark.parametrize("variant", WITH_OUTPUT_BIAS)
def test_bias_row_is_not_empty(run: Any, variant: str) -> None:
    """These checkpoints have output biases, so the test above has something to find."""
    r = run(variant)
    stack, labels = r.cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert stack[labels.index("bias")].abs().max() > 0.1


@pytest.mark.parametrize("variant", ["olmoe_bias_odd_width", "deepseek_v2_two_dense"])
def test_full_resid_decomposition_projected(run: Any, variant: str) -> None:
    r = run(variant)
    directions = torch.randn(r.hf.config.hidden_size, 3)
    projected = r.cache.get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, pos_slice=-1, project_output_onto=directions
    )
    whole = (r.stream(r.n_layers) / r.scale(r.n_layers))[:, -1]
    assert_same(projected.sum(0), whole @ directions)


def test_expanding_neurons_of_experts_fails_loudly(run: Any) -> None:
    """An MoE layer has no one row of neurons for all tokens; TransformerLens finds no `hook_post` there."""
    r = run("mixtral")
    with pytest.raises(KeyError, match="hook_post"):
        r.cache.get_full_resid_decomposition(expand_neurons=True)


# --- apply_ln_to_stack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_apply_ln_to_stack(run: Any, variant: str) -> None:
    r = run(variant)
    stack = torch.randn(4, *r.tokens.shape, r.hf.config.hidden_size)
    for layer, mlp_input in r.places():
        normed = r.cache.apply_ln_to_stack(stack, layer, mlp_input=mlp_input)
        assert_same(normed, stack / r.scale(layer, mlp_input))
    assert_same(r.cache.apply_ln_to_stack(stack), stack / r.scale(r.n_layers))

    at_last = r.cache.apply_ln_to_stack(stack[:, :, -1], pos_slice=-1)
    assert_same(at_last, stack[:, :, -1] / r.scale(r.n_layers)[:, -1])
    one_row = r.cache.apply_ln_to_stack(stack, batch_slice=1)
    assert_same(one_row, stack[:, 1] / r.scale(r.n_layers)[1])

    final = r.hf.model.norm
    own_scale = (stack.pow(2).mean(-1, keepdim=True) + final.variance_epsilon).sqrt()
    recomputed = r.cache.apply_ln_to_stack(stack, recompute_ln=True)
    assert_same(recomputed, stack / own_scale * final.weight)


# --- names, and caches without a batch axis -----------------------------------------------------------------

SHORTHANDS = {
    "embed": "hook_embed",
    ("resid_pre", 0): "blocks.0.hook_resid_pre",
    ("resid_mid", 1): "blocks.1.hook_resid_mid",
    ("resid_post", -1): "blocks.2.hook_resid_post",
    ("attn_out", 1): "blocks.1.hook_attn_out",
    ("mlp_out", -1): "blocks.2.hook_mlp_out",
    ("q", 0): "blocks.0.attn.hook_q",
    ("k", 0): "blocks.0.attn.hook_k",
    ("v", -2): "blocks.1.attn.hook_v",
    ("z", 2): "blocks.2.attn.hook_z",
    ("rot_q", 0): "blocks.0.attn.hook_rot_q",
    ("rot_k", 0): "blocks.0.attn.hook_rot_k",
    ("attn_scores", 1): "blocks.1.attn.hook_attn_scores",
    ("pattern", 1): "blocks.1.attn.hook_pattern",
    ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
    ("normalized", 1, "ln2"): "blocks.1.ln2.hook_normalized",
    "scale": "ln_final.hook_scale",
    ("router_logits", 2, "mlp"): "blocks.2.mlp.hook_router_logits",
    ("expert_contrib", 2, "mlp"): "blocks.2.mlp.hook_expert_contrib",
}


@pytest.mark.parametrize("key", SHORTHANDS, ids=str)
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_two_dense"])
def test_shorthands(run: Any, variant: str, key: Any) -> None:
    r = run(variant)
    value, expected = r.cache[key], r.reference[SHORTHANDS[key]]
    finite = expected.isfinite()
    assert torch.equal(value.isfinite(), finite)
    assert_same(value[finite], expected[finite])


def test_shorthands_of_dense_layers(run: Any) -> None:
    r = run("deepseek_v2_two_dense")
    for name in ("pre", "post"):
        assert_same(r.cache[name, 1], r.at(1, f"mlp.hook_{name}"))


def test_stack_activation_and_batch_slice(run: Any) -> None:
    r = run("qwen2_moe")
    queries = r.cache.stack_activation("q")
    assert_same(queries, torch.stack([r.at(layer, "attn.hook_q") for layer in range(r.n_layers)]))
    second = r.cache.apply_slice_to_batch_dim(1)
    assert_same(second["resid_post", -1], r.at(r.n_layers - 1, "hook_resid_post")[1])


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("when", ["in the run", "afterwards"])
def test_without_batch_axis(run: Any, hf: Any, variant: str, when: str) -> None:
    """`remove_batch_dim` in the run or afterwards: every method gives the first row of the batched answer."""
    model, tokens = run(variant).model, prompts()[0][:1]
    reference, logits = reference_cache(hf(variant), tokens), reference_logits(hf(variant), tokens)
    _, cached = model.run_with_cache(tokens, remove_batch_dim=when == "in the run")
    if when == "afterwards":
        cached = cached.remove_batch_dim()
    assert not cached.has_batch_dim
    _, batched = model.run_with_cache(tokens)

    for name, value in cached.items():
        finite = reference[name][0].isfinite()
        assert_same(value[finite], reference[name][0][finite])
    last = len(model.blocks) - 1
    stream, scale = reference[f"blocks.{last}.hook_resid_post"][0], reference["ln_final.hook_scale"][0]
    assert_same(cached.decompose_resid(apply_ln=True).sum(0), stream / scale)
    assert_same(cached.accumulated_resid(apply_ln=True), batched.accumulated_resid(apply_ln=True)[:, 0])
    assert_same(cached.stack_head_results(), batched.stack_head_results()[:, 0])
    full = cached.get_full_resid_decomposition(expand_neurons=False)
    assert_same(full.sum(0), stream)
    attributed = cached.logit_attrs(full, 17, has_batch_dim=False).sum(0)
    assert_same(attributed, logits[0, :, 17])
    assert_same(cached.logit_lens(positions=None).values[-1], logits[0])


def test_remove_batch_dim_needs_one_row(run: Any) -> None:
    r = run("mixtral")
    with pytest.raises(ValueError, match=r"remove_batch_dim needs a batch of one; .* has 2 rows"):
        r.model.run_with_cache(r.tokens, remove_batch_dim=True)

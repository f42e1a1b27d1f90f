"""`routing_cache` of a model in nnsight against HookedMoE's caches, what it refuses, what it sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from moe_lens import HookedMoE
from moe_lens.converters import UnsupportedCheckpoint
from moe_lens.interop.nnsight import jobs, plan, routing_cache, routing_contributions, traffic
from moe_lens.interop.nnsight.model import structure_of
from tests.families import FAMILIES, PLAIN_VARIANTS, prompts
from tests.nnsight_cases import lazy_model, traced_model
from tests.reference import assert_same

Load = Callable[[str], Any]


def at_real_tokens(name: str, value: Tensor, real: Tensor) -> Tensor:
    """Positions first, padded ones left out: what they hold means nothing."""
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        value = value.transpose(1, 2)
    return value[real]


def assert_caches_agree(ours: Any, expected: Any, real: Tensor) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert_same(
            at_real_tokens(name, ours[name], real), at_real_tokens(name, value, real), name, tolerance=1e-5
        )


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_every_point_equals_hooked_moe(traced: Load, model_of: Load, variant: str, padding: str) -> None:
    tokens, mask = prompts(padding)
    model = model_of(variant)
    _, expected = model.run_with_cache(tokens, attention_mask=mask)
    ours = routing_cache(traced(variant), tokens, attention_mask=mask)
    assert_caches_agree(ours, expected, mask.bool())


@pytest.mark.parametrize("variant", [*FAMILIES, "deepseek_v2_groups"])
def test_what_would_be_sent_gives_the_same(traced: Load, variant: str) -> None:
    """`remote="local"` runs the serialized functions, with this package hidden; to the bit."""
    tokens, mask = prompts("left")
    here = routing_cache(traced(variant), tokens, attention_mask=mask)
    sent = routing_cache(traced(variant), tokens, attention_mask=mask, remote="local")
    assert list(here) == list(sent)
    assert all(torch.equal(here[name], sent[name]) for name in here)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16(checkpoint: Callable[[str], Path], hooked: Load, variant: str) -> None:
    """The first block's attention is the same to bfloat16's rounding; dtypes are HookedMoE's at every point."""
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    tokens, _ = prompts()
    _, expected = model.run_with_cache(tokens)
    ours = routing_cache(traced_model(checkpoint(variant), torch.bfloat16), tokens)
    assert set(ours) == set(expected)
    assert all(ours[name].dtype == expected[name].dtype for name in ours)
    before_a_choice = [name for name in ours if name.startswith("blocks.0") and ".mlp." not in name]
    for name in before_a_choice[:-2]:
        assert_same(ours[name].float(), expected[name].float(), name, tolerance=2**-6)


def test_autocast_does_not_reach_what_is_computed(traced: Load) -> None:
    """A server runs under autocast: contributions are products of its weights and outputs in full precision."""
    names = ["blocks.1.mlp.hook_expert_out", "blocks.1.mlp.hook_routing_weights", "blocks.1.ln2.hook_scale"]
    stream, contrib = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_expert_contrib"
    tokens, _ = prompts()
    lm = traced("olmoe")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = routing_cache(lm, tokens, names_filter=[*names, stream, contrib])
        assert torch.is_autocast_enabled("cpu")
    out, weights, scale = (cache[name] for name in names)
    assert torch.equal(cache[contrib], (weights[..., None] * out).to(out.dtype))
    experts = lm._module.model.layers[1].mlp.experts
    assert out.dtype == experts.down_proj.dtype == torch.float32
    assert_same(scale, (cache[stream].float().square().mean(-1, keepdim=True) + 1e-5).sqrt())


def test_expert_outputs_under_autocast(traced: Load) -> None:
    """E_i(x) is not made in bfloat16, whatever the model's own experts are made in."""
    tokens, _ = prompts()
    lm = traced("olmoe")
    layer = lm._module.model.layers[0].mlp
    seen = {}
    handle = layer.experts.register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0], indices=args[1])
    )
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = routing_cache(lm, tokens, names_filter="blocks.0.mlp.hook_expert_out")
    finally:
        handle.remove()
    x, indices = seen["x"], seen["indices"]
    expert = int(indices[0, 0])
    gate, up = (x[0].float() @ layer.experts.gate_up_proj[expert].float().T).chunk(2)
    expected = (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].float().T
    assert_same(cache["blocks.0.mlp.hook_expert_out"][0, 0, 0], expected.detach(), tolerance=1e-6)


def test_lazy_model_and_text(checkpoint: Callable[[str], Path], model_of: Load) -> None:
    """A model of which only the config is here is loaded where it runs here; texts are HookedMoE's tokens."""
    texts = ["The router sends every token", "John gave a drink to Mary, and to"]
    model = model_of("qwen3_moe")
    _, mask = model.tokenize(texts)
    _, expected = model.run_with_cache(texts)
    lm = lazy_model(checkpoint("qwen3_moe"), dtype=torch.float32)
    assert structure_of(lm).embed.weight.is_meta
    ours = routing_cache(lm, texts)
    assert_caches_agree(ours, expected, mask)
    with_bos = routing_cache(lm, texts[0], prepend_bos=True, names_filter="hook_embed")
    assert (
        with_bos["hook_embed"].shape[1]
        == len(model.tokenizer(texts[0], add_special_tokens=False)["input_ids"]) + 1
    )


def test_only_what_is_asked_for_is_read(traced: Load, model_of: Load) -> None:
    """Layers after the last one asked for do not run."""
    lm, (tokens, _) = traced("olmoe"), prompts()
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
        for i, layer in enumerate(lm._module.model.layers)
    ]
    try:
        cache = routing_cache(lm, tokens, names_filter=lambda name: name.endswith("1.mlp.hook_router_logits"))
    finally:
        for handle in handles:
            handle.remove()
    assert list(cache) == ["blocks.1.mlp.hook_router_logits"]
    assert ran == [0]
    _, expected = model_of("olmoe").run_with_cache(tokens)
    assert_same(cache["blocks.1.mlp.hook_router_logits"], expected["blocks.1.mlp.hook_router_logits"])


def test_result_by_name_alone(traced: Load, model_of: Load) -> None:
    name = "blocks.1.attn.hook_result"
    tokens, _ = prompts()
    _, expected = model_of("mixtral").run_with_cache(tokens, names_filter=name)
    assert_same(routing_cache(traced("mixtral"), tokens, names_filter=name)[name], expected[name])


def test_cache_is_an_activation_cache(traced: Load, model_of: Load) -> None:
    """What TransformerLens's caches do without weights works."""
    tokens, _ = prompts()
    _, expected = model_of("olmoe").run_with_cache(tokens)
    ours = routing_cache(traced("olmoe"), tokens)
    assert_same(ours.decompose_resid(layer=2), expected.decompose_resid(layer=2))
    assert ours.model.cfg.n_layers == 3


# ---- plans and traffic ----


@pytest.mark.parametrize("variant", [*FAMILIES, "qwen2_moe_no_bias"])
def test_plan_counts_what_comes_back(traced: Load, variant: str) -> None:
    """Bytes of the values, exactly; with `attn.hook_result` too."""
    lm, (tokens, mask) = traced(variant), prompts("left")
    for names in (None, ["blocks.1.attn.hook_result", "blocks.0.attn.hook_pattern", "ln_final.hook_scale"]):
        cache = routing_cache(lm, tokens, attention_mask=mask, names_filter=names)
        planned = plan(routing_cache, lm, tokens, attention_mask=mask, names_filter=names, remote="local")
        assert planned.bytes_down == sum(value.numel() * value.element_size() for value in cache.values())
        assert (planned.jobs, planned.passes, planned.served) == (1, 1, None)


@pytest.mark.parametrize("variant", [*FAMILIES, "deepseek_v2_groups"])
def test_no_more_than_the_value_is_sent(traced: Load, model_of: Load, variant: str) -> None:
    """A view would be sent with all the memory that it looks into."""
    lm, (tokens, _) = traced(variant), prompts()
    for name in [name for name in model_of(variant).hook_dict if not name.startswith("blocks.0")]:
        value = routing_cache(lm, tokens, names_filter=name)[name]
        assert value.untyped_storage().nbytes() == value.nbytes, name


def test_traffic_is_what_was_planned(traced: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "COMPRESS", False)
    lm, (tokens, _) = traced("olmoe"), prompts()
    planned = plan(routing_cache, lm, tokens, remote="local")
    with traffic() as both:
        with traffic() as counted:
            routing_cache(lm, tokens, remote="local")
        routing_cache(lm, tokens)
    assert counted.jobs == both.jobs == 1
    assert counted.bytes_up == both.bytes_up == planned.bytes_up > 1000
    # A result has a header for each tensor.
    assert planned.bytes_down < counted.bytes_down < 1.5 * planned.bytes_down
    assert "1 job, " in str(counted)


def test_nothing_is_sent_from_this_process(traced: Load) -> None:
    planned = plan(routing_cache, traced("olmoe"), prompts()[0], remote=False)
    assert (planned.bytes_up, planned.bytes_down, planned.host, planned.model_key) == (0, 0, None, None)
    assert planned == plan(routing_cache, traced("olmoe"), prompts()[0], remote=False, verbose=True)
    assert "in this process" in str(planned)


def test_a_plan_takes_what_the_function_takes(traced: Load) -> None:
    lm, (tokens, _) = traced("olmoe"), prompts()
    asked = dict(names_filter="hook_embed", remote="local")
    planned = plan(routing_cache, lm, tokens, verbose=True, **asked)
    assert planned.bytes_down == plan(routing_cache, lm, tokens, **asked).bytes_down
    assert plan(routing_contributions, lm, tokens, verbose=False, remote="local").jobs == 1
    with pytest.raises(TypeError, match=r"routing_cache: .* 'name_filter'"):
        plan(routing_cache, lm, tokens, name_filter="hook_embed")


# ---- refusals ----


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "1 results were asked for, and 0 came back"),
        ([{}, {}], "1 results were asked for, and 2 came back"),
        ([{}], "and nothing came back"),
        ([{"hook_embed": torch.zeros(2, 8, 64)}], r"hook_embed of \(2, 9\) .* and \(2, 8, 64\) came back"),
    ],
)
def test_an_answer_to_something_else(
    traced: Load, monkeypatch: pytest.MonkeyPatch, answer: list[Any], message: str
) -> None:
    monkeypatch.setattr(jobs, "_session", lambda lm, job, backend: answer)
    with pytest.raises(RuntimeError, match=message):
        routing_cache(traced("olmoe"), prompts()[0], names_filter="hook_embed")


def test_refusals(traced: Load, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that names the thing, before the model runs."""
    # Of its own: nnsight's wrapping is permanent.
    fresh = HookedMoE.from_pretrained(checkpoint("olmoe"), device="cpu", verbose=False)
    lm, (tokens, _) = traced("olmoe"), prompts()
    monkeypatch.setattr(
        type(lm._module), "forward", lambda *args, **kwargs: pytest.fail("the model ran before the error")
    )
    with pytest.raises(ValueError, match=r"no hook named 'blocks.9.mlp.hook_router_logits'"):
        routing_cache(lm, tokens, names_filter="blocks.9.mlp.hook_router_logits")
    with pytest.raises(ValueError, match="matches no hook"):
        routing_cache(lm, tokens, names_filter=lambda name: False)
    with pytest.raises(ValueError, match="go beyond the vocabulary"):
        routing_cache(lm, tokens + 1000)
    with pytest.raises(ValueError, match="must have the tokens' shape"):
        routing_cache(lm, tokens, attention_mask=torch.ones(2, 3))
    for wrong in ("Remote", "ftp://somewhere", 1.5):
        with pytest.raises(ValueError, match="must be False, True, 'local' or the URL"):
            routing_cache(lm, tokens, remote=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a plan is made for routing_cache"):
        plan(len, lm, tokens)
    with pytest.raises(TypeError, match="its own methods do the rest"):
        routing_cache(NNsight(fresh), tokens)
    with pytest.raises(TypeError, match="an nnsight TransformersModel is wanted, not Linear"):
        routing_cache(torch.nn.Linear(2, 2), tokens)  # type: ignore[arg-type]


def test_other_models_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    lm = TransformersModel(small, tokenizer=AutoTokenizer.from_pretrained(checkpoint("olmoe")))
    with pytest.raises(UnsupportedCheckpoint, match="no converter for model type 'gpt2'"):
        routing_cache(lm, torch.zeros(1, 3, dtype=torch.long))


def test_changed_experts_are_refused(checkpoint: Callable[[str], Path]) -> None:
    lm = traced_model(checkpoint("olmoe"))
    experts = lm._module.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach()[..., :-1].clone())
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj of .* must be a parameter"):
        routing_cache(lm, prompts()[0])


class WithAdapter(torch.nn.Linear):
    """What an adapter, or a quantised layer, does: its `weight` is not what it multiplies with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("variant", "parent", "name"),
    [
        ("olmoe", "model.layers.1.self_attn", "o_proj"),
        ("olmoe", "", "lm_head"),
        ("qwen2_moe_no_bias", "model.layers.1.mlp", "down_proj"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert", "down_proj"),
        ("deepseek_v2", "model.layers.1.mlp.shared_experts", "down_proj"),
    ],
)
def test_weights_that_are_not_what_is_multiplied_with(
    checkpoint: Callable[[str], Path], variant: str, parent: str, name: str
) -> None:
    lm: Any = traced_model(checkpoint(variant))
    holder = lm._module.get_submodule(parent)
    linear = getattr(holder, name)
    setattr(holder, name, WithAdapter(linear.in_features, linear.out_features, bias=False))
    with pytest.raises(ValueError, match=rf"{name} of .* must be a plain torch.nn.Linear.* is WithAdapter"):
        routing_cache(lm, prompts()[0])


def test_experts_in_another_format_are_refused(checkpoint: Callable[[str], Path]) -> None:
    lm: Any = traced_model(checkpoint("olmoe"))
    experts = lm._module.model.layers[1].mlp.experts
    packed = experts.down_proj.detach().to(torch.float8_e4m3fn)
    experts.down_proj = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"must be a parameter .* in floating point, and is .*float8_e4m3fn"):
        routing_cache(lm, prompts()[0])


def test_layers_elsewhere_are_refused(checkpoint: Callable[[str], Path]) -> None:
    lm: Any = traced_model(checkpoint("olmoe"))
    del lm._module.model.layers[2].mlp
    with pytest.raises(ValueError, match=r"has no model.layers.2 with self_attn and mlp"):
        routing_cache(lm, prompts()[0])


def test_a_model_in_training_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """Its values would be random where it has dropout; one whose weights are not here yet will be loaded for use."""
    lm = traced_model(checkpoint("olmoe"))
    lm._module.train()
    with pytest.raises(ValueError, match=r"is in training mode, .* call \.eval\(\)"):
        routing_cache(lm, prompts()[0])
    lazy = lazy_model(checkpoint("olmoe"))
    assert lazy._module.training
    routing_cache(lazy, prompts()[0], names_filter="hook_embed")
    assert not lazy._module.training


def test_inside_of_a_trace(traced: Load) -> None:
    """An error there, which leaves nothing behind; in a session, which only groups runs, it runs."""
    lm, (tokens, _) = traced("olmoe"), prompts()
    with (
        pytest.raises(RuntimeError, match=r"before or after `with lm\.trace"),
        lm.trace({"input_ids": tokens}),
    ):
        routing_cache(lm, tokens, names_filter="hook_embed")
    found = []
    with lm.session():
        found.append(routing_cache(lm, tokens, names_filter="hook_embed"))
    expected = routing_cache(lm, tokens, names_filter="hook_embed")
    assert torch.equal(found[0]["hook_embed"], expected["hook_embed"])


def test_a_pattern_that_does_not_make_z_raises(checkpoint: Callable[[str], Path]) -> None:
    """A model that attends in another way than its config says: here, its softmax scale was changed."""
    lm = traced_model(checkpoint("olmoe"))
    lm._module.model.layers[1].self_attn.scaling *= 2
    name = "blocks.1.attn.hook_pattern"
    with pytest.raises(RuntimeError, match="does not make the model's z"):
        routing_cache(lm, prompts()[0], names_filter=name)
    routing_cache(lm, prompts()[0], names_filter=name.replace("1", "0"))

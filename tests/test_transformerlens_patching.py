"""`transformer_lens.patching` on `HookedMoE`, against the same patches made by hand in transformers.

The hand-made patch uses transformers' own model, plain torch hooks on its modules, and for what has no module
(the attention pattern; DeepSeek's keys and values, which no single layer makes) its attention function written
out. Clean activations are taken there too, at the same places: moe_lens gives no number to the expected side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, patching

from moe_lens import HookedMoE
from tests.families import VOCABULARY

CASES = (
    "olmoe",
    "olmoe_gqa_clip",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v2_groups",
    "deepseek_v2_two_dense",
    "qwen3_moe_dense_bias",
    "mixtral",
)
LENGTH = 4

# A hand-made patch changes an activation of the corrupted run, given the clean run's.
Change = Callable[[Tensor, Tensor], Tensor]


def metric(logits: Tensor) -> Tensor:
    """A number that every logit of the last position moves: a fixed random combination of them."""
    weights = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5))
    return (logits[:, -1] @ weights).mean()


def at_position(position: int) -> Change:
    def change(value: Tensor, clean: Tensor) -> Tensor:
        value = value.clone()
        value[:, position] = clean[:, position]
        return value

    return change


def of_head(head: int, position: int | slice = slice(None)) -> Change:
    def change(value: Tensor, clean: Tensor) -> Tensor:
        value = value.clone()
        value[:, position, head] = clean[:, position, head]
        return value

    return change


def of_pattern(head: int, query: int | slice = slice(None), key: int | slice = slice(None)) -> Change:
    def change(value: Tensor, clean: Tensor) -> Tensor:
        value = value.clone()
        value[:, head, query, key] = clean[:, head, query, key]
        return value

    return change


@contextmanager
def tapped(model: Any, layer: int, name: str, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show one activation of transformers' model to `visit`, and put what it returns in its place."""
    block = model.model.layers[layer]
    attn = block.self_attn

    def replaced(value: Tensor) -> Tensor:
        new = visit(value)
        return value if new is None else new

    def on_output(module: Any, args: Any, output: Any) -> Any:
        return (replaced(output[0]), *output[1:]) if isinstance(output, tuple) else replaced(output)

    def on_heads(width: int) -> Callable[..., Any]:
        return lambda module, args, output: replaced(output.unflatten(-1, (-1, width))).flatten(-2)

    def on_input(module: Any, args: Any) -> Any:
        return (replaced(args[0]), *args[1:])

    def on_stream(module: Any, args: Any) -> None:
        args[0].copy_(replaced(args[0]))  # the block adds this same tensor to its MLP's output

    def on_mixed_heads(module: Any, args: Any) -> Any:
        heads = args[0].unflatten(-1, (model.config.num_attention_heads, -1))
        return (replaced(heads).flatten(-2),)

    is_latent = model.config.model_type == "deepseek_v2"
    if name == "pattern" or (is_latent and name in ("k", "v")):
        with own_attention(model, layer, name, replaced):
            yield
        return
    if name == "resid_pre":
        handle = block.register_forward_pre_hook(on_input)
    elif name == "resid_mid":
        handle = block.post_attention_layernorm.register_forward_pre_hook(on_stream)
    elif name == "attn_out":
        handle = attn.register_forward_hook(on_output)
    elif name == "mlp_out":
        handle = block.mlp.register_forward_hook(on_output)
    elif name == "z":
        handle = attn.o_proj.register_forward_pre_hook(on_mixed_heads)
    elif is_latent:
        projection = attn.q_proj if attn.q_lora_rank is None else attn.q_b_proj
        handle = projection.register_forward_hook(on_heads(attn.qk_head_dim))
    else:
        handle = getattr(attn, f"{name}_proj").register_forward_hook(on_heads(attn.head_dim))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_attention(model: Any, layer: int, name: str, replaced: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Transformers' attention function written out for one layer, with keys, values or pattern shown."""
    source = importlib.import_module(type(model).__module__)
    eager = source.eager_attention_forward

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        if module.layer_idx != layer:
            return eager(module, query, key, value, mask, scaling=scaling, **rest)
        if (
            name == "k"
        ):  # already rotated: turning by the position's angle is the same for clean and corrupted
            key = replaced(key.transpose(1, 2)).transpose(1, 2)
        if name == "v":
            value = replaced(value.transpose(1, 2)).transpose(1, 2)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(-1, -2) * scaling
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
        if name == "pattern":
            pattern = replaced(pattern)
        return (pattern @ value).transpose(1, 2), pattern

    with patch.object(source, "eager_attention_forward", attention):
        yield


@dataclass
class Pair:
    """A clean and a corrupted batch, the hooked model with the clean cache, and transformers' model."""

    model: HookedMoE
    clean_cache: ActivationCache
    hf: Any
    clean: Tensor
    corrupted: Tensor

    @property
    def n_layers(self) -> int:
        return len(self.hf.model.layers)

    @property
    def n_heads(self) -> int:
        return self.hf.config.num_attention_heads

    @property
    def n_key_value_heads(self) -> int:
        return self.hf.config.num_key_value_heads

    def by_hand(self, layer: int, name: str, change: Change) -> Tensor:
        """The metric of the corrupted run with one activation changed, by transformers."""
        seen: list[Tensor] = []
        with tapped(self.hf, layer, name, lambda value: seen.append(value.clone())):
            self.hf(self.clean, use_cache=False)
        with tapped(self.hf, layer, name, lambda value: change(value, seen[0])):
            logits = self.hf(self.corrupted, use_cache=False).logits
        return metric(logits)

    def check(self, patched: Tensor, cells: list[tuple[tuple[int, ...], str, int, Change]]) -> None:
        """Compare cells of a patching result, each given as (index, activation, layer, change)."""
        unpatched = metric(self.hf(self.corrupted, use_cache=False).logits)
        moved = 0
        for index, name, layer, change in cells:
            expected = self.by_hand(layer, name, change)
            torch.testing.assert_close(patched[index], expected, rtol=5e-5, atol=5e-5)
            moved += int((expected - unpatched).abs() > 1e-3)
        assert moved > len(cells) / 4, "these patches change too little to be told apart"


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path], hf: Callable[[str], Any]) -> Callable[[str], Pair]:
    @cache
    @torch.no_grad()
    def make(variant: str) -> Pair:
        model = HookedMoE.from_pretrained(checkpoint(variant), device="cpu", verbose=False)
        generator = torch.Generator().manual_seed(11)
        clean, corrupted = torch.randint(4, VOCABULARY, (2, 2, LENGTH), generator=generator)
        _, clean_cache = model.run_with_cache(clean)
        assert isinstance(clean_cache, ActivationCache)
        return Pair(model, clean_cache, hf(variant), clean, corrupted)

    return make


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


BLOCKS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
}
HEADS_ALL_POSITIONS = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
}
HEADS_BY_POSITION = {
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
}


def heads_of(p: Pair, name: str) -> int:
    return p.n_key_value_heads if name in ("k", "v") else p.n_heads


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("variant", CASES)
def test_streams_and_outputs(pair: Any, variant: str, name: str) -> None:
    """Every layer and position."""
    p = pair(variant)
    patched = BLOCKS[name](p.model, p.corrupted, p.clean_cache, metric)
    assert patched.shape == (p.n_layers, LENGTH)
    p.check(
        patched,
        [
            ((layer, position), name, layer, at_position(position))
            for layer in range(p.n_layers)
            for position in range(LENGTH)
        ],
    )


@pytest.mark.parametrize("variant", CASES)
def test_block_every(pair: Any, variant: str) -> None:
    p = pair(variant)
    patched = patching.get_act_patch_block_every(p.model, p.corrupted, p.clean_cache, metric)
    assert patched.shape == (3, p.n_layers, LENGTH)
    p.check(
        patched,
        [
            ((kind, layer, position), name, layer, at_position(position))
            for kind, name in enumerate(("resid_pre", "attn_out", "mlp_out"))
            for layer, position in ((0, 1), (p.n_layers - 1, LENGTH - 1))
        ],
    )


@pytest.mark.parametrize("name", HEADS_ALL_POSITIONS)
@pytest.mark.parametrize("variant", CASES)
def test_heads_at_all_positions(pair: Any, variant: str, name: str) -> None:
    """Every layer and head; keys and values have as many as the checkpoint has key-value heads."""
    p = pair(variant)
    patched = HEADS_ALL_POSITIONS[name](p.model, p.corrupted, p.clean_cache, metric)
    assert patched.shape == (p.n_layers, heads_of(p, name))
    p.check(
        patched,
        [
            ((layer, head), name, layer, of_head(head))
            for layer in range(p.n_layers)
            for head in range(heads_of(p, name))
        ],
    )


@pytest.mark.parametrize("name", HEADS_BY_POSITION)
@pytest.mark.parametrize("variant", CASES)
def test_heads_by_position(pair: Any, variant: str, name: str) -> None:
    p = pair(variant)
    patched = HEADS_BY_POSITION[name](p.model, p.corrupted, p.clean_cache, metric)
    n_heads = heads_of(p, name)
    assert patched.shape == (p.n_layers, LENGTH, n_heads)
    p.check(
        patched,
        [
            ((layer, position, head), name, layer, of_head(head, position))
            for layer in range(p.n_layers - 1)
            for position, head in ((LENGTH - 2, 0), (LENGTH - 1, n_heads - 1))
        ],
    )


@pytest.mark.parametrize("variant", CASES)
def test_patterns(pair: Any, variant: str) -> None:
    """Whole heads, single queries, single query-key pairs."""
    p = pair(variant)
    last = LENGTH - 1
    arguments = (p.model, p.corrupted, p.clean_cache, metric)
    whole = patching.get_act_patch_attn_head_pattern_all_pos(*arguments)
    assert whole.shape == (p.n_layers, p.n_heads)
    p.check(
        whole,
        [
            ((layer, head), "pattern", layer, of_pattern(head))
            for layer in (0, 1)
            for head in range(p.n_heads)
        ],
    )
    queries = patching.get_act_patch_attn_head_pattern_by_pos(*arguments)
    assert queries.shape == (p.n_layers, p.n_heads, LENGTH)
    p.check(
        queries,
        [((0, head, last), "pattern", 0, of_pattern(head, last)) for head in range(p.n_heads)],
    )
    pairs = patching.get_act_patch_attn_head_pattern_dest_src_pos(*arguments)
    assert pairs.shape == (p.n_layers, p.n_heads, LENGTH, LENGTH)
    p.check(
        pairs,
        [((1, 2, last, key), "pattern", 1, of_pattern(2, last, key)) for key in range(LENGTH)],
    )


@pytest.mark.parametrize("variant", CASES)
def test_heads_all_positions_every(pair: Any, variant: str) -> None:
    """Five kinds stacked; where there are fewer key-value heads, TransformerLens fills up with zeros."""
    p = pair(variant)
    patched = patching.get_act_patch_attn_head_all_pos_every(p.model, p.corrupted, p.clean_cache, metric)
    assert patched.shape == (5, p.n_layers, p.n_heads)
    for kind, name in enumerate(("z", "q", "k", "v")):
        head = heads_of(p, name) - 1
        p.check(patched, [((kind, layer, head), name, layer, of_head(head)) for layer in range(p.n_layers)])
        assert (patched[kind, :, heads_of(p, name) :] == 0).all()
    p.check(patched, [((4, layer, 1), "pattern", layer, of_pattern(1)) for layer in range(p.n_layers)])


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2", "qwen3_moe_dense_bias"])
def test_heads_by_position_every(pair: Any, variant: str) -> None:
    p = pair(variant)
    patched = patching.get_act_patch_attn_head_by_pos_every(p.model, p.corrupted, p.clean_cache, metric)
    assert patched.shape == (5, p.n_layers, LENGTH, p.n_heads)
    last = LENGTH - 1
    for kind, name in enumerate(("z", "q", "k", "v")):
        p.check(patched, [((kind, layer, last, 0), name, layer, of_head(0, last)) for layer in (0, 1)])
    p.check(patched, [((4, layer, last, 0), "pattern", layer, of_pattern(0, last)) for layer in (0, 1)])


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2"])
def test_per_example_results_and_baseline(pair: Any, variant: str) -> None:
    """`reduce="none"` keeps the rows apart, `baseline=True` adds the unpatched run; each row is by hand's."""
    p = pair(variant)

    def of_rows(logits: Tensor) -> Tensor:
        return logits[:, -1, 17] - logits[:, -1, 23]

    result = patching.get_act_patch_resid_pre(
        p.model, p.corrupted, p.clean_cache, of_rows, reduce="none", baseline=True
    )
    assert result.values.shape == (p.n_layers, LENGTH, 2)
    corrupted = of_rows(p.hf(p.corrupted, use_cache=False).logits)
    torch.testing.assert_close(result.baseline, corrupted, rtol=5e-5, atol=5e-5)
    last = LENGTH - 1
    clean: list[Tensor] = []
    with tapped(p.hf, 1, "resid_pre", lambda value: clean.append(value.clone())):
        p.hf(p.clean, use_cache=False)
    with tapped(p.hf, 1, "resid_pre", lambda value: at_position(last)(value, clean[0])):
        by_hand = of_rows(p.hf(p.corrupted, use_cache=False).logits)
    torch.testing.assert_close(result.values[1, last], by_hand, rtol=5e-5, atol=5e-5)


def test_training_mode_is_refused(pair: Any) -> None:
    p = pair("olmoe")
    p.model.train()
    try:
        with pytest.raises(Exception, match="eval"):
            patching.get_act_patch_resid_pre(p.model, p.corrupted, p.clean_cache, metric)
    finally:
        p.model.eval()

"""`generate` against transformers' greedy search, and against distributions written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.model.attend import Attend, KeyValueCache
from tests.families import EOS, PAD, PLAIN_VARIANTS, VOCABULARY, prompts
from tests.reference import reference_logits


@pytest.fixture(scope="module")
def hooked(checkpoint: Callable[[str], Path]) -> Callable[[str], HookedMoE]:
    return cache(lambda variant: HookedMoE.from_pretrained(checkpoint(variant), device="cpu", verbose=False))


def greedy_in_transformers(model: Any, tokens: Tensor, mask: Tensor, steps: int, end: int | None) -> Tensor:
    """Transformers' greedy search; rows that have ended are filled with the checkpoint's padding token."""
    return model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=PAD,
    )


# --- greedy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_greedy_is_transformers(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """A batch of three, with and without left padding, thirteen tokens further."""
    tokens, mask = prompts(padding, batch=3)
    ours = hooked(variant).generate(tokens, 13, attention_mask=mask, stop_at_eos=False)
    assert torch.equal(ours, greedy_in_transformers(hf(variant), tokens, mask, 13, None))


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2", "qwen3_moe"])
def test_end_of_text_is_transformers(hooked: Any, hf: Any, variant: str) -> None:
    """A row that ends is filled up; when all have ended, generation stops."""
    tokens, mask = prompts("left", batch=3)
    free = hooked(variant).generate(tokens, 12, attention_mask=mask, stop_at_eos=False)
    for row, step in ((0, 3), (2, 0)):  # ends: what some row says at some step
        end = int(free[row, tokens.shape[1] + step])
        ours = hooked(variant).generate(tokens, 12, attention_mask=mask, eos_token_id=end)
        assert torch.equal(ours, greedy_in_transformers(hf(variant), tokens, mask, 12, end))
        assert ours[row, tokens.shape[1] + step] == end
        assert (ours[row, tokens.shape[1] + step + 1 :] == PAD).all()

    first_words = free[:, tokens.shape[1]].tolist()
    stopped = hooked(variant).generate(tokens, 12, attention_mask=mask, eos_token_id=first_words)
    assert stopped.shape[1] == tokens.shape[1] + 1


def test_end_of_text_of_the_checkpoint(hooked: Any) -> None:
    """Without `eos_token_id`, the checkpoint's own; `stop_at_eos=False` goes on past it."""
    model = hooked("olmoe")
    tokens, _ = prompts(batch=2)

    def say_eos(value: Tensor, hook: Any) -> Tensor:
        wanted = model.unembed.weight[EOS] - model.unembed.weight.mean(0)
        return value * 0 + 100 * wanted / wanted.norm() / model.ln_final.w

    with torch.no_grad(), model.hooks(fwd_hooks=[("ln_final.hook_normalized", say_eos)]):
        assert model.generate(tokens, 5).shape[1] == tokens.shape[1] + 1
        assert model.generate(tokens, 5, stop_at_eos=False).shape[1] == tokens.shape[1] + 5


def test_text_in_text_out(hooked: Any, checkpoint: Any, hf: Any) -> None:
    """Texts of different lengths are padded on the left, and come back without padding."""
    model = hooked("qwen2_moe")
    texts = ["When Mary and John", "The router"]
    continued = model.generate(texts, 6, stop_at_eos=False)
    assert isinstance(continued, list)
    for text, whole in zip(texts, continued, strict=True):
        assert whole.startswith(text)
        alone = model.generate(text, 6, stop_at_eos=False)
        assert alone == whole
        tokens = model.to_tokens(text)
        by_transformers = greedy_in_transformers(hf("qwen2_moe"), tokens, torch.ones_like(tokens), 6, None)
        assert whole == model.tokenizer.decode(by_transformers[0], skip_special_tokens=True)


# --- the key-value cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
@torch.no_grad()
def test_cached_steps_give_the_full_forward(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """A prompt in one step, then a chunk, then token by token: the logits of one full run, and of transformers."""
    model = hooked(variant)
    tokens, mask = prompts(padding, length=12)
    real = mask.bool()
    past = KeyValueCache()
    logits = []
    for start, end in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
        attend = Attend(
            model.cfg.rotary, (2, end - start), tokens.device, attention_mask=real[:, start:end], past=past
        )
        residual = model.run_blocks(model.embed(tokens[:, start:end]), attend)
        logits.append(model.unembed(model.ln_final(residual)))
    stepwise = torch.cat(logits, dim=1)
    assert past.length == 12
    full = model(tokens, attention_mask=mask)
    expected = reference_logits(hf(variant), tokens, mask)
    for other in (full, expected):
        assert (stepwise - other)[real].abs().max() / other[real].abs().max() < 2e-5


def test_hooks_act_while_generating(hooked: Any) -> None:
    """A hook sees the prompt once and then one token at a time, and its edits count."""
    model = hooked("olmoe")
    tokens, _ = prompts()
    lengths: list[int] = []

    def silence(value: Tensor, hook: Any) -> Tensor:
        lengths.append(value.shape[1])
        return 0 * value

    plain = model.generate(tokens, 4, stop_at_eos=False)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", silence)]):
        edited = model.generate(tokens, 4, stop_at_eos=False)
    assert lengths == [tokens.shape[1], 1, 1, 1]
    assert not torch.equal(plain, edited)


# --- sampling -----------------------------------------------------------------------------------------------


def test_samples_are_repeatable(hooked: Any) -> None:
    model = hooked("mixtral")
    tokens, _ = prompts(batch=4)
    first, again, other = (
        model.generate(tokens, 16, do_sample=True, seed=seed, stop_at_eos=False) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    state = torch.get_rng_state()
    model.generate(tokens, 2, do_sample=True, seed=3)
    assert torch.equal(state, torch.get_rng_state()), "a seeded sample leaves the global generator alone"
    torch.manual_seed(9)
    unseeded = model.generate(tokens, 16, do_sample=True, stop_at_eos=False)
    torch.manual_seed(9)
    assert torch.equal(unseeded, model.generate(tokens, 16, do_sample=True, stop_at_eos=False))


def truncated_distribution(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """One row of logits as the distribution to sample from, the slow way: token by token, likeliest first."""
    kept = (logits / temperature).softmax(-1)
    order = sorted(range(len(kept)), key=lambda token: -float(kept[token]))
    if top_k is not None:
        for token in order[top_k:]:
            kept[token] = 0
        kept = kept / kept.sum()
    if top_p is not None:
        so_far = 0.0
        for token in order:
            if so_far >= top_p:
                kept[token] = 0
            else:
                so_far += float(kept[token])
        kept = kept / kept.sum()
    return kept


SAMPLING = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=2.0),
    dict(top_k=5),
    dict(top_k=1),
    dict(top_p=0.6),
    dict(top_p=1.0),
    dict(top_p=1e-6),
    dict(temperature=1.5, top_k=12, top_p=0.7),
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@torch.no_grad()
def test_samples_follow_the_truncated_distribution(hooked: Any, hf: Any, options: dict[str, Any]) -> None:
    """20,000 samples after one prompt: none outside the allowed tokens, and chi-square within its noise."""
    n = 20_000
    tokens, _ = prompts(batch=1, length=3)
    logits = reference_logits(hf("olmoe"), tokens)[0, -1] * 1.0
    expected = truncated_distribution(
        logits, options.get("temperature", 1.0), options.get("top_k"), options.get("top_p")
    )
    sampled = hooked("olmoe").generate(
        tokens.expand(n, -1), 1, do_sample=True, seed=0, stop_at_eos=False, **options
    )[:, -1]
    counts = torch.bincount(sampled, minlength=VOCABULARY).double()
    assert (counts[expected == 0] == 0).all()
    allowed = expected > 0
    chi_square = ((counts - n * expected).pow(2) / (n * expected))[allowed].sum()
    freedom = int(allowed.sum()) - 1
    assert chi_square <= freedom + 5 * (2 * max(freedom, 0.0)) ** 0.5 + 1e-6


@torch.no_grad()
def test_every_step_of_a_sample_is_truncated(hooked: Any, hf: Any) -> None:
    """Also after the first token: each sampled token is among the three likeliest at its place."""
    tokens, _ = prompts(batch=8)
    out = hooked("deepseek_v2").generate(
        tokens, 10, do_sample=True, top_k=3, temperature=3.0, seed=1, stop_at_eos=False
    )
    allowed = hf("deepseek_v2")(out, use_cache=False).logits[:, tokens.shape[1] - 1 : -1].topk(3).indices
    sampled = out[:, tokens.shape[1] :]
    assert (allowed == sampled[..., None]).any(-1).all()
    assert not torch.equal(sampled, allowed[..., 0])


# --- edges and errors ---------------------------------------------------------------------------------------


def test_no_new_tokens(hooked: Any) -> None:
    tokens, _ = prompts()
    assert torch.equal(hooked("olmoe").generate(tokens, 0), tokens)


def test_generation_keeps_no_graph(hooked: Any) -> None:
    tokens, _ = prompts()
    assert not hooked("olmoe").generate(tokens, 1).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens must not be negative, got -1"),
        (dict(temperature=0.5), "only act when do_sample=True"),
        (dict(top_k=3), "only act when do_sample=True"),
        (dict(top_p=0.3), "only act when do_sample=True"),
        (dict(do_sample=True, temperature=0.0), "temperature must be positive, got 0.0"),
        (dict(do_sample=True, top_k=0), "top_k must lie in 1..128, got 0"),
        (dict(do_sample=True, top_k=129), "top_k must lie in 1..128, got 129"),
        (dict(do_sample=True, top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (dict(do_sample=True, top_p=1.5), r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(hooked: Any, options: dict[str, Any], message: str) -> None:
    tokens, _ = prompts()
    with pytest.raises(ValueError, match=message):
        hooked("olmoe").generate(tokens, **options)


def test_right_padding_is_refused(hooked: Any) -> None:
    tokens, mask = prompts("right")
    with pytest.raises(ValueError, match="pad on the left"):
        hooked("olmoe").generate(tokens, attention_mask=mask)

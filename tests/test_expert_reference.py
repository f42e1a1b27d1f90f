"""What experts write over a corpus: means and samples, against lists of outputs gone through one by one."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe_lens.corpus import Document, bos_by_default, token_batches
from moe_lens.interventions.expert_reference import (
    ExpertReference,
    expert_reference,
    prefix_hashes,
)
from moe_lens.interventions.token_hashes import hash_of
from moe_lens.routing.provenance import weights_fingerprint
from tests.conftest import leftover_hooks
from tests.families import BOS, PAD, prompts
from tests.reference import reference_cache
from tests.routing_cases import Batch, corpus

Load = Callable[[str], Any]

# One of each family, and dense layers among others, group-limited routing, odd widths.
VARIANTS = (
    "olmoe",
    "olmoe_bias_odd_width",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "qwen3_moe",
    "mixtral",
)
ARRAYS = ("count", "mean", "samples", "sample_prefix", "n_samples")


# ---- the slow, obvious implementation ----


def mixed(number: int) -> int:
    """SplitMix64 as its authors print it, in Python's integers."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)


def hashed(*parts: int) -> int:
    state = 0
    for part in parts:
        state = mixed(state ^ (part % 2**64))
    return state >> 1


def hashed_prefix(prefix: Sequence[int]) -> int:
    total = mixed(sum(mixed(token + (place << 32)) for place, token in enumerate(prefix, start=1)) % 2**64)
    return total - 2**64 if total >= 2**63 else total


class Output(NamedTuple):
    """An expert's output at a token: the number of its document, its prefix, and the vector."""

    document: int
    prefix: tuple[int, ...]
    value: Tensor


def every_output(
    cache_of: Callable[[Tensor, Tensor], dict[str, Tensor]], batches: Sequence[Batch], layer: int, expert: int
) -> list[Output]:
    """Of an expert (-1: the shared ones) at all real tokens where it is active, one by one."""
    outputs, document = [], 0
    at = f"blocks.{layer}.mlp."
    for tokens, mask in batches:
        cache = cache_of(tokens, mask)
        for row in range(len(tokens)):
            prefix: tuple[int, ...] = ()
            for pos in range(tokens.shape[1]):
                if not mask[row, pos]:
                    continue
                prefix += (int(tokens[row, pos]),)
                if expert == -1:
                    outputs.append(Output(document, prefix, cache[at + "hook_shared_out"][row, pos]))
                    continue
                for slot, chosen in enumerate(cache[at + "hook_expert_indices"][row, pos].tolist()):
                    if chosen == expert:
                        outputs.append(
                            Output(document, prefix, cache[at + "hook_expert_out"][row, pos, slot])
                        )
            document += 1
    return outputs


def sampled(outputs: Sequence[Output], n: int, seed: int, layer: int, expert: int) -> list[Output]:
    """The smallest keys, one of each prefix."""
    by_key = sorted(
        outputs, key=lambda o: hashed(1, seed, layer, expert, hashed_prefix(o.prefix), o.document)
    )
    kept: list[Output] = []
    for output in by_key:
        if len(kept) < n and all(output.prefix != other.prefix for other in kept):
            kept.append(output)
    return kept


def rows_of(reference: ExpertReference) -> list[int]:
    """Every expert of a layer in the order of the arrays' rows."""
    return [*range(reference.n_experts), *([-1] if reference.has_shared else [])]


def check(
    reference: ExpertReference,
    cache_of: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Sequence[Batch],
    *,
    n: int,
    seed: int = 0,
    tolerance: float,
) -> None:
    """Everything in a reference, against the lists."""
    n_checked = 0
    for layer in reference.layers:
        experts = rows_of(reference)
        assert [len(getattr(reference, name)[layer]) for name in ARRAYS] == [len(experts)] * len(ARRAYS)
        for row, expert in enumerate(experts):
            outputs = every_output(cache_of, batches, layer, expert)
            kept = sampled(outputs, n, seed, layer, expert)
            assert reference.count[layer][row] == len(outputs)
            assert reference.n_samples[layer][row] == len(kept)
            prefixes = [hashed_prefix(output.prefix) for output in kept]
            assert reference.sample_prefix[layer][row].tolist() == prefixes + [0] * (n - len(kept))
            assert bool(reference.samples[layer][row, len(kept) :].isnan().all())
            if not outputs:
                assert bool(reference.mean[layer][row].isnan().all())
                continue
            mean = np.mean([output.value.double().numpy() for output in outputs], axis=0)
            near = dict(rtol=tolerance, atol=tolerance * float(np.abs(mean).max() + 1e-30))
            np.testing.assert_allclose(reference.mean[layer][row].numpy(), mean, **near)
            values = torch.stack([output.value for output in kept])
            got = reference.samples[layer][row, : len(kept)]
            assert got.dtype == values.dtype
            torch.testing.assert_close(
                got, values, rtol=tolerance, atol=tolerance * float(values.abs().max())
            )
            n_checked += 1
    assert n_checked > len(reference.layers) * reference.n_experts / 2


def same_arrays(one: ExpertReference, other: ExpertReference) -> bool:
    return all(
        torch.equal(getattr(one, name)[layer].nan_to_num(7), getattr(other, name)[layer].nan_to_num(7))
        for name in ARRAYS
        for layer in one.layers
    )


def as_batches(documents: Sequence[Tensor], size: int, padding: str) -> list[Batch]:
    """Documents of unlike lengths in batches, padded on a side."""
    batches = []
    for start in range(0, len(documents), size):
        some = documents[start : start + size]
        tokens = torch.full((len(some), max(map(len, some))), PAD)
        mask = torch.zeros_like(tokens)
        for row, document in enumerate(some):
            at = slice(0, len(document)) if padding == "right" else slice(-len(document), None)
            tokens[row, at], mask[row, at] = document, 1
        batches.append((tokens, mask))
    return batches


def some_documents(n: int = 7) -> list[Tensor]:
    """Documents that all begin with BOS; the last begins as the first does, and goes on otherwise."""
    generator = torch.Generator().manual_seed(3)
    documents = [
        torch.cat((torch.tensor([BOS]), torch.randint(4, 128, (4 + 3 * (i % 4),), generator=generator)))
        for i in range(n - 1)
    ]
    return [*documents, torch.cat((documents[0][:4], torch.tensor([9, 9, 10])))]


# ---- hashes ----


def test_hashes_are_splitmix64() -> None:
    # The first outputs of the published generator with seed 0.
    assert mixed(0) == 0xE220A8397B1DCDAF
    assert mixed(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    values = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678])
    for seed in (0, -3, 2**63, 2**64 + 5, 2**70):
        got = hash_of(2, seed, values, values.flip(0))
        expected = [
            hashed(2, seed, a, b) for a, b in zip(values.tolist(), values.flip(0).tolist(), strict=True)
        ]
        assert got.tolist() == expected
    assert hash_of(torch.arange(100000)).unique().numel() == 100000


def test_a_prefix_has_one_hash_whatever_the_padding() -> None:
    documents = some_documents()
    for size in (1, 3, 7):
        for padding in ("left", "right"):
            n = 0
            for tokens, mask in as_batches(documents, size, padding):
                got = prefix_hashes(tokens, mask.bool())
                assert got.dtype == torch.long
                assert torch.equal(got[mask.bool()], prefix_hashes(tokens.int(), mask)[mask.bool()])
                for row, real in zip(got, mask.bool(), strict=True):
                    document = documents[n].tolist()
                    assert row[real].tolist() == [
                        hashed_prefix(document[: i + 1]) for i in range(len(document))
                    ]
                    n += 1


def test_other_prefixes_have_other_hashes() -> None:
    tokens = torch.cartesian_prod(*[torch.arange(8)] * 5)
    hashes = prefix_hashes(tokens, torch.ones_like(tokens, dtype=torch.bool))
    # 8 prefixes of one token, 64 of two, ...
    assert [hashes[:, i].unique().numel() for i in range(5)] == [8, 64, 512, 4096, 32768]
    assert hashes.unique().numel() == 8 + 64 + 512 + 4096 + 32768
    with pytest.raises(ValueError, match=r"tokens \(2, 3\) and real \(2, 4\)"):
        prefix_hashes(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))


# ---- gathering ----


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_transformers_one_output_at_a_time(
    hf: Load, model_of: Load, variant: str, padding: str
) -> None:
    batches = corpus(padding, bos_in_first=True)
    caches = {id(tokens): reference_cache(hf(variant), tokens, mask) for tokens, mask in batches}
    model = model_of(variant)
    reference = expert_reference(model, batches, n_samples=4, seed=5)
    assert reference.layers == model.cfg.moe_layers
    assert reference.has_shared == (model.cfg.shared is not None)
    check(reference, lambda tokens, _: caches[id(tokens)], batches, n=4, seed=5, tolerance=3e-5)
    assert {int(n) for counts in reference.n_samples.values() for n in counts} & {4}


def plain_hooks(model: Any) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A run that keeps what torch's own hooks see."""

    def cache_of(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        cache: dict[str, Tensor] = {}
        handles = [
            point.register_forward_hook(
                lambda module, args, out, name=name: cache.__setitem__(name, out.clone())
            )
            for name, point in model.hook_dict.items()
            if name.endswith(("hook_expert_indices", "hook_expert_out", "hook_shared_out"))
        ]
        with torch.no_grad():
            model(tokens, attention_mask=mask)
        for handle in handles:
            handle.remove()
        return cache

    return cache_of


@pytest.mark.parametrize("variant", ["olmoe_bf16", "deepseek_v2_bf16_sharded"])
def test_bfloat16_samples_are_the_outputs_themselves(checkpoint: Load, variant: str) -> None:
    from moe_lens import HookedMoE

    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    batches = corpus("right")
    reference = expert_reference(model, batches, n_samples=3)
    assert reference.samples[2].dtype == torch.bfloat16
    assert reference.mean[2].dtype == torch.float32
    # Nothing is rounded but the float32 mean, once.
    check(reference, plain_hooks(model), batches, n=3, tolerance=2e-7)
    assert reference.provenance["dtype"] == "bfloat16"
    place = reference.count[2][:8].argmax()[None]
    drawn = reference.resampled_output(2, place, torch.tensor([0]), seed=0)
    assert drawn.dtype == torch.float32
    assert any(torch.equal(drawn[0], sample.float()) for sample in reference.samples[2][place[0]])


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2_groups"])
def test_batches_and_padding_change_nothing(model_of: Load, variant: str) -> None:
    model, documents = model_of(variant), some_documents()
    first = expert_reference(model, as_batches(documents, 1, "right"), n_samples=5)
    for size in (2, 3, 7):
        for padding in ("left", "right"):
            other = expert_reference(model, as_batches(documents, size, padding), n_samples=5)
            assert other.provenance == first.provenance
            for layer in first.layers:
                assert torch.equal(other.sample_prefix[layer], first.sample_prefix[layer])
                assert torch.equal(other.n_samples[layer], first.n_samples[layer])
                assert torch.equal(other.count[layer], first.count[layer])
                for name, tolerance in (("mean", 1e-6), ("samples", 1e-5)):
                    one, two = getattr(other, name)[layer], getattr(first, name)[layer]
                    scale = float(two.nan_to_num().abs().max())
                    torch.testing.assert_close(one, two, rtol=0, atol=tolerance * scale, equal_nan=True)


def test_a_mean_of_many_tokens_is_as_exact_as_of_few(model_of: Load) -> None:
    """A sum of a few thousand 0.1s in float32 would not be that many times 0.1."""
    model, (tokens, _) = model_of("mixtral"), prompts(batch=64, length=100)
    constant = ("blocks.0.mlp.hook_expert_out", lambda value, hook: torch.full_like(value, 0.1))
    with model.hooks([constant]):
        reference = expert_reference(model, tokens, layers=[0], n_samples=1)
    assert int(reference.count[0].max()) > 1000
    mean = reference.mean[0][reference.count[0] > 0]
    assert torch.equal(mean, torch.full_like(mean, 0.1))


def test_no_prefix_comes_twice(model_of: Load) -> None:
    """The same documents again: twice the tokens, the same mean, and no output a second time."""
    model, documents = model_of("qwen2_moe"), some_documents()
    once = expert_reference(model, as_batches(documents, 3, "right"), n_samples=200)
    twice = expert_reference(model, as_batches([*documents, *documents], 3, "left"), n_samples=200)
    for layer in once.layers:
        assert torch.equal(twice.count[layer], 2 * once.count[layer])
        torch.testing.assert_close(twice.mean[layer], once.mean[layer], rtol=1e-5, atol=1e-6)
        assert torch.equal(twice.n_samples[layer], once.n_samples[layer])
        for row, n in enumerate(once.n_samples[layer].tolist()):
            prefixes = once.sample_prefix[layer][row, :n].tolist()
            assert len(set(prefixes)) == n
            assert set(twice.sample_prefix[layer][row, :n].tolist()) == set(prefixes)
        # All begin with BOS, and the last as the first: fewer prefixes than tokens.
        assert once.n_samples[layer][-1] == sum(map(len, documents)) - (len(documents) - 1) - 3


def test_a_smaller_sample_is_the_beginning_of_a_larger(model_of: Load) -> None:
    model, batches = model_of("olmoe"), as_batches(some_documents(), 2, "right")
    large = expert_reference(model, batches, n_samples=9)
    for n in (1, 4):
        small = expert_reference(model, batches, n_samples=n)
        assert torch.equal(small.samples[1].nan_to_num(7), large.samples[1][:, :n].nan_to_num(7))
        assert torch.equal(small.sample_prefix[1], large.sample_prefix[1][:, :n])
        assert torch.equal(small.mean[1], large.mean[1])


def test_samples_are_uniform_over_tokens(model_of: Load) -> None:
    """Of 150 seeds, each token is in about as many samples as every other; other seeds, layers and experts differ."""
    model, (tokens, _) = model_of("deepseek_v2"), prompts(batch=2, length=10)
    times: Counter[int] = Counter()
    samples = set()
    for seed in range(150):
        reference = expert_reference(model, tokens, layers=[1], n_samples=5, seed=seed)
        drawn = reference.sample_prefix[1][-1].tolist()
        times.update(drawn)
        samples.add(tuple(sorted(drawn)))
    assert len(times) == 20
    # 150 draws of 5 from 20 without replacement: 37.5 expected, with variance 150 * 1/4 * 3/4.
    chi_squared = sum((n - 37.5) ** 2 for n in times.values()) / (150 * 0.25 * 0.75) * 19 / 20
    assert 5 < chi_squared < 45
    assert len(samples) > 140
    both = expert_reference(model, tokens, n_samples=5)
    assert set(both.sample_prefix[1][-1].tolist()) != set(both.sample_prefix[2][-1].tolist())


def test_a_frequent_prefix_is_as_likely_as_its_tokens(model_of: Load) -> None:
    """30 documents of BOS alone among 40 tokens: three of four samples begin with it, and not one of eleven."""
    model = model_of("deepseek_v2")
    tokens = torch.cat((torch.full((30, 1), BOS), torch.arange(10, 20)[:, None]))
    bos = int(prefix_hashes(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, 0])
    n_first = sum(
        int(expert_reference(model, tokens, layers=[1], n_samples=1, seed=seed).sample_prefix[1][-1, 0])
        == bos
        for seed in range(40)
    )
    assert 20 < n_first < 40


def test_layers_and_what_is_run(model_of: Load) -> None:
    model, (tokens, mask) = model_of("deepseek_v2"), prompts("left")
    whole = expert_reference(model, tokens, attention_mask=mask)
    ran: list[str] = []
    with model.hooks([(lambda name: name.endswith("hook_mlp_out"), lambda v, hook: ran.append(hook.name))]):
        one = expert_reference(model, tokens, attention_mask=mask.bool(), layers=[1])
    assert ran == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert one.layers == (1,)
    assert list(one.mean) == [1]
    assert torch.equal(one.samples[1].nan_to_num(7), whole.samples[1].nan_to_num(7))
    assert not one.mean[1].requires_grad
    assert expert_reference(model, tokens, layers=[2, 1]).layers == (1, 2)
    assert expert_reference(model, tokens, layers=2).layers == (2,)
    with pytest.raises(ValueError, match="layer 2 was not gathered; the reference is of layers 1"):
        one.mean_output(2, torch.tensor([0]))
    with torch.inference_mode():
        assert same_arrays(expert_reference(model, tokens, attention_mask=mask), whole)


def test_provenance_and_inputs(model_of: Load) -> None:
    model = model_of("qwen3_moe")
    texts = ["When Mary and John went", "the store", "Each expert writes what it knows"]
    batches = token_batches(
        model,
        [Document(f"d{i}", "", text) for i, text in enumerate(texts)],
        batch_size=2,
        prepend_bos=bos_by_default(model),
    )
    reference = expert_reference(model, batches, n_samples=2, seed=4)
    from_texts = expert_reference(model, texts, n_samples=2, seed=4)
    for layer in reference.layers:
        assert torch.equal(reference.sample_prefix[layer], from_texts.sample_prefix[layer])
    assert reference.provenance == {
        "model": model.cfg.model_name,
        "revision": None,
        "dtype": "float32",
        "weights": weights_fingerprint(model),
        "edited": [],
        "corpus": batches.description,
        "fingerprint": batches.fingerprint,
        "n_documents": 3,
        "n_tokens": batches.n_tokens,
        "seed": 4,
        "moe_lens": reference.provenance["moe_lens"],
    }
    edit = ("blocks.0.hook_attn_out", lambda value, hook: 0 * value)
    with model.hooks([edit]):
        edited = expert_reference(model, batches)
    assert edited.provenance["edited"] == ["blocks.0.hook_attn_out"]
    assert not torch.equal(edited.mean[0].nan_to_num(), reference.mean[0].nan_to_num())


def test_forced_experts_are_gathered_as_they_ran(model_of: Load) -> None:
    """One slot instead of four, always the same expert."""
    model, (tokens, _) = model_of("qwen3_moe"), prompts()
    forced = ("blocks.1.mlp.hook_expert_indices", lambda value, hook: torch.full_like(value[..., :1], 6))
    with model.hooks([forced]):
        reference = expert_reference(model, tokens, layers=[1])
    assert reference.count[1].tolist() == [0, 0, 0, 0, 0, 0, tokens.numel(), 0]


# ---- what is wrong ----


def test_what_is_not_finite_is_named(model_of: Load) -> None:
    model, (tokens, mask) = model_of("qwen2_moe"), prompts("left")
    assert mask[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1]

    def spoil(name: str, pos: int, number: float) -> list[tuple[str, Any]]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[0, pos].flatten()[3] = number
            return value

        return [(f"blocks.1.mlp.{name}", hook)]

    for name, number in (("hook_expert_out", float("inf")), ("hook_shared_out", float("nan"))):
        with (
            model.hooks(spoil(name, 4, number)),
            pytest.raises(ValueError, match=rf"blocks.1.mlp.{name} .*not finite, at row 0, position 4"),
        ):
            expert_reference(model, tokens, attention_mask=mask, layers=[1])
        with model.hooks(spoil(name, 0, number)):  # padding
            reference = expert_reference(model, tokens, attention_mask=mask, layers=[1])
        plain = expert_reference(model, tokens, attention_mask=mask, layers=[1])
        assert same_arrays(reference, plain)


def test_bad_input_raises_before_the_model_runs(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, mask) = model_of("deepseek_v2"), prompts("right")
    ran = []
    monkeypatch.setattr(model.embed, "forward", lambda *args: ran.append(args))

    def bad(message: str, given: Any = tokens, error: type[Exception] = ValueError, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            expert_reference(model, given, **settings)
        assert not ran

    bad("there were no batches", [])
    bad("there were no batches", iter([]))
    bad("layer 0 is no MoE layer; .* has MoE layers 1, 2", layers=[1, 0])
    bad("layer 3 is no MoE layer", layers=[3])
    bad("layer -1 is no MoE layer", layers=[-1])
    bad("layer True is no MoE layer", layers=[True])
    bad("layer '1' is no MoE layer", layers="1")
    bad("there is no MoE layer to gather", layers=[])
    bad("n_samples=0 must be positive", n_samples=0)
    bad("n_samples=-2 must be positive", n_samples=-2)
    bad("n_samples=1.5 must be a positive integer", n_samples=1.5, error=TypeError)
    bad("float", seed=0.5, error=TypeError)
    bad("batch_size=0 must be positive", batch_size=0)
    bad("texts, tokens or batches of tokens are wanted, not int", 3)
    bad("attention_mask goes with tokens given as one tensor", [tokens], attention_mask=mask)
    bad("tokens and their mask are one batch", (tokens, mask))
    bad(r"the mask \(2, 8\) must have the tokens' shape \(2, 9\)", attention_mask=mask[:, 1:])
    bad(r"\(2, 8\) must have the tokens' shape \(2, 9\)", [(tokens, mask[:, 1:])])
    bad("attention_mask must be a tensor", [(tokens, mask.tolist())])
    bad("one document a row", [tokens[0]])
    bad("tokens must be integers", [tokens.float()])
    bad("go beyond the vocabulary", [tokens + 100])
    bad("row 1 of attention_mask has no real token", [(tokens, torch.tensor([[1], [0]]).expand_as(tokens))])
    assert leftover_hooks(model) == []


# ---- reading ----


def made_up(*, has_shared: bool = False, n: int = 4) -> ExpertReference:
    """Layer 3, three experts: of E0 four samples, of E1 one, of E2 none; the shared ones two."""
    rows = 4 if has_shared else 3
    held = torch.tensor([4, 1, 0, 2][:rows])
    in_use = torch.arange(n) < held[:, None]
    samples = torch.arange(rows * n, dtype=torch.float32).reshape(rows, n, 1).expand(rows, n, 2).clone()
    samples[~in_use] = torch.nan
    prefixes = torch.arange(rows * n).reshape(rows, n) + 1000
    return ExpertReference(
        layers=(3,),
        n_experts=3,
        has_shared=has_shared,
        count={3: held * 10},
        mean={3: torch.arange(rows * 2, dtype=torch.float32).reshape(rows, 2)},
        samples={3: samples},
        sample_prefix={3: prefixes * in_use},
        n_samples={3: held},
        provenance={"model": "made up"},
    )


def test_mean_output() -> None:
    reference = made_up(has_shared=True)
    experts = torch.tensor([[0, 1], [-1, 0]])
    expected = torch.tensor([[[0, 1], [2, 3]], [[6, 7], [0, 1.0]]])
    assert torch.equal(reference.mean_output(3, experts), expected)
    assert torch.equal(reference.mean_output(3, experts.int()), expected)
    assert torch.equal(reference.mean_output(3, torch.tensor(1)), torch.tensor([2, 3.0]))
    assert reference.mean_output(3, torch.zeros(0, dtype=torch.long)).shape == (0, 2)


@pytest.mark.parametrize("read", ["mean_output", "resampled_output"])
def test_reading_names_what_is_not_there(read: str) -> None:
    def bad(message: str, reference: ExpertReference, layer: int, experts: Tensor) -> None:
        rest = () if read == "mean_output" else (torch.zeros(experts.shape, dtype=torch.long), 0)
        with pytest.raises(ValueError, match=message):
            getattr(reference, read)(layer, experts, *rest)

    plain, shared = made_up(), made_up(has_shared=True)
    bad("M3E2 was never active in the reference", plain, 3, torch.tensor([0, 1, 2]))
    bad("M3E2 was never active in the reference", shared, 3, torch.tensor([[0], [2]]))
    bad(r"no expert 3 at layer 3: it has experts 0..2 and no shared ones", plain, 3, torch.tensor([0, 3]))
    bad(r"no expert -1 at layer 3: it has experts 0..2 and no shared ones", plain, 3, torch.tensor([-1]))
    bad(r"no expert 3 .* and the shared experts, -1", shared, 3, torch.tensor([3]))
    bad(r"no expert -2 .* and the shared experts, -1", shared, 3, torch.tensor([-2]))
    bad("layer 0 was not gathered; the reference is of layers 3", plain, 0, torch.tensor([0]))
    bad("experts are integers, not torch.float32", plain, 3, torch.tensor([0.0]))
    bad("experts are integers, not torch.bool", plain, 3, torch.tensor([True]))
    unused = replace(shared, count={3: torch.tensor([1, 1, 1, 0])})
    bad("M3S was never active", unused, 3, torch.tensor([-1]))


def test_resampling_leaves_out_the_token_s_own_output() -> None:
    reference = made_up(has_shared=True)
    for own in range(4):
        places = torch.zeros(300, dtype=torch.long)
        prefixes = torch.full((300,), 1000 + own)
        drawn = {
            tuple(reference.resampled_output(3, places[:1], prefixes[:1], seed)[0].tolist())
            for seed in range(60)
        }
        assert drawn == {(float(i), float(i)) for i in range(4) if i != own}
    # Of other prefixes all four; the third row's prefixes are 0 and unused, and 0 is a prefix like any other.
    others = torch.arange(-2000, 2000)
    others = others[(others < 1000) | (others > 1016)]
    values = reference.resampled_output(3, torch.zeros_like(others), others, 0)[:, 0]
    times = torch.bincount(values.long(), minlength=4)
    assert len(times) == 4
    expected = len(others) / 4
    assert float((times - expected).square().sum() / expected) < 16.3
    one = reference.resampled_output(3, torch.tensor([-1, -1]), torch.tensor([1012, 1013]), 0)
    assert one.tolist() == [[13, 13], [12, 12]]
    assert reference.resampled_output(3, torch.tensor([1]), torch.tensor([0]), 0).tolist() == [[4, 4]]


def test_a_sample_left_out_leaves_the_others_alike() -> None:
    reference = made_up()
    values = [
        float(reference.resampled_output(3, torch.tensor([0]), torch.tensor([1001]), seed)[0, 0])
        for seed in range(900)
    ]
    times = Counter(values)
    assert set(times) == {0.0, 2.0, 3.0}
    assert sum((n - 300) ** 2 / 300 for n in times.values()) < 13.8


def test_resampling_names_the_expert_that_has_nothing_else() -> None:
    reference = made_up(has_shared=True)
    with pytest.raises(ValueError, match="M3E1 has no output in the reference at another prefix"):
        reference.resampled_output(3, torch.tensor([0, 1, -1]), torch.tensor([1000, 1004, 1012]), 0)
    single = replace(reference, n_samples={3: torch.tensor([4, 1, 0, 1])})
    with pytest.raises(ValueError, match="M3S has no output in the reference at another prefix"):
        single.resampled_output(3, torch.tensor([-1]), torch.tensor([1012]), 0)
    with pytest.raises(ValueError, match=r"a prefix for every expert: \(2,\) for \(2, 1\)"):
        reference.resampled_output(3, torch.zeros(2, 1).long(), torch.zeros(2).long(), 0)


def test_a_draw_depends_on_the_place_alone(model_of: Load) -> None:
    model, (tokens, mask) = model_of("qwen2_moe"), prompts("left")
    reference = expert_reference(model, as_batches(some_documents(), 3, "right"))
    prefixes = prefix_hashes(tokens, mask)
    active = (reference.count[1][:-1] > 1).nonzero()[:, 0]
    experts = active[torch.arange(tokens.numel()).reshape(tokens.shape) % len(active)]
    whole = reference.resampled_output(1, experts, prefixes, 7)
    assert torch.equal(whole, reference.resampled_output(1, experts, prefixes, 7))
    assert whole.shape == (*tokens.shape, model.cfg.d_model)
    for batch, pos in ((0, 3), (1, 8)):
        alone = reference.resampled_output(1, experts[batch, pos], prefixes[batch, pos], 7)
        assert torch.equal(alone, whole[batch, pos])
    assert not torch.equal(whole, reference.resampled_output(1, experts, prefixes, 8))
    # Of the shared experts in two layers with the same samples, other ones are drawn.
    twice = {name: dict.fromkeys((0, 1), getattr(reference, name)[1]) for name in ARRAYS}
    same = replace(reference, layers=(0, 1), **twice)
    shared = torch.full_like(prefixes, -1)
    assert not torch.equal(
        same.resampled_output(0, shared, prefixes, 7), same.resampled_output(1, shared, prefixes, 7)
    )


def test_no_token_of_the_corpus_gets_its_own_output(model_of: Load) -> None:
    """Every token of the reference's own corpus, with every expert active at it."""
    model, (tokens, mask) = model_of("mixtral"), prompts("right", batch=4, length=12)
    reference = expert_reference(model, tokens, attention_mask=mask, n_samples=6)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    real = mask.bool()
    for layer in reference.layers:
        chosen = cache[f"blocks.{layer}.mlp.hook_expert_indices"][real]
        outputs = cache[f"blocks.{layer}.mlp.hook_expert_out"][real]
        prefixes = prefix_hashes(tokens, real)[real][:, None].expand_as(chosen)
        assert any(p in reference.sample_prefix[layer] for p in prefixes.flatten())
        enough = reference.n_samples[layer][chosen] > 1
        for seed in range(3):
            drawn = reference.resampled_output(layer, chosen[enough], prefixes[enough], seed)
            apart = (drawn - outputs[enough]).norm(dim=-1) / outputs[enough].norm(dim=-1)
            assert float(apart.min()) > 1e-2


# ---- files ----


def test_a_file_holds_it_all(model_of: Load, tmp_path: Path) -> None:
    model = model_of("deepseek_v2")
    reference = expert_reference(model, corpus(), n_samples=3, seed=11)
    path = reference.save(tmp_path / "experts.safetensors")
    again = ExpertReference.load(path)
    assert same_arrays(again, reference)
    assert again.layers == reference.layers
    assert (again.n_experts, again.has_shared) == (8, True)
    assert again.provenance == reference.provenance
    assert again.fingerprint == reference.fingerprint == reference.to("cpu").fingerprint
    assert again.samples[1].dtype == reference.samples[1].dtype
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["format"] == "moe_lens expert reference 1"


def test_fingerprints_tell_contents_apart(model_of: Load) -> None:
    reference = made_up()
    fingerprint = reference.fingerprint
    assert len(fingerprint) == 64
    assert replace(reference, provenance={}).fingerprint == fingerprint
    for name in ARRAYS:
        changed = copy.deepcopy(getattr(reference, name))
        changed[3].view(-1)[0] += 1
        assert replace(reference, **{name: changed}).fingerprint != fingerprint
    model, (tokens, _) = model_of("olmoe"), prompts()
    one, other = (expert_reference(model, tokens, n_samples=2, seed=seed) for seed in (0, 1))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == expert_reference(model, tokens, n_samples=2).fingerprint


def test_what_is_no_such_file(tmp_path: Path) -> None:
    from moe_lens.routing.storage import write_atomically

    with pytest.raises(FileNotFoundError, match="there is no file"):
        ExpertReference.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no folder"):
        made_up().save(tmp_path / "nowhere" / "file")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text is no file of an expert reference"):
        ExpertReference.load(tmp_path / "text")
    write_atomically(tmp_path / "other", {"a": torch.ones(1)}, {"format": "contributions"})
    with pytest.raises(ValueError, match="other is no file of an expert reference: 'contributions'"):
        ExpertReference.load(tmp_path / "other")
    path = made_up().save(tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cut is no file of an expert reference"):
        ExpertReference.load(path)

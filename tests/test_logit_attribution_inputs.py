"""What direct logit attribution is given: tokens and positions in every form, caches, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import ActivationCache

from moe_lens.routing import attribution
from moe_lens.routing.logit_attribution import logit_attribution_hooks, logit_attrs
from moe_lens.routing.senders import GRANULARITIES
from tests.families import FAMILIES, VOCABULARY, prompts
from tests.reference_logits import read_at
from tests.routing_cases import final_run, targets

Load = Callable[[str], Any]

# A hook value inside a component that each granularity divides.
INSIDE = {
    "layer": "blocks.0.hook_attn_out",
    "head": "blocks.1.attn.hook_z",
    "source": "blocks.1.attn.hook_v",
    "expert": "blocks.1.mlp.hook_expert_contrib",
    "neuron": "blocks.1.mlp.hook_expert_post",
}


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["deepseek_v2_bias", "qwen2_moe"])
def test_positions_are_those_columns_of_the_whole(model_of: Load, variant: str, by: str) -> None:
    model, batch = model_of(variant), prompts("right", batch=3)
    correct, incorrect = targets(batch)
    cache = final_run(model, batch, by)
    whole = logit_attrs(model, cache, correct, incorrect, by=by)
    assert torch.equal(whole.positions, torch.arange(9).expand(3, -1))
    last = batch[1].sum(dim=1, keepdim=True) - 1
    for positions, columns in (
        (-1, [[8]] * 3),
        (torch.tensor(2), [[2]] * 3),
        (slice(None, -4, 2), [[0, 2, 4]] * 3),
        ([3, -9, 3], [[3, 0, 3]] * 3),
        (last, last.tolist()),
        (torch.tensor([[0, 1], [-1, 4], [5, 5]]), [[0, 1], [8, 4], [5, 5]]),
    ):
        at = torch.tensor(columns)
        some = logit_attrs(
            model, cache, correct.gather(1, at), incorrect.gather(1, at), by=by, positions=positions
        )
        assert torch.equal(some.positions, at)
        assert some.senders == whole.senders
        expected = whole.values.gather(2, at.expand(len(whole.values), -1, -1))
        torch.testing.assert_close(some.values, expected, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(some.logits, whole.logits.gather(1, at))


def test_tokens_in_every_form(model_of: Load) -> None:
    model, batch = model_of("olmoe"), prompts(batch=3, length=5)
    cache = final_run(model, batch)
    text = "e"
    a, b, c = model.to_single_token(text), model.to_single_token(","), 9
    for form, ids in (
        (text, [[a] * 5] * 3),
        (c, [[c] * 5] * 3),
        (np.int64(c), [[c] * 5] * 3),
        ([text], [[a] * 5] * 3),
        ([text, ",", c], [[a] * 5, [b] * 5, [c] * 5]),
        ([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]] * 3),
        (torch.tensor([[1], [2], [3]], dtype=torch.int32), [[1] * 5, [2] * 5, [3] * 5]),
        (torch.tensor([[1, 2, 3, 4, 5]]), [[1, 2, 3, 4, 5]] * 3),
    ):
        attrs = logit_attrs(model, cache, form, c)  # type: ignore[arg-type]
        assert attrs.tokens.tolist() == ids
        assert attrs.incorrect_tokens is not None
        assert attrs.incorrect_tokens.tolist() == [[c] * 5] * 3
        expected = read_at(cache["logits"], torch.tensor(ids), torch.full((3, 5), c))
        torch.testing.assert_close(attrs.values.sum(dim=0), expected, atol=1e-5, rtol=1e-5)
    assert logit_attrs(model, cache, c).incorrect_tokens is None


def test_no_tensor_is_as_large_as_scores_of_the_vocabulary(model_of: Load) -> None:
    """By neuron too, nothing is made that is larger than the answer."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    model, batch = model_of("qwen2_moe"), prompts(length=24)
    cache = final_run(model, batch, "neuron")
    with Largest() as watch:
        attrs = logit_attrs(model, cache, *targets(batch), by="neuron")
    assert watch.size == attrs.values.numel()


# ---- caches, errors, frames ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "deepseek_v2_bias"])
def test_the_hooks_suffice_and_are_needed(model_of: Load, variant: str, by: str) -> None:
    model = model_of(variant)
    names = logit_attribution_hooks(model, by=by)
    assert len(set(names)) == len(names)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts()[0], names_filter=names)
    assert isinstance(cache, ActivationCache)
    assert set(cache.cache_dict) == set(names)
    logit_attrs(model, cache, 7, by=by)
    for name in names:
        lacking = {other: value for other, value in cache.items() if other != name}
        with pytest.raises(
            KeyError, match=rf"the cache lacks {name}; logit_attribution_hooks\(model, by=\.\.\.\)"
        ):
            logit_attrs(model, lacking, 7, by=by)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_caches_without_batch_or_with_some_positions(model_of: Load, by: str) -> None:
    model, batch = model_of("olmoe"), prompts()
    whole = logit_attrs(model, final_run(model, batch, by), 7, by=by)
    without_batch = final_run(model, (batch[0][:1], batch[1][:1]), by, remove_batch_dim=True)
    with pytest.raises(
        ValueError, match="without its batch and position axes; cache with remove_batch_dim=Fal"
    ):
        logit_attrs(model, without_batch, 7, by=by)
    sliced = final_run(model, batch, by, pos_slice=slice(2, 5))
    if by == "source":  # a source is a column of the batch, and those are gone
        with pytest.raises(
            ValueError, match=r"which is not of the \(2, 3\) batch rows and positions of the stre"
        ):
            logit_attrs(model, sliced, 7, by=by)
    else:
        torch.testing.assert_close(logit_attrs(model, sliced, 7, by=by).values, whole.values[:, :, 2:5])
    cache = final_run(model, batch, by)  # one value of another run
    cache[INSIDE[by]] = cache[INSIDE[by]][:1]
    with pytest.raises(
        ValueError, match=rf"{INSIDE[by]} in the cache is .* which is not of the \(2, 9\) batch"
    ):
        logit_attrs(model, cache, 7, by=by)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_what_is_not_finite_raises(model_of: Load, by: str) -> None:
    model, batch = model_of("olmoe"), prompts()
    cache = final_run(model, batch, by)
    for bad in (float("nan"), float("inf")):
        spoilt = cache[INSIDE[by]].clone()
        spoilt[1, 1] = bad
        with pytest.raises(ValueError, match="the scores hold values that are not finite"):
            logit_attrs(model, {**cache, INSIDE[by]: spoilt}, 7, by=by)
    stream = "blocks.2.hook_resid_post"
    with pytest.raises(ValueError, match="the logits hold values that are not finite"):
        logit_attrs(model, {**cache, stream: cache[stream] * float("nan")}, 7, by=by)


def test_too_many_scores_say_what_to_do(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("olmoe"), prompts()
    cache = final_run(model, batch, "neuron")
    n_scores = 2 * 9 * (1 + 3 + 3 * 8 * 32)
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_scores)
    assert logit_attrs(model, cache, 7, by="neuron").values.numel() == n_scores
    monkeypatch.setattr(attribution, "DENSE_LIMIT", n_scores - 1)
    with pytest.raises(
        ValueError, match=rf"by='neuron' makes {n_scores:,} .*fewer positions=, or by a coarser"
    ):
        logit_attrs(model, cache, 7, by="neuron")
    assert logit_attrs(model, cache, 7, by="neuron", positions=[0, 1]).values.shape[-1] == 2


def test_gradients_are_left_alone(model_of: Load) -> None:
    model = model_of("mixtral")
    _, cache = model.run_with_cache(prompts()[0], names_filter=logit_attribution_hooks(model, by="head"))
    attrs = logit_attrs(model, cache, 7, by="head")
    assert not attrs.values.requires_grad
    assert not attrs.logits.requires_grad


def test_same_tokens_differ_by_nothing(model_of: Load) -> None:
    model, batch = model_of("mixtral"), prompts()
    attrs = logit_attrs(model, final_run(model, batch, "expert"), 7, 7, by="expert")
    assert not attrs.values.any()
    assert attrs.completeness_error == 0


@pytest.mark.parametrize("variant", FAMILIES)
def test_frame_has_one_row_per_score(model_of: Load, variant: str) -> None:
    model, batch = model_of(variant), prompts()
    correct, incorrect = (t[:, :3] for t in targets(batch))
    cache = final_run(model, batch, "expert")
    attrs = logit_attrs(model, cache, correct, incorrect, by="expert", positions=[4, -1, 2])
    frame = attrs.to_frame()
    assert list(frame.columns) == ["sender", "batch", "position", "token", "incorrect_token", "score"]
    assert len(frame) == attrs.values.numel()
    row = frame.query(f"sender == '{attrs.senders[-2]}' and batch == 1 and position == 8")
    assert row["score"].tolist() == [float(attrs.values[-2, 1, 1])]
    assert row["token"].tolist() == [int(correct[1, 1])]
    assert row["incorrect_token"].tolist() == [int(incorrect[1, 1])]
    assert "incorrect_token" not in logit_attrs(model, cache, 7, by="expert").to_frame()
    assert "logit differences" in repr(attrs)


def test_clear_errors(model_of: Load) -> None:
    model, batch = model_of("deepseek_v2"), prompts()
    cache = final_run(model, batch)
    for call in (
        lambda by: logit_attrs(model, cache, 7, by=by),
        lambda by: logit_attribution_hooks(model, by=by),
    ):
        with pytest.raises(
            ValueError, match=r"by='neurons' is no granularity; available: 'layer', 'head', 's"
        ):
            call("neurons")
    for place in (0, 1):  # as tokens, and as incorrect_tokens

        def attribute(tokens: Any, place: int = place) -> Any:
            return logit_attrs(model, cache, tokens) if place == 0 else logit_attrs(model, cache, 7, tokens)

        name = ("tokens", "incorrect_tokens")[place]
        for wrong in (VOCABULARY, -1, [3, VOCABULARY]):
            with pytest.raises(
                ValueError, match=rf"^{name} hold (-1|128), which lies outside the vocabulary, 0..127"
            ):
                attribute(wrong)
        for wrong in (
            [1, 2, 3],
            torch.ones(3, 9, dtype=torch.long),
            torch.ones(2, 9, 1, dtype=torch.long),
            [],
        ):
            with pytest.raises(
                ValueError, match=rf"^{name} of shape .* do not fit 2 texts at 9 positions each"
            ):
                attribute(wrong)
        for wrong in (1.0, True, torch.ones(2), {"a": 1}, [None]):
            with pytest.raises(TypeError, match=f"^{name} must be integers, not"):
                attribute(wrong)
        with pytest.raises(ValueError, match=r"is \d+ tokens .*, not one"):
            attribute("When Mary and John")
    for wrong in (9, -10, [0, 12]):
        with pytest.raises(ValueError, match=r"there is no position (9|-10|12) among the 9 of the cache"):
            logit_attrs(model, cache, 7, positions=wrong)
    for wrong in (
        [],
        slice(3, 3),
        torch.zeros(3, 2, dtype=torch.long),
        torch.zeros(2, 1, 1, dtype=torch.long),
    ):
        with pytest.raises(
            ValueError, match=r"positions .* must be one column or more, the same for all rows"
        ):
            logit_attrs(model, cache, 7, positions=wrong)
    for wrong in (1.0, True, "last", torch.ones(2, 9, dtype=torch.bool)):
        with pytest.raises(TypeError, match="positions must be integers, not"):
            logit_attrs(model, cache, 7, positions=wrong)  # type: ignore[arg-type]

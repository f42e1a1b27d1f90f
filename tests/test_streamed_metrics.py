"""Metrics, references and what else runs a corpus, on streamed models: the numbers of models in memory, bit by bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from moe_lens.audit.census import census
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.metrics import expert_metrics, metric_names
from moe_lens.audit.redistribution import redistribution
from moe_lens.audit.verification import verify
from moe_lens.interventions import (
    Ablate,
    ExpertReference,
    RouterOnly,
    attribution_patch,
    expert_reference,
    path_patch,
    run_with_interventions,
)
from moe_lens.model.layer_weights import weights_in_memory
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs
from moe_lens.routing.explain import explain
from moe_lens.routing.load import LoadCounter
from moe_lens.routing.logit_attribution import logit_attribution_hooks, logit_attrs
from moe_lens.routing.score_maps import map_hooks, mean_score_variance_maps, score_variance_maps
from moe_lens.routing.super_experts import super_experts
from moe_lens.routing_page_data import routing_decisions
from tests.families import PAD, prompts
from tests.routing_cases import corpus
from tests.streamed_cases import STORAGES

GRANULARITIES = ("layer", "head", "expert", "neuron", "source")
RELEASED = ("olmoe", "deepseek_v2", "qwen2_moe")


def both_paddings() -> list[Any]:
    """Ten documents in four batches of unlike lengths, padded on either side."""
    return [*corpus("right"), *corpus("left", bos_in_first=True)]


def same_table(ours: MetricTable, theirs: MetricTable) -> None:
    assert (ours.metrics, ours.layers, ours.provenance) == (theirs.metrics, theirs.layers, theirs.provenance)
    assert (ours.n_tokens, ours.n_documents) == (theirs.n_tokens, theirs.n_documents)
    assert np.array_equal(ours.counts, theirs.counts)
    for name in theirs.metrics:
        for which in ("values", "standard_errors"):
            np.testing.assert_array_equal(getattr(ours, which)[name], getattr(theirs, which)[name], name)


def same_reference(ours: ExpertReference, theirs: ExpertReference) -> None:
    assert (ours.layers, ours.fingerprint) == (theirs.layers, theirs.fingerprint)
    assert ours.provenance == theirs.provenance


# ---- metrics and references ----


@pytest.mark.parametrize("variant", STORAGES)
def test_every_metric_and_reference_is_that_of_the_model_in_memory(
    streamed: Any, in_memory: Any, variant: str
) -> None:
    """All families, storages and dtypes; an iterator of padded batches; each layer is read once."""
    model, theirs = streamed(variant), in_memory(variant)
    table = expert_metrics(model, iter(both_paddings()))
    assert model.read_counts.layers_read == model.cfg.n_layers
    assert table.metrics == metric_names()
    same_table(table, expert_metrics(theirs, both_paddings()))
    reference = expert_reference(model, iter(both_paddings()), n_samples=3, seed=5)
    assert model.read_counts.layers_read == 2 * model.cfg.n_layers
    same_reference(reference, expert_reference(theirs, both_paddings(), n_samples=3, seed=5))


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2", "qwen2_moe", "deepseek_v2_bf16_sharded"])
def test_released_definitions_with_their_padding(streamed: Any, in_memory: Any, variant: str) -> None:
    """Padded queries are transformers' in either run."""
    model, theirs = streamed(variant), in_memory(variant)
    for whose in RELEASED:
        token = None if whose == "qwen2_moe" else PAD
        ours = expert_metrics(model, both_paddings(), as_released=whose, pad_token=token, batch_size=3)
        same_table(
            ours, expert_metrics(theirs, both_paddings(), as_released=whose, pad_token=token, batch_size=3)
        )
    assert model.read_counts.layers_read == 3 * model.cfg.n_layers


def test_metrics_under_hooks_and_of_some_layers(streamed: Any, in_memory: Any) -> None:
    """Hooks of the caller act on every batch, and are named; the layers before the last are run, and those after it
    are read once, for the weights' fingerprint."""
    tables, references, model = [], [], streamed("qwen3_moe")
    for one in (model, in_memory("qwen3_moe")):
        with one.hooks([("blocks.0.mlp.hook_expert_out", lambda value, hook: 2 * value)]):
            tables.append(expert_metrics(one, both_paddings(), layers=[0, 1], metrics=["activation_norm"]))
            references.append(expert_reference(one, both_paddings(), layers=1))
    same_table(*tables)
    same_reference(*references)
    assert tables[0].provenance["edited"] == ["blocks.0.mlp.hook_expert_out"]
    assert model.read_counts.layers_read == 3 + 2


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_a_reference_is_used_where_it_was_not_made(
    streamed: Any, in_memory: Any, tmp_path: Any, how: str
) -> None:
    """Made of a streamed model, used in one in memory, and the other way round, through a file."""
    model, theirs, tokens = streamed("deepseek_v2"), in_memory("deepseek_v2"), prompts("none", seed=9)[0]
    losses = []
    for maker in (model, theirs):
        reference = ExpertReference.load(
            expert_reference(maker, both_paddings()).save(tmp_path / "reference")
        )
        spec = Ablate(ranks=1, how=how, reference=reference)  # type: ignore[arg-type]
        for user in (model, theirs):
            losses.append(run_with_interventions(user, tokens, spec, return_type="loss")[0])
    assert torch.equal(torch.stack(losses), losses[0].expand(4))
    other = expert_reference(in_memory("deepseek_v2_bias"), both_paddings())
    with pytest.raises(ValueError, match="the reference is of other weights"):
        run_with_interventions(model, tokens, Ablate(ranks=1, how=how, reference=other))  # type: ignore[arg-type]


def test_what_will_be_read_is_said(streamed: Any, capfd: Any) -> None:
    model = streamed("olmoe")
    expert_metrics(model, both_paddings(), verbose=True)
    expert_reference(model, both_paddings(), verbose=True)
    out, bars = capfd.readouterr()
    assert out.count("plan: 3 layers, each read once: ") == 2
    assert "12/12" in bars


def test_errors_are_those_of_a_model_in_memory(streamed: Any) -> None:
    model = streamed("olmoe")
    for analysis in (expert_metrics, expert_reference, super_experts):
        with pytest.raises(ValueError, match="there were no batches"):
            analysis(model, iter([]))
        with pytest.raises(ValueError, match=r"batch 1: tokens .* go beyond the vocabulary"):
            analysis(model, [both_paddings()[0], (torch.tensor([[500]]), None)])
    assert model.read_counts.bytes_read == 0
    with (
        model.hooks([("blocks.1.mlp.hook_expert_out", lambda value, hook: value * torch.nan)]),
        pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_expert_out holds a value that is not finite"),
    ):
        expert_metrics(model, both_paddings())


# ---- what is held on the way ----

LISTENERS: dict[str, Callable[..., Any]] = {
    "metrics": expert_metrics,
    "released, padding": lambda *given: expert_metrics(
        *given, as_released="deepseek_v2", pad_token=PAD, batch_size=2
    ),
    "released, without": lambda *given: expert_metrics(*given, as_released="qwen2_moe"),
    "reference": lambda *given: expert_reference(*given, n_samples=2),
    "super experts": super_experts,
    "redistribution": lambda *given: redistribution(*given, n_bootstrap=0, batch_size=2),
    "load": lambda model, batches: model.run_corpus(batches, _counting(model, batches)),
}


def _counting(model: Any, batches: Any) -> Callable[[int], Any]:
    counter = LoadCounter(model)
    return lambda i: counter.listening(*batches[i])


@pytest.mark.parametrize("name", LISTENERS)
def test_listeners_let_go_of_a_layer_s_values(
    streamed: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """When the last layer begins, no more is held for each batch than its stream and some numbers for each of its
    tokens; the experts that it chose alone would take 48 bytes."""
    model = streamed("qwen2_moe")
    held: dict[int, int] = {}

    def run_block(block: Any, *given: Any) -> Tensor:
        if block is model.blocks[2] and n_batches not in held:
            tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
            storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
            held[n_batches] = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
        return type(model).run_block(model, block, *given)

    monkeypatch.setattr(model, "run_block", run_block)
    for n_batches in (2, 8):
        tokens = prompts("none", batch=2 * n_batches, length=100)[0]
        mask = torch.ones(2, 100, dtype=torch.bool)
        mask[1, 90:] = False
        LISTENERS[name](model, [(some, mask) for some in tokens.split(2)])
    n_tokens, stream = 6 * 200, 6 * 200 * 64 * 4
    assert (held[8] - held[2] - stream) / n_tokens < 32


# ---- others that run a corpus ----


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v2_bf16_sharded"])
def test_other_analyses_of_a_corpus(streamed: Any, in_memory: Any, variant: str) -> None:
    model, theirs = streamed(variant), in_memory(variant)
    last = model.cfg.moe_layers[-1]
    pairs = [(tokens, mask, 4, 2) for tokens, mask in (prompts("none"), prompts("none", seed=1, length=6))]
    for number, analysis in enumerate(
        (
            lambda one: super_experts(one, iter(both_paddings())),
            lambda one: redistribution(one, both_paddings(), n_bootstrap=10).experts,
            lambda one: redistribution(one, both_paddings(), n_bootstrap=10).correlations,
        )
    ):
        pd.testing.assert_frame_equal(analysis(model), analysis(theirs), check_exact=True)
        assert model.read_counts.layers_read == (number + 1) * model.cfg.n_layers
    for ours, its in zip(
        mean_score_variance_maps(model, iter(pairs), last),
        mean_score_variance_maps(theirs, pairs, last),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, its)
    assert model.read_counts.layers_read == 4 * model.cfg.n_layers


def test_load_is_counted_in_either_run(streamed: Any, in_memory: Any) -> None:
    batches = both_paddings()
    ours, theirs = LoadCounter(streamed("deepseek_v2")), LoadCounter(in_memory("deepseek_v2"))
    ours.model.run_corpus(batches, lambda i: ours.listening(*batches[i]))  # type: ignore[attr-defined]
    for tokens, mask in batches:
        with theirs.listening(tokens, mask):
            theirs.model(tokens, attention_mask=mask)
    pd.testing.assert_frame_equal(ours.result().to_frame(), theirs.result().to_frame(), check_exact=True)


# ---- weights that are read after a run ----


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bf16_sharded"])
@pytest.mark.parametrize("by", GRANULARITIES)
@torch.no_grad()
def test_attributions_read_the_layers_that_they_need(
    streamed: Any, in_memory: Any, variant: str, by: str
) -> None:
    """Router and token logits by every granularity, in both precisions (where rounding is a sender)."""
    tokens, answers = prompts("none", seed=2)[0], []
    for one in (streamed(variant), in_memory(variant)):
        last = one.cfg.moe_layers[-1]
        names = [*attribution_hooks(one, [last], by=by), *logit_attribution_hooks(one, by=by)]
        _, cache = one.run_with_cache(tokens, names_filter=names)
        of_router = router_logit_attrs(one, cache, receiver=last, by=by)
        of_token = logit_attrs(one, cache, [5], [7], by=by)
        answers.append((of_router.values, of_router.logits, of_token.values, of_token.logits))
        assert of_router.completeness_error < 1e-2
    for ours, its in zip(*answers, strict=True):
        assert torch.equal(ours, its)


@pytest.mark.parametrize("by", GRANULARITIES)
@torch.no_grad()
def test_a_decision_is_explained(streamed: Any, in_memory: Any, by: str) -> None:
    tokens = prompts("none", seed=2)[0]
    ours, theirs = (
        explain(one, tokens[:1], 5, 2, 3, by) for one in (streamed("deepseek_v2"), in_memory("deepseek_v2"))
    )
    assert str(ours) == str(theirs)
    pd.testing.assert_frame_equal(ours.table(), theirs.table(), check_exact=True)


@torch.no_grad()
def test_a_page_and_maps_of_a_cache(streamed: Any, in_memory: Any) -> None:
    tokens = prompts("none", seed=2)[0]
    pages, maps = [], []
    for one in (streamed("qwen2_moe"), in_memory("qwen2_moe")):
        pages.append(routing_decisions(one, tokens, n_documents=1).json)
        _, cache = one.run_with_cache(tokens[:1], names_filter=map_hooks(one, 2))
        maps.append(score_variance_maps(one, cache, 4, 2, 2))
        for ours, its in zip(score_variance_maps(one, tokens[:1], 4, 2, 2), maps[0], strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=0, equal_nan=True)
    assert pages[0] == pages[1]
    for ours, its in zip(*maps, strict=True):
        assert torch.equal(ours, its)


def test_a_layer_in_memory_for_a_while(streamed: Any, in_memory: Any) -> None:
    model, theirs = streamed("olmoe"), in_memory("olmoe")
    with weights_in_memory(model, 1), weights_in_memory(model, 1), weights_in_memory(theirs, 1):
        for ours, its in zip(model.blocks[1].parameters(), theirs.blocks[1].parameters(), strict=True):
            assert torch.equal(ours, its)
    assert model.read_counts.layers_read == 1
    with weights_in_memory(model, None):
        assert model.read_counts.layers_read == 1

    def reads_another(value: Tensor, hook: Any) -> None:
        with weights_in_memory(model, 0):
            pass

    hook = ("blocks.1.hook_resid_pre", reads_another)
    with pytest.raises(RuntimeError, match="there is memory for one run's layers only"):
        model.run_with_hooks(prompts()[0], fwd_hooks=[hook])


# ---- what a streamed model cannot do ----


def _metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            lambda model, tokens: census(model, tokens, predictors="first_order"),
            "first_order needs gradients, and a streamed model has none: .* without stream=True",
        ),
        (
            lambda model, tokens: attribution_patch(model, tokens, tokens.flip(0), _metric),
            "attribution patching needs gradients, and a streamed model has none: .* without stream=True",
        ),
        (
            lambda model, tokens: verify(model, "anywhere", tokens),
            "a comparison with transformers needs the weights of several layers at a time, .* without stream=True",
        ),
        (
            lambda model, tokens: path_patch(model, tokens, tokens.flip(0), "heads", metric=_metric),
            "path_patch needs the weights of several layers at a time, .* without stream=True",
        ),
        (
            lambda model, tokens: run_with_interventions(model, tokens, RouterOnly("A0H1", receivers=[2])),
            "A0H1.* is read through its layer's weights, needs .* without stream=True",
        ),
        (
            lambda model, tokens: run_with_interventions(model, tokens, RouterOnly("M0E3N2", receivers=[2])),
            "M0E3N2.* is read through its layer's weights, needs .* without stream=True",
        ),
    ],
)
def test_what_it_cannot_do_is_told_before_anything_runs(
    streamed: Any, monkeypatch: pytest.MonkeyPatch, refused: Any, message: str
) -> None:
    model, ran = streamed("qwen2_moe"), []
    monkeypatch.setattr(model.embed, "forward", lambda *given: ran.append(given))
    with pytest.raises(ValueError, match=message):
        refused(model, prompts("none")[0])
    assert not ran
    assert model.read_counts.bytes_read == 0

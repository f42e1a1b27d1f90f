"""What the tests of the routing analyses share: variants that differ in kind, a corpus, and its slow analysis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.attribution import attribution_hooks
from moe_lens.routing.logit_attribution import logit_attribution_hooks
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.result import RoutingContributions
from tests.families import BOS, VOCABULARY, prompts
from tests.reference import reference_run
from tests.reference_rank_shift import rank_shifts_of
from tests.reference_routing import (
    Experts,
    Values,
    by_source_offset,
    by_source_position,
    document_rows,
    readout_logits,
    readout_scores,
    scaled,
    sender_active,
    sender_vectors,
    source_rows,
    token_measures,
)

# One of each family, and those whose streams differ in kind: dense layers, attention biases (with latent attention
# too), grouped queries, group-limited routing, odd widths, gated and ungated shared experts.
VARIANTS = (
    "olmoe",
    "olmoe_bias_odd_width",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "deepseek_v2_bias",
    "qwen3_moe",
    "qwen3_moe_dense_bias",
    "mixtral",
)

Batch = tuple[Tensor, Tensor]


def corpus(padding: str = "right", *, bos_in_first: bool = False) -> list[Batch]:
    """Five documents in two batches of unlike lengths, padded on one side; one document is a single token.

    With `bos_in_first`, every document of the first batch begins with BOS, and none of the second.
    """
    first, first_mask = prompts(padding, batch=3, length=8)
    second, second_mask = prompts(padding, seed=1, batch=2, length=11)
    first_mask[2] = 0
    first_mask[2, 0 if padding == "right" else -1] = 1
    if bos_in_first:
        for row in range(3):
            first[row, int(first_mask[row].argmax())] = BOS
    return [(first, first_mask), (second, second_mask)]


def cached_run(model: HookedMoE, batch: Batch, by: str = "layer", **settings: Any) -> dict[str, Tensor]:
    """The hook values that `router_logit_attrs` needs for all routers of a model."""
    names = attribution_hooks(model, model.cfg.moe_layers, by=by)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            batch[0],
            attention_mask=batch[1],
            names_filter=names,
            return_type=None,
            return_cache_object=False,
            **settings,
        )
    assert isinstance(cache, dict)
    return cache


def final_run(model: HookedMoE, batch: Batch, by: str = "layer", **settings: Any) -> dict[str, Tensor]:
    """The hook values that `logit_attrs` needs, and the model's logits as `logits`."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            batch[0],
            attention_mask=batch[1],
            names_filter=logit_attribution_hooks(model, by=by),
            return_cache_object=False,
            **settings,
        )
    assert isinstance(cache, dict)
    return {**cache, "logits": logits}


def targets(batch: Batch, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Any two unlike tokens at every place."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.randint(0, VOCABULARY, batch[0].shape, generator=generator)
    return correct, (correct + torch.randint(1, VOCABULARY, correct.shape, generator=generator)) % VOCABULARY


class Slow(NamedTuple):
    """A transformers model, and the value of every hook point in each batch of a corpus."""

    model: Any
    batches: list[Batch]
    values: list[Values]

    @classmethod
    def of(cls, hf_model: Any, batches: list[Batch]) -> Slow:
        with torch.no_grad():
            return cls(hf_model, batches, [reference_run(hf_model, *batch)[1] for batch in batches])

    def token_table(
        self,
        batch: int,
        receiver: int,
        by: str,
        wanted: Callable[[str], bool],
        *,
        experts: Experts = None,
        rank_shift: bool = False,
    ) -> dict[str, np.ndarray]:
        """Every measure of every wanted sender at every token of a batch, `[batch, pos, measure]`. The overlap is
        its complement, which is 0, as all measures are, where a sender writes nothing."""
        values = self.values[batch]
        table = {}
        for name, vectors in sender_vectors(self.model, values, receiver, by).items():
            if not wanted(name):
                continue
            scores = readout_scores(self.model, values, receiver, vectors)
            measures = token_measures(scores, values, receiver, experts)
            measures["norm"] = np.linalg.norm(scaled(self.model, values, receiver, vectors), axis=-1)
            columns = [measures[measure] for measure in MEASURES]
            if rank_shift:
                logits = readout_logits(self.model, values, receiver)
                shifts = rank_shifts_of(logits, scores, self.model.config)
                shifts["overlap"] = 1 - shifts["overlap"]
                columns += [shifts[measure] for measure in RANK_MEASURES]
            table[name] = np.stack(columns, axis=-1)
        return table

    def document_rows(
        self,
        tables: Sequence[dict[str, np.ndarray]],
        by: str,
        *,
        source_axis: str = "position",
        skip_bos: Sequence[bool] = (False, False),
    ) -> dict[tuple[str, str, bool], np.ndarray]:
        """`[document, measure]` for each (sender, position class, whether when active), from `token_table` of every
        batch; `skip_bos` for each batch."""
        rows: dict[tuple[str, str, bool], list[np.ndarray]] = {}
        for table, (_, mask), values, skip in zip(tables, self.batches, self.values, skip_bos, strict=True):
            aligned = by_source_offset if source_axis == "offset" else by_source_position
            documents = [aligned(table, mask, row) for row in range(len(mask))] if by == "source" else []
            names = dict.fromkeys(name for d in documents for name in d) if by == "source" else table
            for name in names:
                active = None if by == "source" else sender_active(values, name, mask)
                for position in ("lead", "rest"):
                    for active_only in (False, True):
                        how = dict(active_only=active_only, skip_bos=skip)
                        if by == "source":
                            some = source_rows(documents, name, position, **how)
                        else:
                            some = document_rows(table[name], mask, position, active, **how)
                        rows.setdefault((name, position, active_only), []).extend(some)
        return {key: np.array(some) for key, some in rows.items()}


def assert_equals_the_slow_analysis(
    got: RoutingContributions,
    slow: Slow,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    receivers: Sequence[int] | None = None,
    experts: Experts = None,
    source_axis: str = "position",
    skip_bos: Sequence[bool] = (False, False),
) -> int:
    """Means, standard errors and numbers of documents, lead and rest, over all tokens and when active; how many
    senders at receivers were compared."""
    names = {name: row for row, name in enumerate(got.senders)}
    rank_shift = "aarv" in got.measures
    compared = 0
    means = {(m, active): got.when_active(m) if active else got.measure(m)
             for m in got.measures for active in (False, True)}  # fmt: skip
    errors = {(m, active): got.standard_error(m, when_active=active)
              for m in got.measures for active in (False, True)}  # fmt: skip
    documents_with = {(position, active): got.documents_with(position, when_active=active)
                      for position in ("lead", "rest") for active in (False, True)}  # fmt: skip
    for column, receiver_name in enumerate(got.receivers):
        receiver = int(receiver_name[1:])
        if receivers is not None and receiver not in receivers:
            continue
        tables = [
            slow.token_table(i, receiver, got.by, wanted, experts=experts, rank_shift=rank_shift)
            for i in range(len(slow.batches))
        ]
        every = slow.document_rows(tables, got.by, source_axis=source_axis, skip_bos=skip_bos)
        assert every
        size = np.max([np.abs(rows).max(axis=0) for rows in every.values() if len(rows)], axis=0)
        where = list(every)
        compared += len(where)
        n_documents = [documents_with[position, active][names[name]] for name, position, active in where]
        assert n_documents == [len(every[key]) for key in where]
        for i, measure in enumerate(got.measures):
            cells = [(position, names[name], column) for name, position, _ in where]
            mean = [means[measure, key[2]][p][row, c] for key, (p, row, c) in zip(where, cells, strict=True)]
            error = [
                errors[measure, key[2]][p][row, c] for key, (p, row, c) in zip(where, cells, strict=True)
            ]
            expected = np.array([every[key][:, i].mean() if len(every[key]) else np.nan for key in where])
            expected_error = [
                every[key][:, i].std(ddof=1) / np.sqrt(len(every[key])) if len(every[key]) > 1 else np.nan
                for key in where
            ]
            if measure == "overlap":
                expected = 1 - expected
            # NaN where, and only where, no document (for errors, no second one) has the sender.
            close = dict(rtol=2e-4, atol=1e-5 * max(size[i], 1e-6))
            for found, wanted_value, what in ((mean, expected, ""), (error, expected_error, "error of ")):
                wrong = np.flatnonzero(~np.isclose(found, wanted_value, equal_nan=True, **close))
                assert not len(wrong), (
                    f"{what}{measure} at {receiver_name}, {[where[w] for w in wrong[:3]]}: "
                    f"{[(found[w], wanted_value[w]) for w in wrong[:3]]}"
                )
        # Senders that come after the receiver have no value there.
        reached = {key[0] for key in every}
        for name, row in names.items():
            if wanted(name) and name not in reached and got.by != "source":
                for values in (means, errors):
                    assert all(np.isnan(by[p][row, column]) for by in values.values() for p in by), name
    return compared


def assert_same_results(one: RoutingContributions, other: RoutingContributions) -> None:
    """Bitwise, but for what they are of."""
    for name in ("by", "senders", "receivers", "measures", "n_documents", "n_tokens", "firsts"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.completeness_error == other.completeness_error
    assert one.rounding_ratio == other.rounding_ratio
    for key, groups in one.moments.items():
        for mine, its in zip(groups, other.moments[key], strict=True):
            for name in ("count", "mean", "squares"):
                assert torch.equal(getattr(mine, name), getattr(its, name)), (key, name)


def assert_close_results(
    one: RoutingContributions, other: RoutingContributions, rtol: float, atol: float = 0.0
) -> None:
    """Means, standard errors and numbers of documents; `atol` relative to the largest of each measure."""
    assert one.senders == other.senders
    assert one.receivers == other.receivers
    assert one.n_documents == other.n_documents
    assert one.n_tokens == other.n_tokens
    for position in ("lead", "rest"):
        for active in (False, True):
            np.testing.assert_array_equal(
                one.documents_with(position, when_active=active),
                other.documents_with(position, when_active=active),
            )
            for measure in one.measures:
                for read in (
                    lambda r, m=measure, a=active: r.when_active(m) if a else r.measure(m),
                    lambda r, m=measure, a=active: r.standard_error(m, when_active=a),
                ):
                    mine, its = read(one)[position], read(other)[position]
                    size = np.nanmax(np.abs(its)) if np.isfinite(its).any() else 0.0
                    np.testing.assert_allclose(mine, its, rtol=rtol, atol=atol * size, err_msg=measure)

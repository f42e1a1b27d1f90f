"""Score variance maps: what every head moves from one token to another, as it varies over a router's experts.

For a query and a key position, each (layer, head) has an attention weight A[query, key] and the variance over the
experts of a receiver of the score that it carries between them,

    Var_e  R_r[e] ( A[query, key] v_key W_O^h ) / s_r(query)

which is A^2 times that of the source, so that the two maps look alike where the values read alike.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 6.1, eq. 9
and appendix F.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from moe_lens.corpus import refuse_bare_pair
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import Moments, real_tokens
from moe_lens.routing.readout import check_receiver, router_readout
from moe_lens.routing.writes import attention_of, folded_output, head_values

_READ = ("hook_pattern", "hook_v")
Positions = int | Sequence[int] | Int[Tensor, " batch"]


class ScoreVarianceMaps(NamedTuple):
    """Attributes:
    variance: over the experts of the receiver, logits².
    attention: the weight from query to key, 0 to 1.

    Both are NaN for layers after the receiver.
    """

    variance: Float[Tensor, "layer head"]
    attention: Float[Tensor, "layer head"]


class MeanScoreVarianceMaps(NamedTuple):
    """Means over prompts of `ScoreVarianceMaps`, with their standard errors (NaN of a single prompt)."""

    variance: Float[Tensor, "layer head"]
    variance_standard_error: Float[Tensor, "layer head"]
    attention: Float[Tensor, "layer head"]
    attention_standard_error: Float[Tensor, "layer head"]
    n_prompts: int


def map_hooks(model: HookedMoE, receiver: int) -> list[str]:
    """The hook names that `score_variance_maps` reads: a `names_filter` for a cache.

    Raises:
        ValueError: the receiver is no MoE layer.
    """
    check_receiver(model, receiver)
    points = [f"blocks.{i}.attn.{point}" for i in range(receiver + 1) for point in _READ]
    return [*points, f"blocks.{receiver}.ln2.hook_scale"]


def score_variance_maps(
    model: HookedMoE,
    cache_or_tokens: ActivationCache | Mapping[str, Tensor] | Int[Tensor, "one pos"] | str,
    query: int,
    key: int,
    receiver: int,
    *,
    attention_mask: Bool[Tensor, "one pos"] | Int[Tensor, "one pos"] | None = None,
) -> ScoreVarianceMaps:
    """What every head moves from one position to another, toward the experts of one router.

    Args:
        model: run (up to the receiver, without gradients) where no cache is given; its weights are read.
        cache_or_tokens: the cache of a run of one prompt with at least `map_hooks`, its batch axis and all positions;
            or the prompt, as tokens or text, which is then run.
        query, key: columns, negative from the end.
        receiver: an MoE layer.
        attention_mask: of tokens: true where they are real.

    Returns:
        Variance (logits²) and attention, `[layer, head]` in float32.

    Raises:
        ValueError: not one prompt; a position that there is not, padding, or a key after the query; no MoE layer.
        KeyError: the cache lacks a hook, which is named.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", section 6.1.
    """
    check_receiver(model, receiver)
    if isinstance(cache_or_tokens, (ActivationCache, Mapping)):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with tokens; a cache is of a run that had its own")
        values = _cached(cache_or_tokens, map_hooks(model, receiver))
        scale = values[f"blocks.{receiver}.ln2.hook_scale"]
        if scale.ndim != 3 or len(scale) != 1:
            raise ValueError(
                f"the cache must be of one prompt, with its batch axis; its scale is {tuple(scale.shape)}"
            )
        real = torch.ones(1, scale.shape[1], dtype=torch.bool, device=scale.device)
        queries, keys = _checked_pairs(query, key, real)
        reader = _PairReader(model, queries, keys, receiver)
        with model.layers_in_memory(range(receiver + 1)) as blocks:
            for layer, _ in enumerate(blocks):
                reader.read_layer(layer, *(values[f"blocks.{layer}.attn.{point}"] for point in _READ))
        variance, attention = reader.maps(scale)
    else:
        tokens, mask = model.tokens_and_mask(cache_or_tokens, attention_mask)
        if len(tokens) != 1:
            raise ValueError(
                f"score_variance_maps takes one prompt, not {len(tokens)}; mean_score_variance_maps takes many"
            )
        queries, keys = _checked_pairs(query, key, real_tokens(tokens, mask))
        reader = _PairReader(model, queries, keys, receiver)
        with torch.no_grad(), reader.listening() as maps:
            model(tokens, attention_mask=mask, stop_at_layer=receiver + 1)
        variance, attention = maps
    return ScoreVarianceMaps(variance[0], attention[0])


def mean_score_variance_maps(
    model: HookedMoE, prompts: Iterable[Sequence[Any]], receiver: int, *, verbose: bool = False
) -> MeanScoreVarianceMaps:
    """The same over many prompts, each with a query and a key of its own, as a stream.

    Args:
        model: run up to the receiver, without gradients; of a streamed model each layer is read once for all prompts.
        prompts: batches `(tokens [batch, pos], mask or None, queries, keys)`; queries and keys are columns, one for
            each row or one for all, negative from the end of the row, padding included.
        receiver: an MoE layer.
        verbose: show a progress bar.

    Returns:
        Means over prompts (each counts alike) and their standard errors, `[layer, head]` in float64.

    Raises:
        ValueError: no prompts; one batch that is not in a list; see `score_variance_maps`.

    Source: appendix F, figure 17, of indirect-object prompts: query END, key IO, S1 or S2.
    """
    check_receiver(model, receiver)
    shape = (model.cfg.n_layers, model.cfg.attention.n_heads)
    refuse_bare_pair(prompts, "(tokens, mask, queries, keys)")
    moments, n_prompts = Moments(2, *shape), 0

    @contextmanager
    def listening(batch: CorpusBatch) -> Iterator[None]:
        nonlocal n_prompts
        if len(batch.rest) != 2:
            raise ValueError(f"batch {batch.number} must be (tokens, mask, queries, keys)")
        queries, keys = _checked_pairs(*batch.rest, batch.real)
        with _PairReader(model, queries, keys, receiver).listening() as maps:
            yield
        values = torch.stack(maps).cpu().double().movedim(1, 2)  # [map, layer, prompt, head]
        present = torch.ones(len(queries), shape[1], dtype=torch.bool)
        moments.add(values, present)
        moments.counted(present.sum(dim=0).double())
        n_prompts += len(queries)

    run_batches(model, prompts, listening, stop_at_layer=receiver + 1, verbose=verbose)
    errors = [moments.standard_error(i) for i in range(2)]
    return MeanScoreVarianceMaps(moments.mean[0], errors[0], moments.mean[1], errors[1], n_prompts)


def _cached(cache: ActivationCache | Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    for name in names:
        if name not in stored:
            raise KeyError(f"the cache lacks {name}; map_hooks(model, receiver) lists what is needed")
    return {name: stored[name] for name in names}


class _PairReader:
    """Variance and attention of every row at its query and key, layer by layer.

    A layer's weights are read while it runs, because a streamed model has them only then.
    """

    def __init__(
        self, model: HookedMoE, queries: Int[Tensor, " batch"], keys: Int[Tensor, " batch"], receiver: int
    ):
        self.model, self.receiver = model, receiver
        self.queries, self.keys, self.rows = queries, keys, torch.arange(len(queries), device=queries.device)
        self.readout = router_readout(model, receiver)
        # The variance of what the key's value carries, and the attention that it is carried with.
        self.of_layers: list[tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]] = []

    def read_layer(
        self,
        layer: int,
        pattern: Float[Tensor, "batch head query key"],
        values: Float[Tensor, "batch pos kv_head d_value"],
    ) -> None:
        """The next layer, whose weights are in memory."""
        block = attention_of(self.model, layer)
        weights = pattern.detach()[self.rows, :, self.queries, self.keys].float()
        read = head_values(block, values.detach()[self.rows, self.keys].float()[:, None])[:, 0]
        # A cache may lie elsewhere than the model.
        folded = folded_output(block, self.readout).to(read.device)
        scores = einsum(read, folded, "b head d_value, head d_value expert -> b head expert")
        self.of_layers.append((scores.var(dim=-1, correction=0), weights))

    def maps(
        self, scale: Float[Tensor, "batch pos 1"]
    ) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "batch layer head"]]:
        """Variance and attention of every row, NaN for layers after the receiver."""
        scale = scale.detach()[self.rows, self.queries].float()
        shape = (len(scale), self.model.cfg.n_layers, self.model.cfg.attention.n_heads)
        variance, attention = (torch.full(shape, torch.nan, device=scale.device) for _ in range(2))
        for layer, (carried, weights) in enumerate(self.of_layers):
            attention[:, layer] = weights
            variance[:, layer] = carried * (weights / scale).square()
        return variance, attention

    @contextmanager
    def listening(self) -> Iterator[list[Float[Tensor, "batch layer head"]]]:
        """Around one forward pass up to the receiver: variance and attention are there when it has ended."""
        maps: list[Tensor] = []
        held: list[Tensor] = []

        def values(value: Tensor, hook: HookPoint) -> None:
            held.append(value)

        def pattern(value: Tensor, hook: HookPoint) -> None:
            self.read_layer(len(self.of_layers), value, held.pop())

        def scale(value: Tensor, hook: HookPoint) -> None:
            maps.extend(self.maps(value))

        hooks: list[tuple[str, Any]] = []
        for layer in range(self.receiver + 1):
            of_layer = zip(_READ, (pattern, values), strict=True)
            hooks += [(f"blocks.{layer}.attn.{point}", hook) for point, hook in of_layer]
        with self.model.listening([*hooks, (f"blocks.{self.receiver}.ln2.hook_scale", scale)]):
            yield maps


def _checked_pairs(
    query: Positions, key: Positions, real: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Query and key columns of every row, after the query was found to see the key."""
    queries, keys = (position_columns(given, name, real) for given, name in ((query, "query"), (key, "key")))
    for row, (q, k) in enumerate(zip(queries.tolist(), keys.tolist(), strict=True)):
        if k > q:
            raise ValueError(
                f"row {row}: the key at position {k} comes after the query at {q}, which cannot see it"
            )
    return queries, keys


def position_columns(given: Positions, name: str, real: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """A position for every row, counted from the left.

    Args:
        given: a column for all rows, or one for each; negative from the end of the row, padding included.
        name: of the argument, for the error.
        real: true where tokens are.

    Raises:
        ValueError: no integers, not one for each row, no such position, or padding.
    """
    n_rows, n_columns = real.shape
    try:
        listed = given.tolist() if isinstance(given, Tensor) else given
        columns = [operator.index(c) for c in listed] if isinstance(listed, Sequence) else None
        columns = [operator.index(listed)] * n_rows if columns is None else columns  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be a position, or one for each row, not {given!r}") from None
    if len(columns) != n_rows:
        raise ValueError(
            f"{len(columns)} {name} positions for {n_rows} rows; give one for all, or one for each"
        )
    for row, column in enumerate(columns):
        if not -n_columns <= column < n_columns:
            raise ValueError(f"row {row}: there is no position {column} among {n_columns}")
        if not bool(real[row, column]):
            advice = "" if isinstance(listed, Sequence) else "; give one for each row"
            raise ValueError(f"row {row}: the {name} position {column} is padding{advice}")
    return torch.tensor([column % n_columns for column in columns], device=real.device)

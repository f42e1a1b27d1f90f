"""Attention of a replay's branches: both back ends against one query at a time, and what memory they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lens.interventions import replay_attend
from moe_lens.interventions.branches import single_slots
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.first_order import loss_gradients
from moe_lens.interventions.replay import Branches, replay
from moe_lens.interventions.replay_attend import SCORE_BYTES, mix_with_own, mixing_bytes
from moe_lens.interventions.replay_plan import ReplayPlan, affordable_branches, branch_bytes
from tests.families import FAMILIES, prompts
from tests.reference import attend_with_own

BACKENDS = ("fused", "tiles")
# Heads, heads of keys, d_head, d_value: multi-head, grouped-query, one key for all, latent, values wider than keys.
HEADS = {
    "multi-head": (4, 4, 16, 16),
    "grouped": (8, 2, 12, 12),
    "one key": (3, 1, 8, 8),
    "latent": (4, 4, 24, 16),
    "wide values": (2, 2, 8, 31),
}
# Which clean tokens come before the branches of each position. None come before the first token.
ROWS = {
    "all": [0, 1, 2, 3, 4, 5, 6],
    "some": [0, 3, 4, 9],
    "the first alone": [0],
    "the last alone": [9],
    "later ones": [6, 7, 8],
}


def drawn(heads: str, rows: str, dtype: torch.dtype = torch.float32, n_branches: int = 3) -> dict[str, Any]:
    """Arguments of `mix_with_own` and of its reference."""
    n_heads, kv_heads, d_head, d_value = HEADS[heads]
    n, n_keys = len(ROWS[rows]), 12
    drawn = {
        "queries": torch.randn(n, n_branches, n_heads, d_head),
        "keys": torch.randn(n, n_branches, kv_heads, d_head),
        "values": torch.randn(n, n_branches, kv_heads, d_value),
        "clean_keys": torch.randn(n_keys, kv_heads, d_head),
        "clean_values": torch.randn(n_keys, kv_heads, d_value),
    }
    drawn = {name: value.to(dtype) for name, value in drawn.items()}
    return {**drawn, "rows": ROWS[rows], "scale": d_head**-0.5}


def in_dtype(of: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in of.items()}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_as_one_query_at_a_time(backend: Any, heads: str, rows: str) -> None:
    of = drawn(heads, rows)
    torch.testing.assert_close(
        mix_with_own(**of, backend=backend), attend_with_own(**of), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_precisions(backend: Any, heads: str, dtype: torch.dtype) -> None:
    """In half precision they are no further from float64 than the plain way is in the same dtype, on the whole."""
    of = drawn(heads, "all", dtype, n_branches=20)
    exact, mixed = attend_with_own(**in_dtype(of, torch.float64)), mix_with_own(**of, backend=backend)
    assert mixed.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(mixed, exact)
        return
    plain = (attend_with_own(**of).double() - exact).square().mean().sqrt()
    assert (mixed.double() - exact).square().mean().sqrt() <= 1.05 * plain


@pytest.mark.parametrize(("backend", "share"), [("tiles", 1.05), ("fused", 0.2)])
def test_large_own_scores(backend: Any, share: float) -> None:
    """Rounded to bfloat16, scores of a hundred are off by tenths; where the kernel keeps the others, so is its own."""
    of, near = drawn("multi-head", "the last alone", n_branches=40), 5 * torch.randn(4, 16)
    for name in ("queries", "keys", "clean_keys"):
        of[name] = near + 0.2 * of[name]
    of = in_dtype(of, torch.bfloat16)
    exact = attend_with_own(**in_dtype(of, torch.float64))
    plain = (attend_with_own(**of).double() - exact).square().mean().sqrt()
    error = (mix_with_own(**of, backend=backend).double() - exact).square().mean().sqrt()
    assert error <= share * plain


@pytest.mark.parametrize("tile_bytes", [0, 700, 2000, 5000, 20_000])
@pytest.mark.parametrize("heads", HEADS)
def test_any_tile(heads: str, tile_bytes: int) -> None:
    """Down to a branch at a time."""
    for rows in ("all", "some"):
        of = drawn(heads, rows)
        torch.testing.assert_close(
            mix_with_own(**of, backend="tiles", tile_bytes=tile_bytes), attend_with_own(**of)
        )


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_any_number_of_sequences(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Those that are too many for one launch of the fused kernel go one after another."""
    monkeypatch.setattr(replay_attend, "_SEQUENCES_AT_ONCE", at_once)
    for rows in ("all", "some"):
        of = drawn("grouped", rows, n_branches=5)
        torch.testing.assert_close(mix_with_own(**of, backend="fused"), attend_with_own(**of))


@pytest.mark.parametrize("tile_bytes", [2000, 2**24])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: Any, heads: str, tile_bytes: int) -> None:
    """Of queries, keys and values of the branches: what first-order attribution goes back through."""
    of = drawn(heads, "some")
    leaves = [of[name].requires_grad_() for name in ("queries", "keys", "values")]
    expected = attend_with_own(**of)
    upstream = torch.randn_like(expected)
    mixed = mix_with_own(**of, backend=backend, tile_bytes=tile_bytes)
    for actual, wanted in zip(
        torch.autograd.grad(mixed, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_what_is_not_finite_shows(name: str) -> None:
    """A NaN reaches its own branch, in the branch's own heads, and no other."""
    of = drawn("multi-head", "all")
    of[name][2, 1, 3, 0] = torch.nan
    broken = mix_with_own(**of, backend="tiles").isnan().any(dim=-1)
    assert broken.nonzero().tolist() == [[2, 1, 3]]


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'fused' or 'tiles', not 'flash'"):
        mix_with_own(**drawn("grouped", "all"), backend="flash")  # type: ignore[arg-type]


# --- in a replay --------------------------------------------------------------------------------------------


def _use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replay_attend.mix_with_own

    def with_backend(*args: Any, **kwargs: Any) -> Tensor:
        return given(*args, **{**kwargs, "backend": backend})

    monkeypatch.setattr(replay_attend, "mix_with_own", with_backend)


@pytest.mark.parametrize("variant", FAMILIES)
def test_replays_are_the_same(model_of: Any, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Fused as on a CUDA device, and in tiles; gradients too."""
    model = model_of(variant)
    clean = CleanRun.of(model, *(part[0] for part in prompts("left", length=10)))
    layer, rows = model.cfg.moe_layers[0], clean.has_next.nonzero()[:, 0]
    losses, gradients = [], []
    for backend in BACKENDS:
        with monkeypatch.context() as patch:
            _use(backend, patch)
            losses.append(replay(clean, Branches(layer, single_slots(model.cfg.top_k))).loss[0])
            gradients.append(loss_gradients(clean, rows))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# --- memory -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operation's result lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_never_all_there(backend: Any) -> None:
    """No tensor is larger than a tile or a few of the queries, however many the scores are."""
    n, n_branches, n_heads, d_head, n_keys, tile = 30, 12, 4, 8, 400, 2**17
    of: dict[str, Any] = {
        name: torch.randn(n, n_branches, n_heads, d_head) for name in ("queries", "keys", "values")
    }
    of |= {name: torch.randn(n_keys, n_heads, d_head) for name in ("clean_keys", "clean_values")}
    # Not one after the other: torch's causal mask is a tensor of its own kind, which no dispatch mode lets be made.
    rows = [n_keys - 2 * n + 2 * i for i in range(n)]
    with Largest() as largest:
        mix_with_own(**of, rows=rows, scale=1.0, backend=backend, tile_bytes=tile)
    assert n * n_branches * n_heads * n_keys * 4 > 9 * largest.bytes
    assert largest.bytes <= max(tile, 2 * of["queries"].nbytes)


def test_the_budget_counts_a_tile_once(model_of: Any) -> None:
    """With scores to 4,000 keys, far more branches fit than if each held its own; and a plan keeps to that."""
    model, n_keys = model_of("olmoe"), 4000
    of_scores, copies = SCORE_BYTES * model.cfg.n_heads * n_keys, mixing_bytes(model.cfg, n_keys)
    for budget in (2**22, 2**25, 2**28):
        n = affordable_branches(model, n_keys, budget)
        assert n >= (budget - copies) // branch_bytes(model, n_keys)
        assert n * branch_bytes(model, 0) + min(replay_attend.TILE_BYTES, n * of_scores) + copies <= budget
    assert affordable_branches(model, n_keys, 2**28) > 4 * (2**28 // branch_bytes(model, n_keys))
    assert affordable_branches(model, n_keys, 1) == 0
    assert ReplayPlan.make(model, [(0, 4)], 100, n_keys, 1, True).rows_at_once == 1

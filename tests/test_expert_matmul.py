"""The experts' matmul: both back ends against each other and against one product per slot; slot bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.model import expert_matmul as module
from moe_lens.model.expert_matmul import SlotOrder, expert_matmul

N_EXPERTS, D_IN, D_OUT = 6, 16, 24

# Which experts are chosen, as `[batch, pos, k]`.
CHOICES = {
    "all experts": torch.rand(2, 7, N_EXPERTS, generator=torch.Generator().manual_seed(0)).topk(3).indices,
    "empty experts": torch.tensor([[[1, 4], [4, 1], [1, 4]]]),
    "one expert": torch.full((1, 5, 1), 3),
    "first and last": torch.tensor([[[0], [5]], [[5], [0]]]),
    "a single slot": torch.tensor([[[2]]]),
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def per_slot(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """One vector-matrix product for each slot, in float64."""
    rows = [
        torch.einsum("i,io->o", row.double(), weight[expert].double())
        for row, expert in zip(x, experts.tolist(), strict=True)
    ]
    return torch.stack(rows)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max().clamp(min=1)


def drawn(
    choice: str, dtype: torch.dtype, d_in: int = D_IN, d_out: int = D_OUT
) -> tuple[Tensor, Tensor, SlotOrder, Tensor]:
    """Slot vectors, weights, order, and each sorted slot's expert."""
    indices = CHOICES[choice]
    slots = SlotOrder.of(indices, N_EXPERTS)
    x = torch.randn(indices.numel(), d_in).to(dtype).requires_grad_()
    weight = torch.randn(N_EXPERTS, d_in, d_out).to(dtype).requires_grad_()
    return x, weight, slots, indices.flatten().sort().values


@pytest.mark.parametrize("backend", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_forward_and_gradients(choice: str, dtype: torch.dtype, backend: str) -> None:
    """Products and gradients of every back end equal one product per slot; idle experts get none."""
    x, weight, slots, experts = drawn(choice, dtype)
    out = expert_matmul(x, weight, slots.ends, backend=backend)  # type: ignore[arg-type]
    assert out.dtype == dtype
    assert_near(out, per_slot(x, weight, experts), dtype)

    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, weight), upstream)
    slow_x, slow_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = torch.autograd.grad(
        per_slot(slow_x, slow_weight, experts), (slow_x, slow_weight), upstream.double()
    )
    for actual, wanted in zip(grads, expected, strict=True):
        assert_near(actual, wanted, dtype)
    idle = [expert for expert in range(N_EXPERTS) if expert not in experts]
    assert (grads[1][idle] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_transposed_weights(dtype: torch.dtype) -> None:
    """Weights are stored `[expert, d_out, d_in]` for one of the two products: views work in all back ends."""
    x, _, slots, experts = drawn("all experts", dtype)
    stored = torch.randn(N_EXPERTS, D_OUT, D_IN).to(dtype)
    expected = per_slot(x, stored.transpose(1, 2), experts)
    for backend in ("auto", "grouped", "loop"):
        out = expert_matmul(x, stored.transpose(1, 2), slots.ends, backend=backend)
        assert_near(out, expected, dtype)


@pytest.mark.parametrize("backend", ["auto", "grouped", "loop"])
def test_gradient_of_a_plain_sum(backend: str) -> None:
    """A sum's gradient is expanded from one number, which torch's grouped kernel does not take as it is."""
    x, weight, slots, experts = drawn("all experts", torch.float32)
    expert_matmul(x, weight, slots.ends, backend=backend).sum().backward()  # type: ignore[arg-type]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.detach()[experts].sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 24), (16, 7), (5, 7), (1, 1)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_odd_widths_fall_back(dtype: torch.dtype, d_in: int, d_out: int) -> None:
    """Widths that torch's kernel refuses are multiplied in a loop; asking for the kernel says why not."""
    x, weight, slots, experts = drawn("all experts", dtype, d_in, d_out)
    out = expert_matmul(x, weight, slots.ends)
    assert_near(out, per_slot(x, weight, experts), dtype)
    out.backward(torch.ones_like(out))
    with pytest.raises(ValueError, match="whole multiples of 16 bytes"):
        expert_matmul(x, weight, slots.ends, backend="grouped")


def test_odd_slices_fall_back() -> None:
    """A view that starts at an odd place is no aligned operand, though its width is a good one."""
    x, weight, slots, experts = drawn("all experts", torch.bfloat16)
    shifted = torch.randn(x.numel() + 1).bfloat16()[1:].view_as(x)
    assert_near(
        expert_matmul(shifted, weight, slots.ends), per_slot(shifted, weight, experts), torch.bfloat16
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_float64_goes_through_the_loop(choice: str) -> None:
    x, weight, slots, experts = drawn(choice, torch.float64)
    out, expected = expert_matmul(x, weight, slots.ends), per_slot(x, weight, experts)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    with pytest.raises(ValueError, match=r"in torch\.float64 on cpu"):
        expert_matmul(x, weight, slots.ends, backend="grouped")


# Ways for an operand to lie otherwise than row after row, and for which operands torch's kernel takes them.
VIEWS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "transposed": ("weight", lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "half of wider rows": ("x weight", lambda t: torch.cat((t, t), dim=-1).chunk(2, dim=-1)[1]),
    "odd rows": ("", lambda t: F.pad(t, (0, 1))[..., :-1]),
    "every second column": ("", lambda t: t.repeat_interleave(2, dim=-1)[..., ::2]),
    "one row for all": ("", lambda t: t[..., :1, :].expand(t.shape)),
    "one column for all": ("", lambda t: t[..., :1].expand(t.shape)),
}


@pytest.mark.parametrize("operand", ["x", "weight"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, operand: str) -> None:
    """However an operand lies, forward and backward are right, and the kernel is asked where it can."""
    x, weight, slots, experts = drawn("empty experts", torch.float32)
    takes, look = VIEWS[view]
    viewed: dict[str, Any] = {"x": x, "weight": weight}
    viewed[operand] = look(viewed[operand])
    out = expert_matmul(**viewed, ends=slots.ends)
    expected = per_slot(viewed["x"], viewed["weight"], experts)
    assert_near(out, expected, torch.float32)
    for actual, wanted in zip(
        torch.autograd.grad(out.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        assert_near(actual, wanted.double(), torch.float32)
    if operand in takes.split():
        assert_near(expert_matmul(**viewed, ends=slots.ends, backend="grouped"), expected, torch.float32)
    else:
        with pytest.raises(ValueError, match="whole multiples of 16 bytes"):
            expert_matmul(**viewed, ends=slots.ends, backend="grouped")


def test_experts_an_odd_way_apart() -> None:
    """Rows are aligned within an expert's matrix, and the next expert's begin at an odd place."""
    x, weight, slots, experts = drawn("all experts", torch.bfloat16)
    storage = torch.randn(N_EXPERTS, D_IN * D_OUT + 1).bfloat16()
    weight = storage[:, :-1].view(N_EXPERTS, D_IN, D_OUT)
    assert_near(expert_matmul(x, weight, slots.ends), per_slot(x, weight, experts), torch.bfloat16)
    with pytest.raises(ValueError, match="whole multiples of 16 bytes"):
        expert_matmul(x, weight, slots.ends, backend="grouped")


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_no_slots(backend: Any) -> None:
    """Nothing comes out, and a backward pass gives zeros."""
    slots = SlotOrder.of(torch.zeros(1, 0, 2, dtype=torch.long), N_EXPERTS)
    weight = torch.randn(N_EXPERTS, D_IN, D_OUT, requires_grad=True)
    out = expert_matmul(torch.zeros(0, D_IN), weight, slots.ends, backend=backend)
    assert out.shape == (0, D_OUT)
    assert slots.restore(out).shape == (1, 0, 2, D_OUT)
    out.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


class OnCuda:
    """What is asked of an operand, as a CUDA device's would answer."""

    def __init__(self, tensor: Tensor):
        self.device = torch.device("cuda", 0)
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride
        self.element_size, self.data_ptr = tensor.element_size, tensor.data_ptr


@pytest.mark.parametrize(
    ("capability", "dtype", "takes"),
    [
        ((7, 5), torch.bfloat16, False),
        ((7, 5), torch.float32, False),
        ((8, 0), torch.bfloat16, True),
        ((8, 6), torch.float16, True),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, True),
        ((9, 0), torch.float64, False),
        ((10, 0), torch.bfloat16, True),
    ],
)
def test_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, takes: bool
) -> None:
    """The kernel is asked on devices that have it: compute capability 8.0 and above."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module._has_kernel.cache_clear()
    try:
        assert module._kernel_takes(OnCuda(torch.zeros(4, 16, dtype=dtype))) == takes  # type: ignore[arg-type]
        assert not module._kernel_takes(OnCuda(torch.zeros(4, 5, dtype=dtype)))  # type: ignore[arg-type]
    finally:
        module._has_kernel.cache_clear()


def test_other_devices_have_the_loop() -> None:
    assert module._has_kernel(torch.device("cpu"))
    assert not any(module._has_kernel(torch.device(other)) for other in ("mps", "xpu", "meta"))


def test_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "grouped_mm")
    x, weight, slots, experts = drawn("all experts", torch.float32)
    assert_near(expert_matmul(x, weight, slots.ends), per_slot(x, weight, experts), torch.float32)


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64], ids=str)
def test_auto_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    asked = []
    kernel = F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda *args, **kwargs: asked.append(args) or kernel(*args, **kwargs)
    )
    x, weight, slots, _ = drawn("all experts", dtype)
    expert_matmul(x, weight, slots.ends)
    assert len(asked) == (dtype != torch.float64)


def test_unknown_backend() -> None:
    x, weight, slots, _ = drawn("a single slot", torch.float32)
    with pytest.raises(ValueError, match="backend must be 'auto', 'grouped' or 'loop', not 'fast'"):
        expert_matmul(x, weight, slots.ends, backend="fast")  # type: ignore[arg-type]


# --- where slots go -----------------------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Random expert indices `[batch, pos, k]`, and how many experts there are."""
    n_experts = draw(st.integers(1, 9))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)))
    size = shape[0] * shape[1] * shape[2]
    flat = draw(st.lists(st.integers(0, n_experts - 1), min_size=size, max_size=size))
    return torch.tensor(flat).view(shape), n_experts


properties = settings(max_examples=60, deadline=None, derandomize=True)


@properties
@given(choices())
def test_sort_and_restore_are_inverse(chosen: tuple[Tensor, int]) -> None:
    indices, n_experts = chosen
    slots = SlotOrder.of(indices, n_experts)
    in_places = torch.randn(*indices.shape, 3)
    assert torch.equal(slots.restore(slots.sort(in_places)), in_places)
    in_order = torch.randn(indices.numel(), 3)
    assert torch.equal(slots.sort(slots.restore(in_order)), in_order)


@properties
@given(choices())
def test_groups_hold_their_experts_slots(chosen: tuple[Tensor, int]) -> None:
    """Every expert's group is exactly the slots that chose it, each with its own token's vector."""
    indices, n_experts = chosen
    slots = SlotOrder.of(indices, n_experts)
    batch, pos, k = indices.shape
    x = torch.arange(batch * pos).view(batch, pos, 1).float()
    gathered = slots.gather(x)
    bounds = [0, *slots.ends.tolist()]
    assert bounds[-1] == indices.numel()
    for expert in range(n_experts):
        group = slice(bounds[expert], bounds[expert + 1])
        wanted = (indices.flatten() == expert).nonzero().flatten()
        assert torch.equal(slots.order[group], wanted)
        assert torch.equal(gathered[group, 0], (wanted // k).float())


@properties
@given(choices(), st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(chosen: tuple[Tensor, int], random: Random) -> None:
    """Permuting tokens, or slots within a token, permutes the outputs and nothing else."""
    indices, n_experts = chosen
    weight = torch.randn(n_experts, 8, 8)
    x = torch.randn(*indices.shape[:2], 8)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        slots = SlotOrder.of(indices, n_experts)
        return slots.restore(expert_matmul(slots.gather(x), weight, slots.ends))

    positions = torch.tensor(random.sample(range(indices.shape[1]), indices.shape[1]))
    places = torch.tensor(random.sample(range(indices.shape[2]), indices.shape[2]))
    out = run(x, indices)
    torch.testing.assert_close(run(x[:, positions], indices[:, positions]), out[:, positions])
    torch.testing.assert_close(run(x, indices[..., places]), out[..., places, :])

"""The training loop of the bundled model, fast on a few CPU cores.

The forward and backward passes run in bfloat16, the parameters that the optimizer moves are float32. Three
things make it quick: the tokens of an expert are padded to a multiple of 64, so that the matrix library meets
few shapes and can reuse its kernels; attention over short rows is two plain matrix products; and all matrices of
one shape are orthogonalised together.
"""

import ctypes
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from mini_data import TrainingStream
from transformers import AttentionInterface, AttentionMaskInterface, OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import sdpa_mask

_EXPERT_BLOCK = 64
_WARM_UP_STEPS = 100
LOG_EVERY = 20
SAVE_EVERY = 200


@dataclass(frozen=True)
class Recipe:
    """What decides a training run.

    Attributes:
        steps: Optimizer steps.
        tokens_per_step: Tokens in each.
        context: Tokens in a row.
        long_context: Tokens in a row in the last part of the run.
        long_from: Where that part begins, as a fraction of the steps.
        decay_from: Where the learning rates begin to fall, as a fraction of the steps.
        muon_rate: Learning rate of the orthogonalised updates (attention and expert matrices).
        adam_rate: Learning rate of Adam (embeddings, unembedding, routers, norms).
        weight_decay: Decoupled, for the matrices of attention and experts.
        balance: Factor of the load-balancing loss.
        seed: Of the initial weights and the data's order.
    """

    steps: int
    tokens_per_step: int = 2048
    context: int = 256
    long_context: int = 512
    long_from: float = 0.75
    decay_from: float = 0.2
    muon_rate: float = 7e-3
    adam_rate: float = 1.2e-3
    weight_decay: float = 0.1
    balance: float = 0.01
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rates' factor at a step: a short rise, a plateau, a linear fall to a twentieth."""
        rise = min(1.0, (step + 1) / _WARM_UP_STEPS)
        begin = self.decay_from * self.steps
        fall = max(0.0, (step - begin) / max(1.0, self.steps - begin))
        return rise * (1 - 0.95 * fall)

    def row_length(self, step: int) -> int:
        """Tokens in a row at a step."""
        return self.long_context if step >= self.long_from * self.steps else self.context


def _padded_experts(
    self: torch.nn.Module, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped experts, every group padded to a multiple of _EXPERT_BLOCK rows."""
    tokens, top_k = indices.shape
    chosen = indices.reshape(-1)
    counts = torch.bincount(chosen, minlength=self.num_experts)
    padded = (counts + _EXPERT_BLOCK - 1) // _EXPERT_BLOCK * _EXPERT_BLOCK
    ends = torch.cumsum(padded, 0)
    order = torch.argsort(chosen, stable=True)
    expert = chosen[order]
    rank = torch.arange(tokens * top_k) - (torch.cumsum(counts, 0) - counts)[expert]
    row = rank + (ends - padded)[expert]
    row_of_pair = torch.empty_like(row)
    row_of_pair[order] = row
    source = torch.zeros(int(ends[-1]), dtype=torch.long)
    source[row] = order // top_k
    offsets = ends.int()
    neurons = torch._grouped_mm(hidden.index_select(0, source), self.gate_up_proj.mT, offs=offsets)
    out = torch._grouped_mm(self._apply_gate(neurons), self.down_proj.mT, offs=offsets)
    out = out.index_select(0, row_of_pair).view(tokens, top_k, -1)
    return torch.bmm(weights.unsqueeze(1), out).squeeze(1)


def _short_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention over rows without padding, as two matrix products."""
    length = query.shape[2]
    mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    pattern = torch.softmax(torch.matmul(query * scaling, key.mT) + mask, dim=-1)
    return torch.matmul(pattern, value).transpose(1, 2), None


def build_model(configuration: OlmoeConfig, seed: int) -> OlmoeForCausalLM:
    """A freshly initialised float32 model."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(configuration)


def fast_model(configuration: OlmoeConfig) -> OlmoeForCausalLM:
    """A bfloat16 model that computes with this module's experts and attention."""
    ALL_EXPERTS_FUNCTIONS.register("padded", _padded_experts)
    AttentionInterface.register("short", _short_attention)
    AttentionMaskInterface.register("short", sdpa_mask)
    model = OlmoeForCausalLM(configuration).to(torch.bfloat16)
    model.set_experts_implementation("padded")
    model.set_attn_implementation("short")
    return model.train()


def balance_loss(router_logits: Iterable[torch.Tensor], top_k: int) -> torch.Tensor:
    """The load-balancing loss of every layer by itself, averaged; `top_k` when all loads are equal.

    transformers' own adds up the loads over layers first, under which an expert may be dead in one layer
    as long as its namesakes in the others are busy.
    """
    losses = []
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices
        load = torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]) / len(logits)
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each, by five quintic Newton-Schulz steps (Jordan 2024, Muon)."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        x = 3.4445 * x + torch.bmm(torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x)
    return x.mT if tall else x


class Weights:
    """All parameters in memory that the worker processes share.

    Matrices of one shape lie in one tensor, so that they are updated together. Every shape has a float32 tensor,
    its bfloat16 copy, its momentum, and one gradient tensor for each worker.

    Args:
        model: Where the initial values come from.
        workers: How many processes compute gradients.
    """

    def __init__(self, model: OlmoeForCausalLM, workers: int) -> None:
        self.places: dict[str, tuple[str, int, int]] = {}
        parts: dict[str, list[torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            group, block = "rest", parameter.detach().reshape(-1)
            if ".experts." in name or "_proj." in name:
                rows, columns = parameter.shape[-2:]
                # Gate and up projection lie on top of each other; each is a matrix of its own.
                rows = rows // 2 if name.endswith("gate_up_proj") else rows
                group, block = f"{rows}x{columns}", block.reshape(-1, rows, columns)
            begin = sum(map(len, parts.setdefault(group, [])))
            parts[group].append(block)
            self.places[name] = (group, begin, begin + len(block))
        self.full = {group: torch.cat(blocks).float().share_memory_() for group, blocks in parts.items()}
        self.half = {group: full.bfloat16().share_memory_() for group, full in self.full.items()}
        self.momentum = {group: torch.zeros_like(full).share_memory_() for group, full in self.full.items()}
        # Adam's second moment; Muon has none.
        self.square = torch.zeros_like(self.full["rest"]).share_memory_()
        self.gradients = [
            {group: torch.zeros_like(half).share_memory_() for group, half in self.half.items()}
            for _ in range(workers)
        ]

    def attach(self, fast: OlmoeForCausalLM, worker: int) -> None:
        """Make a bfloat16 model's parameters and gradients views of the shared tensors."""
        for name, parameter in fast.named_parameters():
            group, begin, end = self.places[name]
            parameter.data = self.half[group][begin:end].view(parameter.shape)
            parameter.grad = self.gradients[worker][group][begin:end].view(parameter.shape)

    def write_to(self, model: OlmoeForCausalLM) -> None:
        """Copy the float32 values into a model."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                group, begin, end = self.places[name]
                parameter.copy_(self.full[group][begin:end].view(parameter.shape))

    def state(self) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
        """What a resumed run needs."""
        return {"full": self.full, "momentum": self.momentum, "square": self.square}

    def restore(self, state: dict) -> None:
        """Take up what `state` gave."""
        for group, full in self.full.items():
            full.copy_(state["full"][group])
            self.half[group].copy_(full)
            self.momentum[group].copy_(state["momentum"][group])
        self.square.copy_(state["square"])


@torch.no_grad()
def update(weights: Weights, recipe: Recipe, step: int, worker: int) -> None:
    """One worker's part of an optimizer step: Muon for its share of the matrices, Adam by the first worker.

    Args:
        weights: With every worker's gradients of this step.
        recipe: Learning rates and weight decay.
        step: From 0.
        worker: Which part to do.
    """
    workers = len(weights.gradients)
    factor = recipe.rate(step)
    for group, full in weights.full.items():
        if group == "rest":
            continue
        share = slice(len(full) * worker // workers, len(full) * (worker + 1) // workers)
        gradient = torch.stack([gradients[group][share].float() for gradients in weights.gradients]).mean(0)
        momentum = weights.momentum[group][share]
        momentum.lerp_(gradient, 0.05)
        direction = _orthogonalise(gradient.lerp_(momentum, 0.95))
        rate = recipe.muon_rate * factor
        mine = full[share]
        mine.mul_(1 - rate * recipe.weight_decay)
        mine.add_(direction, alpha=-rate * max(1.0, mine.shape[-2] / mine.shape[-1]) ** 0.5)
        weights.half[group][share].copy_(mine)
    if worker == 0:
        gradient = torch.stack([gradients["rest"].float() for gradients in weights.gradients]).mean(0)
        gradient.mul_(1 / max(1.0, gradient.norm().item()))
        first, second, full = weights.momentum["rest"], weights.square, weights.full["rest"]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square_(), 0.05)
        scale = (second / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-8)
        full.addcdiv_(first, scale, value=-recipe.adam_rate * factor / (1 - 0.9 ** (step + 1)))
        weights.half["rest"].copy_(full)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory; otherwise every step's large tensors are paged in anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(parameter, value)


def _save(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _work(
    worker: int,
    weights: Weights,
    configuration: dict,
    stream: TrainingStream,
    recipe: Recipe,
    out: Path,
    begin: dict,
    barrier,
) -> None:
    """What one process does: its rows of every step, and its part of every update."""
    keep_freed_memory()
    torch.set_num_threads(1)
    fast = fast_model(OlmoeConfig(**configuration))
    weights.attach(fast, worker)
    workers = len(weights.gradients)
    tokens, started = begin["tokens"], time.monotonic() - begin["seconds"]
    sums = torch.zeros(2)
    for step in range(begin["step"], recipe.steps):
        length = recipe.row_length(step)
        read = torch.from_numpy(stream.read(tokens, recipe.tokens_per_step + 1))
        inputs = read[:-1].view(-1, length).chunk(workers)[worker]
        targets = read[1:].view(-1, length).chunk(workers)[worker]
        output = fast.model(inputs, use_cache=False, output_router_logits=True)
        logits = fast.lm_head(output.last_hidden_state).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets.flatten())
        balance = balance_loss(output.router_logits, fast.config.num_experts_per_tok)
        for gradient in weights.gradients[worker].values():
            gradient.zero_()
        (loss + recipe.balance * balance).backward()
        barrier.wait()
        update(weights, recipe, step, worker)
        barrier.wait()
        tokens += recipe.tokens_per_step
        if worker:
            continue
        sums += torch.tensor([loss.item(), balance.item()]) / LOG_EVERY
        progress = {"step": step + 1, "tokens": tokens, "seconds": round(time.monotonic() - started, 1)}
        if (step + 1) % LOG_EVERY == 0:
            line = progress | {"loss": round(sums[0].item(), 4), "balance": round(sums[1].item(), 4)}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            sums.zero_()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            # The other workers only read until the next barrier, so the state is of one piece.
            _save(out / "training.pt", progress | weights.state())


def train(
    model: OlmoeForCausalLM, stream: TrainingStream, recipe: Recipe, out: Path, workers: int
) -> dict[str, float]:
    """Train to the recipe's end, or take up a run that was broken off.

    The checkpoint `out/training.pt` holds weights, optimizer state, step and time; the data's order follows from
    the seed and the tokens read. A run may be taken up with another recipe: the learning rates then follow the new
    one. The log's losses are the first worker's; lines after the last checkpoint are written again.

    Args:
        model: Float32; holds the trained weights afterwards.
        stream: Where tokens are read.
        recipe: The run.
        out: Folder of the checkpoint and of `log.jsonl`, one line for every LOG_EVERY steps.
        workers: How many processes, of one thread each, divide the rows of a step. A divisor of their number.

    Returns:
        `step`, `tokens` and `seconds` over all sittings.

    Raises:
        ValueError: The tokens of a step are no whole number of rows for every worker.
    """
    if recipe.tokens_per_step % (recipe.long_context * workers) or recipe.long_context % recipe.context:
        raise ValueError(
            f"{recipe.tokens_per_step} tokens a step are not whole rows of {recipe.context} and of "
            f"{recipe.long_context} for each of {workers} workers"
        )
    weights = Weights(model, workers)
    begin = restore(weights, out)
    if begin["step"] < recipe.steps:
        with (out / "log.jsonl").open("a") as file:
            file.write(
                json.dumps({"recipe": asdict(recipe), "from": begin["step"], "workers": workers}) + "\n"
            )
        barrier = multiprocessing.get_context("spawn").Barrier(workers)
        arguments = (weights, model.config.to_diff_dict(), stream, recipe, out, begin, barrier)
        multiprocessing.spawn(_work, arguments, nprocs=workers)
    progress = restore(weights, out)
    weights.write_to(model)
    return progress


def progress_of(out: Path) -> dict[str, float]:
    """How far `out/training.pt` is: `step`, `tokens` and `seconds`, all 0 where there is none."""
    checkpoint = out / "training.pt"
    state = torch.load(checkpoint, weights_only=True, mmap=True) if checkpoint.exists() else {}
    return {key: state.get(key, 0) for key in ("step", "tokens", "seconds")}


def restore(weights: Weights, out: Path) -> dict[str, float]:
    """Read `out/training.pt`, if there is one, and say how far it is."""
    checkpoint = out / "training.pt"
    if checkpoint.exists():
        weights.restore(torch.load(checkpoint, weights_only=True))
    return progress_of(out)

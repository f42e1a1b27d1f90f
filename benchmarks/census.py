"""What a census costs: exact replay against one hooked full forward pass per ablation in transformers.

Two models in OLMoE's shape with random weights: 8 layers at 128 tokens, and 16 layers at 512; d_model 512, 32 experts
of width 512, top-8. In one run: the time of a transformers forward pass with a hook that takes one expert away at one
position, with the loss read there (the median of several, spread over layers); the time of a complete census, table
included; their ratio per ablation; and the achieved FLOP/s as a share of the matmul peak that this machine shows in the
same run. A sample of the census's rows is checked against the hooked passes before anything is reported. Then the
peak memory, each budget in a process of its own.

    python benchmarks/census.py [--threads 2] [--quick]
    python benchmarks/census.py --olmoe         on a CUDA device: OLMoE-1B-7B's shapes, random weights, bfloat16
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE
from moe_lens.audit import Census, census
from moe_lens.interventions import CleanRun
from moe_lens.interventions.branches import single_slots
from moe_lens.interventions.replay import Branches, replay

TARGETS = {(8, 128): 300, (16, 512): 800}
PEAK_SHARE, PEAK_SHARE_CUDA = 0.75, 0.30


def config(n_layers: int) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_experts=32,
        num_experts_per_tok=8,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_checkpoint(directory: str, n_layers: int) -> None:
    torch.manual_seed(0)
    OlmoeForCausalLM(config(n_layers)).save_pretrained(directory)


def tokens_of(n_tokens: int, d_vocab: int = 1024) -> torch.Tensor:
    return torch.randint(0, d_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(0))


@contextmanager
def without_expert(hf: Any, layer: int, position: int, expert: int) -> Iterator[None]:
    """Transformers' model, with one expert's routing weight set to zero at one position."""

    def remove(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, indices, weights = inputs
        weights = weights.clone()
        weights[position, indices[position] == expert] = 0
        return hidden, indices, weights

    handle = hf.model.layers[layer].mlp.experts.register_forward_pre_hook(remove)
    try:
        yield
    finally:
        handle.remove()


def loss_at(hf: Any, tokens: torch.Tensor, position: int) -> torch.Tensor:
    logits = hf(tokens, use_cache=False).logits[0, position].float()
    return F.cross_entropy(logits[None], tokens[0, position + 1][None])


def matmul_peak(dtype: torch.dtype, device: str, size: int) -> float:
    """The best FLOP/s of a few square matmuls."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        best = max(best, 2 * size**3 / seconds_of(lambda: a @ b, device))
    return best


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall seconds of a run, the work of a CUDA device included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def useful_flops(cfg: Any, n_tokens: int) -> float:
    """Of the ablations alone: matrices of the later layers, attention to visible keys, predictions; no clean runs."""
    branches = (n_tokens - 1) * cfg.top_k
    depth = cfg.n_layers * (cfg.n_layers - 1) / 2
    return branches * (depth * layer_flops(cfg, n_tokens) + cfg.n_layers * 2 * cfg.d_model * cfg.d_vocab)


def layer_flops(cfg: Any, n_tokens: int) -> float:
    """Of a layer, for each token of a document: its matrices, and attention to the keys that the mean token sees."""
    d_heads = cfg.n_heads * cfg.d_head
    d_keys = cfg.n_key_value_heads * cfg.d_head
    return (
        2 * cfg.d_model * (2 * d_heads + 2 * d_keys)
        + 4 * d_heads * (n_tokens / 2)
        + 2 * cfg.d_model * cfg.n_experts
        + cfg.top_k * 6 * cfg.d_model * cfg.d_expert
    )


def check(hf: Any, tokens: torch.Tensor, table: Census, n: int = 8) -> tuple[float, float]:
    """The largest |replay - hooked pass| over a sample of rows, and the median seconds of a hooked pass."""
    rows = table.to_pandas().sample(n, random_state=0)
    clean = {p: float(loss_at(hf, tokens, p)) for p in rows.position.unique()}
    errors, seconds = [], []
    for row in rows.itertuples():
        with without_expert(hf, row.layer, row.position, row.expert):
            start = time.perf_counter()
            loss = float(loss_at(hf, tokens, row.position))
            seconds.append(time.perf_counter() - start)
        errors.append(abs(loss - clean[row.position] - row.delta_loss))
    return max(errors), float(np.median(seconds))


def side_by_side(n_layers: int, n_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        make_checkpoint(directory, n_layers)
        hf = OlmoeForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()
        model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
        tokens = tokens_of(n_tokens)
        census(model, tokens[:, :17])  # warm
        peak = matmul_peak(torch.float32, "cpu", 2048)
        start = time.perf_counter()
        table = census(model, tokens)
        seconds = time.perf_counter() - start
        peak = max(peak, matmul_peak(torch.float32, "cpu", 2048))
        error, per_pass = check(hf, tokens, table)
    per_ablation = seconds / len(table)
    share = useful_flops(model.cfg, n_tokens) / seconds / peak
    print(f"{n_layers} layers, {n_tokens} tokens: {len(table):,} ablations")
    print(f"  largest error of 8 sampled rows against hooked passes    {error:.1e} nats")
    print(f"  transformers, one hooked pass                            {1e3 * per_pass:.1f} ms")
    print(f"  census, per ablation                                     {1e3 * per_ablation:.3f} ms")
    print(f"  census, ablations per second                             {1 / per_ablation:,.0f}")
    print(
        f"  ratio per ablation                                       {per_pass / per_ablation:,.0f}"
        f"   (to reach {TARGETS[n_layers, n_tokens]})"
    )
    print(
        f"  share of the matmul peak ({peak / 1e9:.0f} GFLOP/s)   {share:.0%}   (to reach {PEAK_SHARE:.0%})"
    )


def measure_memory(directory: str, gib: float) -> None:
    """In a process of its own: what a replay adds to the peak of memory."""
    model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
    tokens = tokens_of(512)[0]
    clean = CleanRun.of(model, tokens)
    slots, layer = single_slots(model.cfg.top_k), model.cfg.n_layers - 2
    rows = clean.has_next.nonzero()[:, 0]
    replay(clean, [Branches(layer, slots)], rows=rows[:1])  # warm
    before = _reset_peak()
    start = time.perf_counter()
    replay(clean, [Branches(layer, slots)], rows=rows, memory_budget=int(gib * 2**30))
    seconds = time.perf_counter() - start
    added = (_peak() - before) / 2**10
    print(f"  {1024 * gib:10,.0f} {added:12,.0f} {len(rows) * len(slots) / seconds:14,.0f}")


def _reset_peak() -> int:
    """Let the peak of resident memory begin anew from what is held now (Linux); KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def memory(threads: int) -> None:
    print("memory at several budgets (8 layers, 512 tokens, the changes of the last layer but one;")
    print("on a CPU no more is taken than fits the caches, whatever the budget)")
    print(f"  {'budget MiB':>10} {'added MiB':>12} {'ablations/s':>14}")
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory, 8)
        for gib in (1 / 64, 1 / 16, 1 / 4, 1):
            command = [sys.executable, __file__, "--memory-of", directory, "--gib", str(gib)]
            subprocess.run([*command, "--threads", str(threads)], check=True)


@torch.no_grad()
def olmoe_on_cuda(n_tokens: int = 512, n_documents: int = 4) -> None:
    """OLMoE-1B-7B's exact shapes, random weights, bfloat16: ablations per second, share of peak, time for a corpus."""
    # Transformers' defaults are OLMoE-1B-7B's but for the experts' width, of which it has twice as much.
    cfg = OlmoeConfig(intermediate_size=1024)
    with tempfile.TemporaryDirectory() as directory:
        with torch.device("cuda"):
            torch.manual_seed(0)
            OlmoeForCausalLM._from_config(cfg, dtype=torch.bfloat16).save_pretrained(directory)
        model = HookedMoE.from_pretrained(directory, device="cuda", verbose=False)
    tokens = torch.cat([tokens_of(n_tokens, model.cfg.d_vocab)] * n_documents)
    census(model, tokens[:1, :65], noise_samples=0)  # warm
    peak = matmul_peak(torch.bfloat16, "cuda", 8192)
    for gib in (2, 8, 32):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        table: Census | None = None

        def run(gib: int = gib) -> None:
            nonlocal table
            table = census(model, tokens, memory_budget=gib * 2**30, noise_samples=0)

        seconds = seconds_of(run, "cuda")
        assert table is not None
        share = useful_flops(model.cfg, n_tokens) * n_documents / seconds / peak
        added = (torch.cuda.max_memory_allocated() - held) / 2**30
        rate = len(table) / seconds
        hours = 280_000 * model.cfg.n_layers * model.cfg.top_k / rate / 3600
        print(
            f"OLMoE-1B-7B's shapes, bfloat16, {n_documents} x {n_tokens} tokens, budget {gib} GiB (added {added:.1f}): "
            f"{rate:,.0f} ablations/s, {share:.0%} of the bfloat16 peak ({peak / 1e12:.0f} TFLOP/s; to reach "
            f"{PEAK_SHARE_CUDA:.0%}); 280,000 tokens would take {hours:.1f} h"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the smaller model alone")
    parser.add_argument("--olmoe", action="store_true", help="on CUDA, in OLMoE-1B-7B's shapes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--gib", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments.gib)
        return
    if arguments.olmoe:
        olmoe_on_cuda()
        return
    print(
        f"float32, {arguments.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}"
    )
    for n_layers, n_tokens in list(TARGETS)[: 1 if arguments.quick else None]:
        side_by_side(n_layers, n_tokens)
    memory(arguments.threads)


if __name__ == "__main__":
    main()

"""Whether torch.compile would pay: the pieces of a layer that lie between two hook points, compiled and as they are.

A layer of OLMoE-1B-7B's shapes (d_model 2048, 64 experts of width 1024, top-8, 16 heads of 128), random weights, one
document. Between neighbouring hook points there is mostly one matrix product, which compiling does not make faster, or
a piece of elementwise arithmetic, which it may: these are timed, each on its own, compiled and as it is, in interleaved
rounds. Beside each stands what all its calls in a layer take of the layer's time, and what compiling would save of it:
share times (1 - ratio). A ratio is the median over rounds of (compiled / as it is), with quartiles; seconds are the
process's own CPU time on a CPU, and wall time on a CUDA device. Compiled pieces are checked equal first; the seconds of
compiling are printed too.

    python benchmarks/compiled.py [--rounds 15] [--tokens 512] [--dtype bfloat16] [--device cpu] [--threads 1]

It takes a C++ compiler on a CPU, Triton on a CUDA device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from streamed import config_of
from torch import Tensor, nn
from transformers import OlmoeConfig

from moe_lens.converters.loading import convert_config
from moe_lens.model.attend import Attend
from moe_lens.model.block import Block
from moe_lens.model.norm import rms_scale

Piece = tuple[Callable[..., Tensor], tuple[Any, ...], int]


def small_config() -> OlmoeConfig:
    return OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
    )


def block_of(config: OlmoeConfig, dtype: torch.dtype, device: str) -> Block:
    cfg = convert_config(config, name="olmoe", dtype=dtype, device=device)
    torch.manual_seed(0)
    with torch.device(device):
        block = Block(cfg, 0).to(dtype).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    return block


def pieces_of(block: Block, attend: Attend, x: Tensor) -> dict[str, Piece]:
    """What lies between hook points: a function, what it is given in this layer, and how often a layer does it."""
    mlp: Any = block.mlp
    attn: Any = block.attn
    values: dict[str, Tensor] = {}

    def keep(name: str, point: Any, inputs: Any, value: Tensor) -> None:
        values[name] = value.clone()

    named: dict[str, Any] = {
        "scale": block.ln2.hook_scale,
        "mid": block.hook_resid_mid,
        "q": attn.hook_q,
        "logits": mlp.hook_router_logits,
        "probabilities": mlp.hook_expert_weights,
        "weights": mlp.hook_routing_weights,
        "pre": mlp.hook_expert_pre,
        "pre_linear": mlp.hook_expert_pre_linear,
        "out": mlp.hook_expert_out,
        "contrib": mlp.hook_expert_contrib,
    }
    handles = [point.register_forward_hook(partial(keep, name)) for name, point in named.items()]
    block(x, attend)
    for handle in handles:
        handle.remove()
    pre, pre_linear = (values[name].flatten(0, 2) for name in ("pre", "pre_linear"))
    top_k = mlp.cfg.top_k
    return {
        "norm's scale": (lambda x: rms_scale(x, 1e-5), (x,), 2),
        "norm: division by the scale": (
            lambda x, scale: (x.float() / scale).to(x.dtype),
            (x, values["scale"]),
            2,
        ),
        "norm's gain": (lambda w, x: w * x, (block.ln2.w, x), 2),
        "rotation": (attend.rotation.__call__, (values["q"],), 2),
        "router's softmax": (lambda logits: logits.float().softmax(dim=-1), (values["logits"],), 1),
        "choice": (lambda p: p.topk(top_k, dim=-1).indices, (values["probabilities"],), 1),
        "act(pre) * pre_linear": (lambda a, b: mlp.act_fn(a) * b, (pre, pre_linear), 1),
        "contributions": (
            lambda w, out: (w[..., None] * out).to(out.dtype),
            (values["weights"], values["out"]),
            1,
        ),
        "sum over slots": (lambda contrib: contrib.sum(dim=2), (values["contrib"],), 1),
        "residual sum": (lambda a, b: a + b, (values["mid"], x), 2),
    }


def timer(device: str) -> Callable[[Callable[[], Any]], float]:
    def timed(run: Callable[[], Any]) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    return timed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny layer: that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    block = block_of(small_config() if arguments.small else config_of(1), dtype, device)
    cfg = convert_config(small_config() if arguments.small else config_of(1), name="olmoe")
    x = torch.randn(1, arguments.tokens, cfg.d_model, device=device).to(dtype)
    attend = Attend(cfg.rotary, (1, arguments.tokens), x.device)
    pieces, seconds_of = pieces_of(block, attend, x), timer(device)

    compiled: dict[str, Callable[..., Tensor]] = {}
    for name, (piece, given, _) in pieces.items():
        start = time.perf_counter()
        compiled[name] = torch.compile(piece, dynamic=True)
        got, expected = compiled[name](*given).float(), piece(*given).float()
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= (1e-5 if dtype == torch.float32 else 2e-2):
            raise AssertionError(f"{name}: compiled it differs by {error:.1e} relative")
        print(f"{name}: {time.perf_counter() - start:.1f} s to compile")

    plain: dict[str, list[float]] = {name: [] for name in pieces}
    fast: dict[str, list[float]] = {name: [] for name in pieces}
    whole: list[float] = []
    for _ in range(arguments.rounds):
        whole.append(seconds_of(lambda: block(x, attend)))
        for name, (piece, given, _) in pieces.items():
            plain[name].append(seconds_of(lambda piece=piece, given=given: piece(*given)))
            fast[name].append(seconds_of(lambda name=name, given=given: compiled[name](*given)))

    layer = np.array(whole)
    print(
        f"\nOLMoE layer of {arguments.tokens} tokens, {arguments.dtype}, {device}, {arguments.threads} threads, torch "
        f"{torch.__version__}, {arguments.rounds} rounds: {1e3 * np.median(layer):.1f} ms"
    )
    print(f"{'':30} {'ms':>8} {'ratio':>7} {'25%':>6} {'75%':>6} {'of layer':>9} {'saves':>7}")
    total = 0.0
    for name, (_, _, times) in pieces.items():
        before, after = np.array(plain[name]), np.array(fast[name])
        low, ratio, high = np.percentile(after / before, [25, 50, 75])
        share, saves = np.median(times * before / layer), np.median(times * (before - after) / layer)
        total += max(0.0, float(saves))
        print(
            f"{name:30} {1e3 * np.median(before):8.2f} {ratio:7.2f} {low:6.2f} {high:6.2f} {share:9.1%} {saves:7.1%}"
        )
    print(f"{'all that are faster':30} {'':>8} {'':>7} {'':>6} {'':>6} {'':>9} {total:7.1%}")


if __name__ == "__main__":
    main()

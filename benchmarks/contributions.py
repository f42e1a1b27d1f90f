"""What explaining costs: routing contributions beside the plain forward pass of the same tokens, in one run.

An 8-layer OLMoE with d_model 512 and 32 experts of width 256, top-8, random weights, at 8 documents of 128 tokens.
One plain forward pass through the blocks = 1. Every row is a pass that listens (`ContributionAccumulator`), with all
five measures, lead and rest, all tokens and active ones, standard errors, and the check that scores sum to the
logits; the accumulators are made once and used again, as in a run over a corpus. Rounds are interleaved; each ratio is
the median over rounds of (this / forward in the same round) - 1.

Beside the time stand the matrix products alone, counted: they are what no implementation can leave out.

    python benchmarks/contributions.py [--rounds 15] [--threads 2] [--dtype float32]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers import logging as transformers_logging

from moe_lens import HookedMoE
from moe_lens.routing.streaming import ContributionAccumulator

DOCUMENTS, LENGTH = 8, 128

RUNS = {
    "layers": dict(by="layer"),
    "heads": dict(by="head"),
    "experts": dict(by="expert"),
    "layers, heads and experts": dict(by=("layer", "head", "expert")),
    "neurons": dict(by="neuron"),
    "source pairs by position": dict(by="source", max_positions=LENGTH),
    "source pairs by offset": dict(by="source", max_positions=LENGTH, source_axis="offset"),
}
TO_REACH = {
    "layers, heads and experts": 0.6,
    "neurons": 0.6,
    "source pairs by position": 0.5,
    "source pairs by offset": 1.2,
}
LIMITS = {
    "layers": "one product with all later readouts for each layer; passes over [token, receiver, expert] scores",
    "heads": "a product with W_O R^T for each head, and each head's vector for its norm",
    "experts": "every slot's output through all later readouts",
    "layers, heads and experts": "the experts' product with the readouts, then passes over scores",
    "neurons": "passes over [slot, neuron] activations, and per document over [receiver, neuron] means",
    "source pairs by position": "explicit attention (the fused kernel shows no pattern), and [head, q, p] passes",
    "source pairs by offset": "one [q, p] table of diagonals for each head and receiver: no product gives it",
}


def make_checkpoint(directory: str, dtype: torch.dtype) -> None:
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_experts=32,
        num_experts_per_tok=8,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).to(dtype).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="some of the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = arguments.only or list(RUNS)

    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        make_checkpoint(directory, getattr(torch, arguments.dtype))
        model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
        tokens = torch.randint(0, 1024, (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(0))

        def forward() -> None:
            model(tokens, return_type=None)

        accumulators = {name: ContributionAccumulator(model, **RUNS[name]) for name in names}  # type: ignore[arg-type]

        def listening(name: str) -> Callable[[], None]:
            def run() -> None:
                with accumulators[name].listening(tokens, None):
                    model(tokens, return_type=None)

            return run

        runs = {"plain forward": forward, **{name: listening(name) for name in names}}
        flops = {name: products(run) for name, run in runs.items()}
        for run in runs.values():
            run()  # The first run makes the neurons' tables.
        for name in names:
            error = max(tally.completeness_error for tally in accumulators[name].tallies.values())
            if not error <= 1e-5:
                raise AssertionError(f"{name}: scores miss the logits by {error:.1e}")

        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)

    print(
        f"8-layer OLMoE, d_model 512, 32 experts of 256 top-8, {DOCUMENTS} x {LENGTH} tokens, {arguments.dtype}, "
        f"{arguments.threads} threads, torch {torch.__version__}, {platform.machine()}, {arguments.rounds} rounds"
    )
    base, base_flops = np.array(seconds["plain forward"]), flops["plain forward"]
    print(f"plain forward: {1e3 * np.median(base):.0f} ms, {base_flops / 1e9:.1f} GFLOP in matrix products\n")
    print(
        f"{'on top of the forward':28} {'time':>6} {'25%':>6} {'75%':>6} {'to reach':>9} {'products':>9}  limited by"
    )
    for name in names:
        extra = np.array(seconds[name]) / base - 1
        low, middle, high = np.percentile(extra, [25, 50, 75])
        wanted = f"+{TO_REACH[name]:.2f}" if name in TO_REACH else ""
        more = flops[name] / base_flops - 1
        print(f"{name:28} {middle:+6.2f} {low:+6.2f} {high:+6.2f} {wanted:>9} {more:+9.2f}  {LIMITS[name]}")


def products(run: Callable[[], None]) -> int:
    """Floating-point operations of a run's matrix products."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}
    ) as counter:
        run()
    return counter.get_total_flops()


def grouped_flops(first: tuple[int, ...], second: tuple[int, ...], *args: object, **kwargs: object) -> int:
    """Of torch's grouped matmul, which its counter does not know: every row (or column) is of one group."""
    return 2 * first[0] * first[1] * second[-1]


if __name__ == "__main__":
    main()

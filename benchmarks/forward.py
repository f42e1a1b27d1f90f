"""What looking costs: forward passes side by side, in one run, on one machine.

A 4-layer OLMoE with d_model 512 and 16 experts of width 512, top-4, random weights, at 8 x 128 tokens: the
same checkpoint in transformers (sdpa, its grouped experts), in HookedMoE (plain; caching all routing hooks;
caching every expert's contribution too), and in TransformerLens's TransformerBridge (plain; caching). All
outputs are checked equal before anything is timed. Rounds are interleaved, so that a drift of the machine's
speed falls on all alike; each ratio is the median over rounds of (this / transformers in the same round).

    python benchmarks/forward.py [--rounds 15] [--threads 2] [--dtype float32]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE

ROUTING_POINTS = ("hook_router_logits", "hook_expert_weights", "hook_expert_indices", "hook_routing_weights")
SCALES = ("ln1.hook_scale", "ln2.hook_scale", "ln_final.hook_scale")


def routing_hooks(model: HookedMoE) -> list[str]:
    """Every routing quantity and every RMSNorm scale."""
    return [name for name in model.hook_dict if name.endswith(ROUTING_POINTS + SCALES)]


def contribution_hooks(model: HookedMoE) -> list[str]:
    """The routing hooks, and what each expert adds to the residual stream."""
    return routing_hooks(model) + [name for name in model.hook_dict if name.endswith("hook_expert_contrib")]


def make_checkpoint(directory: str, dtype: torch.dtype) -> None:
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).to(dtype).save_pretrained(directory)


def bridge_of(directory: str, dtype: torch.dtype) -> torch.nn.Module | None:
    """The same checkpoint in a TransformerBridge, or None where it cannot be made."""
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(directory, dtype=dtype, device="cpu")
    except Exception as error:
        print(f"TransformerBridge could not be made here: {type(error).__name__}: {error}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        make_checkpoint(directory, dtype)
        hf = OlmoeForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
        model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
        tokens = torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
        routing, contributions = routing_hooks(model), contribution_hooks(model)

        runs: dict[str, Callable[[], torch.Tensor]] = {
            "transformers (sdpa)": lambda: hf(tokens, use_cache=False).logits,
            "HookedMoE, plain": lambda: model(tokens),
            "HookedMoE, routing cached": lambda: model.run_with_cache(tokens, names_filter=routing)[0],
            "HookedMoE, contributions cached": lambda: model.run_with_cache(
                tokens, names_filter=contributions
            )[0],
            "HookedMoE, every hook cached": lambda: model.run_with_cache(tokens)[0],
        }
        bridge = bridge_of(directory, dtype)
        if bridge is not None:
            runs["TransformerBridge, plain"] = lambda: bridge(tokens)
            runs["TransformerBridge, every hook cached"] = lambda: bridge.run_with_cache(tokens)[0]

        expected = hf(tokens).logits
        tolerance = 2e-5 if dtype == torch.float32 else 5e-2
        for name, run in runs.items():
            error = ((run() - expected).abs().max() / expected.abs().max()).item()
            if error > tolerance:
                raise AssertionError(f"{name} differs from transformers by {error:.2e} relative")

        seconds = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)

    print(
        f"4-layer OLMoE, d_model 512, 16 experts top-4, 8 x 128 tokens, {arguments.dtype}, "
        f"{arguments.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {arguments.rounds} interleaved rounds"
    )
    base = np.array(seconds["transformers (sdpa)"])
    targets = {
        "HookedMoE, plain": 1.05,
        "HookedMoE, routing cached": 1.10,
        "HookedMoE, contributions cached": 1.25,
    }
    print(f"{'':38} {'ms':>8} {'ratio':>7} {'25%':>6} {'75%':>6} {'to reach':>9}")
    for name, values in seconds.items():
        ratio = np.array(values) / base
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        wanted = f"{targets[name]:.2f}" if name in targets else ""
        print(f"{name:38} {1e3 * np.median(values):8.1f} {middle:7.3f} {low:6.3f} {high:6.3f} {wanted:>9}")


if __name__ == "__main__":
    main()

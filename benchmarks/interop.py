"""What it costs to look at a model where it is held: in transformers, in a TransformerBridge, in nnsight.

A 4-layer OLMoE with d_model 512 and 16 experts of width 512, top-4, random weights, at 8 x 128 tokens, one loaded
transformers model that all but HookedMoE run. Everything is checked equal before anything is timed. Rounds are
interleaved, so that a drift of the machine's speed falls on all alike; each ratio is the median over rounds of (this /
its base in the same round): the plain transformers forward, and for analyses also the same one on a HookedMoE.

Then bytes: what each analysis of nnsight sends and gets, for OLMoE-1B-7B and Qwen3-30B-A3B at their real shapes and
8 x 128 tokens. Payloads are made, not sent, and need no weights; what comes back is counted from its shapes, before
compression. Beside it the bytes of the values that the analysis reads, which would come back if it were made here.

    python benchmarks/interop.py [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import nnsight
import numpy as np
import torch
import transformers
from forward import bridge_of, make_checkpoint
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_lens import HookedMoE
from moe_lens.interop import nnsight as in_nnsight
from moe_lens.interop import transformer_lens as on_bridge
from moe_lens.interop import transformers as on_transformers
from moe_lens.interop.nnsight.cache import value_bytes
from moe_lens.interop.nnsight.model import structure_of
from moe_lens.interventions import Ablate, run_with_interventions
from moe_lens.routing import router_logit_attrs, routing_contributions
from moe_lens.routing.attribution import attribution_hooks

POINTS = ("hook_router_logits", "hook_expert_indices", "hook_routing_weights")
CONTRIBUTIONS = (*POINTS, "hook_expert_contrib")
RECEIVER = 3
N_ABLATIONS = 8

FULL_SIZE: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": dict(model_type="olmoe", torch_dtype="bfloat16"),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        torch_dtype="bfloat16",
    ),
}


def ending(points: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: name.endswith(points)


def tokenizer() -> PreTrainedTokenizerFast:
    """nnsight wants one; tokens are given as numbers here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")), pad_token="x")


def ablations() -> list[Ablate]:
    """Slots of the choice at one token: each is active whatever the weights."""
    return [Ablate(ranks=1 + i % 4, layers=i // 4, pos=60) for i in range(N_ABLATIONS)]


def agree(name: str, ours: Tensor, expected: Tensor) -> None:
    error = float((ours - expected).abs().max() / expected.abs().max())
    if not error < 2e-5:
        raise AssertionError(f"{name} differs by {error:.1e} relative")


def check(hf: Any, model: HookedMoE, lm: TransformersModel, bridge: Any, tokens: Tensor) -> None:
    """The same numbers everywhere, before anything is timed."""
    _, expected = model.run_with_cache(tokens)
    caches = {"nnsight": in_nnsight.routing_cache(lm, tokens)}
    with on_transformers.attach(hf) as attached:
        _, caches["attach"] = attached.run_with_cache(tokens)
    if bridge is not None:
        with on_bridge.attach(bridge):
            _, caches["bridge"] = bridge.run_with_cache(tokens)
    for where, cache in caches.items():
        for layer in range(4):
            for point in CONTRIBUTIONS:
                name = f"blocks.{layer}.mlp.{point}"
                agree(f"{where}: {name}", cache[name].float(), expected[name].float())
    for by in ("layer", "head", "expert"):
        here = router_logit_attrs(model, expected, receiver=RECEIVER, by=by).values
        agree(by, in_nnsight.router_logit_attrs(lm, tokens, receiver=RECEIVER, by=by).values, here)


def runs(
    hf: Any, model: HookedMoE, lm: TransformersModel, bridge: Any, tokens: Tensor
) -> dict[str, tuple[Callable[[], Any], str | None]]:
    """What is timed, each with the name of the run on a HookedMoE that does the same."""

    def empty_trace() -> None:
        with lm.trace({"input_ids": tokens}):
            nnsight.save(lm.lm_head.output)

    def attached(run: Callable[[Any], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            with on_transformers.attach(hf) as attached:
                return run(attached)

        return timed

    def on_attached_bridge(run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            with on_bridge.attach(bridge):
                return run()

        return timed

    def attrs(by: str) -> Any:
        _, cache = model.run_with_cache(
            tokens, names_filter=attribution_hooks(model, [RECEIVER], by=by), stop_at_layer=RECEIVER + 1
        )
        return router_logit_attrs(model, cache, receiver=RECEIVER, by=by)

    def hooked_ablations() -> None:
        model(tokens, return_type="loss", loss_per_token=True)
        for spec in ablations():
            run_with_interventions(model, tokens, spec, return_type="loss", loss_per_token=True)

    timed: dict[str, tuple[Callable[[], Any], str | None]] = {
        "transformers, plain": (lambda: hf(tokens, use_cache=False).logits, None),
        "HookedMoE, plain": (lambda: model(tokens), None),
        "HookedMoE, contributions cached": (
            lambda: model.run_with_cache(tokens, names_filter=ending(CONTRIBUTIONS)),
            None,
        ),
        "attach, nobody listens": (attached(lambda model: model(tokens, use_cache=False)), None),
        "attach, contributions cached": (
            attached(lambda model: model.run_with_cache(tokens, use_cache=False)),
            "HookedMoE, contributions cached",
        ),
        "nnsight, trace of the logits": (empty_trace, None),
        "nnsight, routing cached": (
            lambda: in_nnsight.routing_cache(lm, tokens, names_filter=ending(POINTS)),
            None,
        ),
        "nnsight, contributions cached": (
            lambda: in_nnsight.routing_cache(lm, tokens, names_filter=ending(CONTRIBUTIONS)),
            "HookedMoE, contributions cached",
        ),
    }
    if bridge is not None:
        timed["TransformerBridge, plain"] = lambda: bridge(tokens), None
        timed["TransformerBridge attached, contributions cached"] = (
            on_attached_bridge(lambda: bridge.run_with_cache(tokens, names_filter=ending(CONTRIBUTIONS))),
            "HookedMoE, contributions cached",
        )
    for by in ("layer", "head", "expert"):
        timed[f"HookedMoE, router_logit_attrs by {by}"] = (lambda by=by: attrs(by), None)
        timed[f"nnsight, router_logit_attrs by {by}"] = (
            lambda by=by: in_nnsight.router_logit_attrs(lm, tokens, receiver=RECEIVER, by=by),
            f"HookedMoE, router_logit_attrs by {by}",
        )
    for by in ("layer", "head", "expert"):
        timed[f"HookedMoE, routing_contributions by {by}"] = (
            lambda by=by: routing_contributions(model, tokens, by=by),
            None,
        )
        timed[f"nnsight, routing_contributions by {by}"] = (
            lambda by=by: in_nnsight.routing_contributions(lm, tokens, by=by),
            f"HookedMoE, routing_contributions by {by}",
        )
    timed[f"HookedMoE, clean and {N_ABLATIONS} ablated runs"] = hooked_ablations, None
    timed[f"nnsight, ablate {N_ABLATIONS}"] = (
        lambda: in_nnsight.ablate(lm, tokens, ablations()),
        f"HookedMoE, clean and {N_ABLATIONS} ablated runs",
    )
    return timed


def print_times(seconds: dict[str, list[float]], bases: dict[str, str | None]) -> None:
    plain = np.array(seconds["transformers, plain"])
    print(f"{'':50} {'ms':>8} {'x plain':>8} {'25%':>6} {'75%':>6} {'x HookedMoE':>12}")
    for name, values in seconds.items():
        low, middle, high = np.percentile(np.array(values) / plain, [25, 50, 75])
        base = bases[name]
        beside = "" if base is None else f"{np.median(np.array(values) / np.array(seconds[base])):.2f}"
        print(f"{name:50} {1e3 * np.median(values):8.1f} {middle:8.2f} {low:6.2f} {high:6.2f} {beside:>12}")


def print_bytes(name: str, settings: dict[str, Any]) -> None:
    """Of one batch of a model at its real shapes."""
    tokens = torch.randint(4, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        AutoConfig.for_model(**settings).save_pretrained(directory)
        lm = TransformersModel(directory, task="text-generation", tokenizer=tokenizer(), dtype=torch.bfloat16)
    structure = structure_of(lm)
    routers = structure.cfg.moe_layers

    def line(
        what: str, values: list[str] | None, function: Any, tokens: Tensor, *args: Any, **more: Any
    ) -> None:
        planned = in_nnsight.plan(function, lm, tokens, *args, remote="local", **more)
        read = "" if values is None else f"{value_bytes(structure, values, tuple(tokens.shape)):,}"
        print(f"{name + ', ' + what:50} {planned.bytes_up:10,} {planned.bytes_down:14,} {read:>16}")

    for points in (POINTS, CONTRIBUTIONS):
        wanted = structure.matching_hooks(ending(points))
        what = f"cache of {points[-1].removeprefix('hook_')}"
        line(what, wanted, in_nnsight.routing_cache, tokens, names_filter=wanted)
    for by in ("layer", "head", "expert"):
        needed = attribution_hooks(structure, routers[-1:], by=by)
        function = in_nnsight.router_logit_attrs
        line(f"attrs by {by}, 32 tokens", needed, function, tokens[:1, :32], receiver=routers[-1], by=by)
    for by in ("layer", "head", "expert"):
        needed = attribution_hooks(structure, routers, by=by)
        line(f"contributions by {by}", needed, in_nnsight.routing_contributions, tokens, by=by)
    specs = [Ablate(ranks=1 + i % 8, layers=i % 16, pos=60) for i in range(100)]
    line("100 ablations", None, in_nnsight.ablate, tokens, specs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        make_checkpoint(directory, torch.float32)
        hf = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
        lm = TransformersModel(hf, tokenizer=tokenizer())
        bridge = bridge_of(directory, torch.float32)
        tokens = torch.randint(1, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
        check(hf, model, lm, bridge, tokens)
        timed = runs(hf, model, lm, bridge, tokens)
        for run, _ in timed.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(arguments.rounds):
            for name, (run, _) in timed.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)

    print(
        f"4-layer OLMoE, d_model 512, 16 experts top-4, 8 x 128 tokens, float32, {arguments.threads} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, nnsight {nnsight.__version__}, "
        f"{platform.machine()}, {arguments.rounds} interleaved rounds"
    )
    print_times(seconds, {name: base for name, (_, base) in timed.items()})
    print(f"\n{'bytes of 8 x 128 tokens, bfloat16':50} {'up':>10} {'down':>14} {'of the values':>16}")
    for name, settings in FULL_SIZE.items():
        print_bytes(name, settings)


if __name__ == "__main__":
    main()

"""The whole field in one table: the same questions asked with four tools, in one run, on one machine.

    transformers + hooks     torch hooks on a transformers model, and the arithmetic written out by hand
    TransformerBridge        TransformerLens's bridge, with what it offers
    nnsight                  traces of a transformers model, and the same arithmetic by hand
    moe_lens                 this package

An 8-layer OLMoE with d_model 512 and 32 experts of width 256, top-8, random weights, 8 documents of 128 tokens,
float32. What is asked:

    plain forward            the logits
    routing values           every router's logits, and every slot's contribution, kept
    decomposition            of every sender (embedding, layers, heads, experts) the variance over experts of its score
                             at every later router, averaged over the documents' tokens but the first
    1,024 ablations          one expert at one token, the loss read there: 16 tokens of one document, all active
                             experts of all layers. The other tools need a forward pass for each: a sample of them is
                             run, and its time multiplied
    loading                  from a directory that lies in the page cache

Answers are checked equal before anything is timed. Rounds are interleaved; a figure is the median over rounds of what
this took beside what transformers + hooks took in the same round: less than 1 is faster. A tool without a figure does
not offer what is asked.

    python benchmarks/peers.py [--rounds 7] [--threads 2]
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
import torch.nn.functional as F
import transformers
from census import loss_at, without_expert
from einops import einsum, rearrange, repeat
from interop import tokenizer
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE
from moe_lens.interventions import CleanRun
from moe_lens.interventions.branches import single_slots
from moe_lens.interventions.replay import Branches, replay
from moe_lens.routing import routing_contributions

N_LAYERS, N_HEADS, N_EXPERTS, TOP_K = 8, 8, 32, 8
POSITIONS = range(20, 100, 5)
SAMPLE = 16
Values = dict[str, Tensor]


def make_checkpoint(directory: str) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
    )
    OlmoeForCausalLM(config).save_pretrained(directory)


# ---- routing values ----


def contributions_of(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """g_i E_i(x) `[token, k, d]`: the layer's experts again, each slot as a token of one expert."""
    slots = experts(
        repeat(x, "token d -> (token k) d", k=TOP_K),
        rearrange(indices, "token k -> (token k) 1"),
        rearrange(weights, "token k -> (token k) 1"),
    )
    return rearrange(slots, "(token k) d -> token k d", k=TOP_K)


def with_hooks(hf: Any, tokens: Tensor, whole: bool = False) -> Values:
    """Routing values by torch hooks; with `whole`, also what the decomposition reads."""
    values: Values = {}
    handles = []

    def keep(module: Any, name: str, pick: Callable[[Any, Any], Tensor]) -> None:
        handles.append(
            module.register_forward_hook(
                lambda m, inputs, output: values.update({name: pick(inputs, output)})
            )
        )

    def keep_slots(layer: int) -> Callable[..., None]:
        def hook(experts: Any, inputs: Any, output: Any) -> None:
            x, indices, weights = inputs
            values[f"indices {layer}"] = indices
            # Its forward, past the hooks.
            values[f"slots {layer}"] = contributions_of(experts.forward, x, indices, weights)

        return hook

    for number, layer in enumerate(hf.model.layers):
        keep(layer.mlp.gate, f"logits {number}", lambda inputs, output: output[0])
        handles.append(layer.mlp.experts.register_forward_hook(keep_slots(number)))
        if whole:
            keep(layer.self_attn.o_proj, f"z {number}", lambda inputs, output: inputs[0])
            keep(layer.self_attn.o_proj, f"A{number}", lambda inputs, output: output)
            keep(layer.post_attention_layernorm, f"mid {number}", lambda inputs, output: inputs[0])
            keep(layer.mlp, f"M{number}", lambda inputs, output: output)
    if whole:
        keep(hf.model.embed_tokens, "embed", lambda inputs, output: output)
    try:
        hf(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return values


def with_nnsight(lm: TransformersModel, tokens: Tensor, whole: bool = False) -> Values:
    """The same in a trace."""
    with lm.trace({"input_ids": tokens}):
        values = nnsight.save({})
        if whole:
            values["embed"] = lm.model.embed_tokens.output
        for number in range(N_LAYERS):
            layer = lm.model.layers[number]
            if whole:
                values[f"z {number}"] = layer.self_attn.o_proj.input
                values[f"A{number}"] = layer.self_attn.o_proj.output
                values[f"mid {number}"] = layer.post_attention_layernorm.input
            values[f"logits {number}"] = layer.mlp.gate.output[0]
            x, indices, weights = layer.mlp.experts.inputs[0]
            values[f"indices {number}"] = indices
            values[f"slots {number}"] = contributions_of(layer.mlp.experts, x, indices, weights)
            if whole:
                values[f"M{number}"] = layer.mlp.output
    return values


def with_moe_lens(model: HookedMoE, tokens: Tensor) -> Any:
    points = ("hook_router_logits", "hook_expert_contrib", "hook_expert_indices")
    return model.run_with_cache(tokens, names_filter=lambda name: name.endswith(points))[1]


# ---- decomposition ----


def variances(hf: Any, values: Values) -> dict[str, Tensor]:
    """Of every sender its score's variance over experts at every later router, `[receiver]`, by hand."""
    batch, pos = values["embed"].shape[:2]
    found: dict[str, list[Tensor]] = {}

    def add(name: str, scores: Tensor) -> None:
        found.setdefault(name, []).append(scores.var(dim=-1, unbiased=False)[:, 1:].mean())

    for receiver in range(N_LAYERS):
        norm = hf.model.layers[receiver].post_attention_layernorm
        readout = hf.model.layers[receiver].mlp.gate.weight * norm.weight
        scale = (values[f"mid {receiver}"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        add("embed", values["embed"] @ readout.T / scale)
        for layer in range(receiver + 1):
            add(f"A{layer}", values[f"A{layer}"] @ readout.T / scale)
            z = rearrange(values[f"z {layer}"], "b p (head d) -> b p head d", head=N_HEADS)
            W_O = rearrange(
                hf.model.layers[layer].self_attn.o_proj.weight, "m (head d) -> head d m", head=N_HEADS
            )
            folded = einsum(W_O, readout, "head d m, expert m -> head d expert")
            heads = einsum(z, folded, "b p head d, head d expert -> head b p expert") / scale
            for head in range(N_HEADS):
                add(f"A{layer}H{head}", heads[head])
            if layer == receiver:
                continue
            add(f"M{layer}", values[f"M{layer}"].reshape(batch, pos, -1) @ readout.T / scale)
            slots = rearrange(values[f"slots {layer}"] @ readout.T, "(b p) k expert -> b p k expert", b=batch)
            per_slot = (slots / scale[:, :, None]).var(dim=-1, unbiased=False)
            indices = rearrange(values[f"indices {layer}"], "(b p) k -> b p k", b=batch)
            of_experts = per_slot.new_zeros(batch, pos, N_EXPERTS).scatter_(-1, indices, per_slot)
            means = of_experts[:, 1:].mean(dim=(0, 1))
            for expert in range(N_EXPERTS):
                found.setdefault(f"M{layer}E{expert}", []).append(means[expert])
    return {name: torch.stack(of_receivers) for name, of_receivers in found.items()}


def decomposed(model: HookedMoE, tokens: Tensor) -> Any:
    return routing_contributions(model, tokens, by=["layer", "head", "expert"])


# ---- ablations ----


def ablations(model: HookedMoE, document: Tensor) -> Any:
    """1,024 of them, exactly: 16 tokens, 8 layers, 8 active experts."""
    clean = CleanRun.of(model, document[0])
    branches = [Branches(layer, single_slots(TOP_K)) for layer in range(N_LAYERS)]
    return replay(clean, branches, rows=torch.tensor(list(POSITIONS)), null_branch=False)


def sampled(cache: Any) -> list[tuple[int, int, int, int]]:
    """(layer, place among the positions, slot, expert) of a sample spread over all."""
    every = [
        (layer, i, slot) for layer in range(N_LAYERS) for i in range(len(POSITIONS)) for slot in range(TOP_K)
    ]
    chosen = every[7 :: len(every) // SAMPLE][:SAMPLE]
    indices = [cache[f"blocks.{layer}.mlp.hook_expert_indices"][0] for layer in range(N_LAYERS)]
    return [(layer, i, slot, int(indices[layer][POSITIONS[i], slot])) for layer, i, slot in chosen]


def hooked_losses(hf: Any, document: Tensor, sample: list[tuple[int, int, int, int]]) -> Tensor:
    losses = []
    for layer, i, _, expert in sample:
        with without_expert(hf, layer, POSITIONS[i], expert):
            losses.append(loss_at(hf, document, POSITIONS[i]))
    return torch.stack(losses)


def traced_losses(lm: TransformersModel, document: Tensor, sample: list[tuple[int, int, int, int]]) -> Tensor:
    losses = []
    for layer, i, _, expert in sample:
        position = POSITIONS[i]
        with lm.trace({"input_ids": document}):
            x, indices, weights = lm.model.layers[layer].mlp.experts.inputs[0]
            weights = weights.clone()
            weights[position, indices[position] == expert] = 0
            lm.model.layers[layer].mlp.experts.inputs = ((x, indices, weights), {})
            logits = nnsight.save(lm.lm_head.output)
        losses.append(F.cross_entropy(logits[0, position][None], document[0, position + 1][None]))
    return torch.stack(losses)


# ---- the table ----


def agree(what: str, ours: Tensor, expected: Tensor) -> None:
    error = float((ours - expected).abs().max() / expected.abs().max())
    if not error < 2e-5:
        raise AssertionError(f"{what} differs by {error:.1e} relative")


def check(hf: Any, lm: TransformersModel, bridge: Any, model: HookedMoE, tokens: Tensor) -> list[Any]:
    """The same answers from all, before anything is timed; and the sample of ablations."""
    logits, cache = model.run_with_cache(tokens)
    agree("bridge", bridge(tokens), logits)
    by_hand = {"hooks": with_hooks(hf, tokens, whole=True), "nnsight": with_nnsight(lm, tokens, whole=True)}
    results = decomposed(model, tokens)
    for tool, values in by_hand.items():
        for layer in range(N_LAYERS):
            flat = cache[f"blocks.{layer}.mlp.hook_expert_contrib"].flatten(0, 1)
            agree(f"{tool}: contributions of layer {layer}", values[f"slots {layer}"], flat)
        for name, found in variances(hf, values).items():
            by = "expert" if "E" in name else "head" if "H" in name else "layer"
            ours = torch.from_numpy(results[by].variance["rest"][results[by].senders.index(name)])
            agree(f"{tool}: variance of {name}", found.double(), ours[~ours.isnan()])
    sample = sampled(cache)
    replayed = ablations(model, tokens[:1]).outcomes["loss"]
    exact = torch.stack([replayed[layer][i, slot] for layer, i, slot, _ in sample])
    agree("hooked ablations", hooked_losses(hf, tokens[:1], sample), exact)
    agree("traced ablations", traced_losses(lm, tokens[:1], sample), exact)
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        make_checkpoint(directory)
        seconds = measure(directory, arguments.rounds)
    print(
        f"8-layer OLMoE, d_model 512, 32 experts of 256 top-8, 8 x 128 tokens, float32, {arguments.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, nnsight {nnsight.__version__}, "
        f"{platform.machine()}, {arguments.rounds} interleaved rounds; beside transformers + hooks (25% to 75%)"
    )
    tools = ("transformers + hooks", "TransformerBridge", "nnsight", "moe_lens")
    print(f"{'':18}" + "".join(f"{tool:>30}" for tool in tools))
    for row, of_tools in seconds.items():
        base = np.array(of_tools[tools[0]])
        cells = []
        for tool in tools:
            if tool not in of_tools:
                cells.append("")
                continue
            low, middle, high = np.percentile(np.array(of_tools[tool]) / base, [25, 50, 75])
            is_base = tool == tools[0]
            cells.append(
                f"1 ({np.median(base):.2f} s)" if is_base else f"{middle:.3g} ({low:.3g} to {high:.3g})"
            )
        print(f"{row:18}" + "".join(f"{cell:>30}" for cell in cells))


def measure(directory: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by row and tool."""
    words = tokenizer()

    def load_nnsight() -> TransformersModel:
        return TransformersModel(directory, task="text-generation", tokenizer=words, dispatch=True)

    def load_bridge() -> Any:
        return TransformerBridge.boot_transformers(directory, dtype=torch.float32, device="cpu")

    hf = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    lm, bridge = TransformersModel(hf, tokenizer=words), load_bridge()
    model = HookedMoE.from_pretrained(directory, device="cpu", verbose=False)
    tokens = torch.randint(1, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
    sample = check(hf, lm, bridge, model, tokens)

    def trace() -> None:
        with lm.trace({"input_ids": tokens}):
            nnsight.save(lm.lm_head.output)

    rows: dict[str, dict[str, Callable[[], Any]]] = {
        "plain forward": {
            "transformers + hooks": lambda: hf(tokens, use_cache=False).logits,
            "TransformerBridge": lambda: bridge(tokens),
            "nnsight": trace,
            "moe_lens": lambda: model(tokens),
        },
        "routing values": {
            "transformers + hooks": lambda: with_hooks(hf, tokens),
            "nnsight": lambda: with_nnsight(lm, tokens),
            "moe_lens": lambda: with_moe_lens(model, tokens),
        },
        "decomposition": {
            "transformers + hooks": lambda: variances(hf, with_hooks(hf, tokens, whole=True)),
            "nnsight": lambda: variances(hf, with_nnsight(lm, tokens, whole=True)),
            "moe_lens": lambda: decomposed(model, tokens),
        },
        "1,024 ablations": {
            "transformers + hooks": lambda: hooked_losses(hf, tokens[:1], sample),
            "nnsight": lambda: traced_losses(lm, tokens[:1], sample),
            "moe_lens": lambda: ablations(model, tokens[:1]),
        },
        "loading": {
            "transformers + hooks": lambda: OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32),
            "TransformerBridge": load_bridge,
            "nnsight": load_nnsight,
            "moe_lens": lambda: HookedMoE.from_pretrained(directory, device="cpu", verbose=False),
        },
    }
    times = {"1,024 ablations": 1024 / SAMPLE}
    seconds: dict[str, dict[str, list[float]]] = {row: {tool: [] for tool in of} for row, of in rows.items()}
    for _ in range(rounds):
        for row, of_tools in rows.items():
            for tool, run in of_tools.items():
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                seconds[row][tool].append(took * (1.0 if tool == "moe_lens" else times.get(row, 1.0)))
    return seconds


if __name__ == "__main__":
    main()

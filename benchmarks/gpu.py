"""What a CUDA device makes of it: forward, contributions and census at OLMoE-1B-7B's full shapes, in one run.

OLMoE-1B-7B-0924's shapes (16 layers, d_model 2048, 64 experts of width 1024, top-8) with random weights in bfloat16,
made on the device; about 20 GB of its memory, of which transformers' model and HookedMoE share what they can.

    forward          transformers (sdpa, its grouped_mm experts) and HookedMoE, 8 x 512 tokens: tokens/s, and the share
                     of the matmul peak, which is that of large square products in the same rounds
    contributions    routing contributions by layer, and by layer, head and expert: time beside the plain forward pass
    census           every active expert of every layer, one at a time, at the tokens of a document: ablations/s, the
                     share of the peak (useful operations alone, counted from shapes), and the time of an ablation
                     beside that of one hooked forward pass in transformers
    loading          with --directory, which must lie on a disk: a checkpoint of these shapes is written there (14 GB,
                     deleted afterwards) and loaded onto the device; beside it, the time of reading the same files and
                     dropping what was read. The page cache is emptied of them before each

Answers are checked before anything is timed: logits against transformers', scores against the logits that they add up
to, a sample of the census against hooked passes. Rounds are interleaved, so that a drift of the device's speed falls on
all alike; a figure is the median over rounds with quartiles, a ratio is of times in the same round. All of it, with the
device, the versions and the commit, goes to benchmarks/results/DEVICE-DATE.json.

    python benchmarks/gpu.py [--rounds 9] [--directory DIR]       on a machine with a CUDA device
    python benchmarks/gpu.py --small                              tiny, anywhere: that it runs; its figures mean nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from census import check, layer_flops, matmul_peak, seconds_of, useful_flops
from load_memory import write_checkpoint
from streamed import config_of, drop_from_page_cache, require_disk
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE
from moe_lens.audit import Census, census
from moe_lens.interop.shared_weights import hooked_view
from moe_lens.routing.streaming import ContributionAccumulator

RESULTS = Path(__file__).parent / "results"
CONTRIBUTIONS = {"layers": "layer", "layers, heads and experts": ("layer", "head", "expert")}
TRANSFORMERS, PLAIN = "forward, transformers grouped_mm", "forward, HookedMoE"
READ_BYTES = 2**26

Seconds = dict[str, list[float]]


def small_config() -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=0,
    )


def models_of(config: OlmoeConfig, dtype: torch.dtype, device: str) -> tuple[Any, HookedMoE]:
    """Random weights made on the device: transformers' model, and a HookedMoE on the same."""
    torch.manual_seed(0)
    with torch.device(device):
        hf = OlmoeForCausalLM._from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
    model = hooked_view(hf)
    for block in model.blocks:
        # As `from_pretrained` lays them out; as views of transformers' they would lie transposed.
        experts: Any = block.mlp.experts  # type: ignore[union-attr]
        experts.W_down = nn.Parameter(experts.W_down.detach().contiguous())
    return hf, model


def require_equal(hf: Any, model: HookedMoE, tokens: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of logits beside the largest logit.

    Raises:
        AssertionError: it is more than rounding.
    """
    expected, logits = hf(tokens, use_cache=False).logits, model(tokens)
    error = float((logits - expected).abs().max() / expected.abs().max())
    if not error <= (2e-5 if dtype == torch.float32 else 5e-2):
        raise AssertionError(f"HookedMoE differs from transformers by {error:.1e} relative")
    return error


def contribution_run(model: HookedMoE, by: Any, tokens: Tensor) -> Callable[[], None]:
    """A pass that listens. The accumulator is made once, as for a corpus; its scores are checked in the first pass.

    Raises:
        AssertionError: they do not add up to the logits.
    """
    accumulator = ContributionAccumulator(model, by=by)

    def run() -> None:
        with accumulator.listening(tokens, None):
            model(tokens, return_type=None)

    run()
    accumulator.require_closed()
    return run


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: str
) -> tuple[Seconds, dict[str, int]]:
    """Seconds of every round, after one that does not count; and on CUDA the bytes that each adds to the peak."""
    seconds: Seconds = {name: [] for name in runs}
    added: dict[str, int] = {}
    for name, run in runs.items():
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        run()
        if device != "cpu":
            added[name] = torch.cuda.max_memory_allocated() - held
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds, added


def quartiles(values: Any) -> dict[str, float]:
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return {"median": float(middle), "25%": float(low), "75%": float(high)}


def on_device(
    config: OlmoeConfig, dtype: torch.dtype, device: str, shape: tuple[int, int], rounds: int, peak_size: int
) -> dict[str, Any]:
    """Forward, contributions and census.

    Args:
        shape: documents and tokens of each; the census is of the first document.
        peak_size: rows and columns of the square products that show the peak.
    """
    hf, model = models_of(config, dtype, device)
    cfg, (documents, length) = model.cfg, shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.d_vocab, shape, generator=generator).to(device)
    table: Census | None = None
    peaks: list[float] = []

    def take_census() -> None:
        nonlocal table
        free = 2**31 if device == "cpu" else torch.cuda.mem_get_info()[0]
        table = census(model, tokens[:1], noise_samples=0, memory_budget=free // 2)

    error = require_equal(hf, model, tokens, dtype)
    runs: dict[str, Callable[[], Any]] = {
        "peak": lambda: peaks.append(matmul_peak(dtype, device, peak_size)),
        TRANSFORMERS: lambda: hf(tokens, use_cache=False).logits,
        PLAIN: lambda: model(tokens),
        "blocks, HookedMoE": lambda: model(tokens, return_type=None),
        **{
            f"contributions, {name}": contribution_run(model, by, tokens)
            for name, by in CONTRIBUTIONS.items()
        },
        "census": take_census,
    }
    seconds, added = interleaved(runs, rounds, device)
    assert table is not None
    census_error, hooked_pass = check(hf, tokens[:1], table)
    if dtype == torch.float32 and not census_error <= 1e-4:
        raise AssertionError(f"the census differs from hooked passes by {census_error:.1e} nats")

    peak, n_tokens = max(peaks), documents * length
    forward_flops = n_tokens * (cfg.n_layers * layer_flops(cfg, length) + 2 * cfg.d_model * cfg.d_vocab)
    times = {name: np.array(values) for name, values in seconds.items()}
    rows: dict[str, Any] = {"matmul peak, FLOP/s": {"best": peak, **quartiles(peaks[1:])}}
    for name in (TRANSFORMERS, PLAIN):
        rows[f"{name}, tokens/s"] = quartiles(n_tokens / times[name])
        rows[f"{name}, share of the peak"] = quartiles(forward_flops / times[name] / peak)
    rows["forward, HookedMoE / transformers"] = quartiles(times[PLAIN] / times[TRANSFORMERS])
    for name in CONTRIBUTIONS:
        over = times[f"contributions, {name}"] / times["blocks, HookedMoE"] - 1
        rows[f"contributions, {name}, on top of the forward"] = quartiles(over)
    rows["census, ablations/s"] = quartiles(len(table) / times["census"])
    rows["census, share of the peak"] = quartiles(useful_flops(cfg, length) / times["census"] / peak)
    rows["census, ratio of a hooked pass to an ablation"] = quartiles(
        hooked_pass * len(table) / times["census"]
    )
    return {
        "rows": rows,
        "seconds": seconds,
        "bytes added to the peak of memory": added,
        "checked": {"logits, relative": error, "census, nats": census_error, "ablations": len(table)},
    }


def raw_read(directory: Path) -> float:
    """Seconds in which all weight files are read, and dropped."""
    buffer = bytearray(READ_BYTES)
    start = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def loading(config: OlmoeConfig, directory: Path, device: str, rounds: int) -> dict[str, Any]:
    """Loading from a disk, beside reading the same files."""
    # What was measured before may still be held in cycles.
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        checkpoint = Path(inside) / "checkpoint"
        n_bytes = write_checkpoint(config, checkpoint, sharded=True)
        os.sync()
        seconds: Seconds = {"read": [], "load": []}
        for _ in range(rounds):
            drop_from_page_cache(checkpoint)
            seconds["read"].append(raw_read(checkpoint))
            drop_from_page_cache(checkpoint)
            start = time.perf_counter()
            model = HookedMoE.from_pretrained(checkpoint, device=device, verbose=False)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds["load"].append(time.perf_counter() - start)
            del model
            if device != "cpu":
                torch.cuda.empty_cache()
    read, load = np.array(seconds["read"]), np.array(seconds["load"])
    rows = {
        "reading the files, bytes/s": quartiles(n_bytes / read),
        "loading, bytes/s": quartiles(n_bytes / load),
        "loading / reading": quartiles(load / read),
    }
    return {"rows": rows, "seconds": seconds, "bytes": n_bytes}


# --- what was run -------------------------------------------------------------------------------------------


def provenance(device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Device, versions and commit."""
    facts: dict[str, Any] = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch.")}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device memory, bytes": properties.total_memory,
            "compute capability": list(torch.cuda.get_device_capability(0)),
            "cuda": torch.version.cuda,
        }
    packages = ("torch", "transformers", "transformer-lens", "numpy", "safetensors")
    return facts | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {package: version(package) for package in packages},
        "rounds": rounds,
    }


def device_name(device: str) -> str:
    return f"CPU {platform.machine()}" if device == "cpu" else torch.cuda.get_device_name(0)


def commit() -> str | None:
    """Of the working tree, with `+` where files differ from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def results_path(name: str, date: str) -> Path:
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{date[:10]}.json"


def print_rows(rows: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'':64} {'median':>10} {'25%':>10} {'75%':>10}")
    for name, values in rows.items():
        figures = " ".join(f"{values[of]:10.3g}" for of in ("median", "25%", "75%"))
        print(f"{name:64} {figures}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="on a disk, for the loading rows; 14 GB are written")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU where there is no CUDA")
    parser.add_argument("--output", type=Path, help="where the JSON goes; of --small nowhere else")
    arguments = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not arguments.small:
        parser.exit(2, "there is no CUDA device here; --small runs tiny shapes on the CPU\n")
    transformers.logging.set_verbosity_error()
    device = "cuda" if has_cuda else "cpu"
    small = arguments.small
    config = small_config() if small else config_of(16)
    dtype = torch.bfloat16 if has_cuda else torch.float32
    shape, peak_size = ((2, 24), 256) if small else ((8, 512), 8192)
    if arguments.directory is not None and not small:
        print(f"{arguments.directory}: {require_disk(arguments.directory)}")

    facts = provenance(device, dtype, arguments.rounds)
    facts["model"] = {"OLMoE": config.to_diff_dict(), "documents": shape[0], "tokens of each": shape[1]}
    print(
        f"{facts['device']}, {facts['dtype']}, torch {torch.__version__}, {arguments.rounds} interleaved rounds"
    )
    results = {"measured": facts, **on_device(config, dtype, device, shape, arguments.rounds, peak_size)}
    print_rows(results["rows"])
    for name, n_bytes in results["bytes added to the peak of memory"].items():
        print(f"{name}: {n_bytes / 2**30:.2f} GiB added to the peak")
    if arguments.directory is not None:
        results["loading"] = loading(config, arguments.directory, device, min(3, arguments.rounds))
        print_rows(results["loading"]["rows"])
    output = arguments.output
    if output is None and has_cuda and not small:
        output = results_path(facts["device"], facts["date"])
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {output}")


if __name__ == "__main__":
    main()

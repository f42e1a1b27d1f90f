"""What loading takes: peak memory against the weights, watched from outside, and speed.

An OLMoE-shaped checkpoint of about 1 GB (random bfloat16, hub layout: one tensor per expert matrix) is written
to a temporary directory on disk, once in shards and once as one file. Each row loads it in a process of its own
with `HookedMoE.from_pretrained`, while this process reads /proc/PID/status every 10 ms and, at the end, the
kernel's own high-water mark (reset after the imports).

RSS counts everything resident: RssAnon is the program's own memory, RssFile the pages of mapped files (the
libraries, and the shard that is being read; the kernel can drop these), RssShmem memory shared as tmpfs is.
The process's imports (Python, torch, transformers, moe_lens) come before any weight; columns named `over imports`
have that baseline subtracted, the others have not. To reach: peak RSS over imports at most 1.15 times the weights.
Files are in the page cache when they are read, so MB/s is the loader's speed and not the disk's.

    python benchmarks/load_memory.py [--gigabytes 1.0]     (Linux only; exits 1 when the aim is missed)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig

AIM = 1.15
SAMPLE_EVERY_SECONDS = 0.01
MB = 1e6

LOADER = """
import sys, time
import torch, moe_lens, moe_lens.converters
print("imported", flush=True)
sys.stdin.readline()
start = time.perf_counter()
dtype = None if sys.argv[2] == "None" else getattr(torch, sys.argv[2])
model = moe_lens.HookedMoE.from_pretrained(sys.argv[1], dtype=dtype, device="cpu", verbose=False)
seconds = time.perf_counter() - start
print(seconds, sum(p.numel() * p.element_size() for p in model.parameters()), flush=True)
sys.stdin.readline()
"""


# --- the checkpoint -----------------------------------------------------------------------------------------


def config_of(gigabytes: float) -> OlmoeConfig:
    """OLMoE's proportions at d_model 1024, with as many layers as the size asks for."""
    d_model, d_expert, n_experts, d_vocab = 1024, 512, 32, 50304
    per_layer = 3 * n_experts * d_expert * d_model + 4 * d_model**2
    n_layers = max(1, round((gigabytes * 1e9 / 2 - 2 * d_vocab * d_model) / per_layer))
    return OlmoeConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=d_expert,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=n_experts,
        num_experts_per_tok=8,
        dtype=torch.bfloat16,
    )


def tensors_of(config: OlmoeConfig) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors in groups: embeddings, then layer by layer."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.02).bfloat16()

    d, width = config.hidden_size, config.intermediate_size
    yield {
        "model.embed_tokens.weight": random(config.vocab_size, d),
        "lm_head.weight": random(config.vocab_size, d),
        "model.norm.weight": random(d),
    }
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        group = {f"{at}self_attn.{name}_proj.weight": random(d, d) for name in "qkvo"}
        group |= {f"{at}self_attn.{name}_norm.weight": random(d) for name in "qk"}
        group |= {f"{at}{name}_layernorm.weight": random(d) for name in ("input", "post_attention")}
        group[f"{at}mlp.gate.weight"] = random(config.num_experts, d)
        for expert in range(config.num_experts):
            group[f"{at}mlp.experts.{expert}.gate_proj.weight"] = random(width, d)
            group[f"{at}mlp.experts.{expert}.up_proj.weight"] = random(width, d)
            group[f"{at}mlp.experts.{expert}.down_proj.weight"] = random(d, width)
        yield group


def write_checkpoint(config: OlmoeConfig, directory: Path, *, sharded: bool) -> int:
    """Write it, and return the bytes of its weight files. In shards, a group is in memory at a time."""
    torch.manual_seed(0)
    directory.mkdir()
    config.save_pretrained(directory)
    if not sharded:
        save_file(
            {name: value for group in tensors_of(config) for name, value in group.items()},
            directory / "model.safetensors",
        )
    else:
        weight_map, n_groups = {}, 1 + config.num_hidden_layers
        for number, group in enumerate(tensors_of(config), start=1):
            file = f"model-{number:05d}-of-{n_groups:05d}.safetensors"
            save_file(group, directory / file)
            weight_map |= dict.fromkeys(group, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


# --- watching -----------------------------------------------------------------------------------------------


def memory_of(pid: int) -> dict[str, float]:
    """The memory lines of /proc/PID/status, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
    pairs = (line.split(":") for line in lines if line.startswith(wanted))
    return {name: int(value.split()[0]) * 1024 / MB for name, value in pairs}


@dataclass
class Watch:
    """Samples a process until stopped; keeps the peak of every line."""

    pid: int
    peaks: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        for name, value in memory_of(self.pid).items():
            self.peaks[name] = max(self.peaks.get(name, 0.0), value)


@dataclass
class Row:
    layout: str
    dtype: str
    weights: float
    file: float
    imports: dict[str, float]
    peaks: dict[str, float]
    seconds: float

    @property
    def peak(self) -> float:
        """The kernel's high-water mark; the sampled peak is never above it but for rounding."""
        return max(self.peaks["VmHWM"], self.peaks["VmRSS"])

    @property
    def over_imports(self) -> float:
        return (self.peak - self.imports["VmRSS"]) / self.weights


def load_and_watch(directory: Path, layout: str, dtype: str, file_bytes: int) -> Row:
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER, str(directory), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "imported"
        time.sleep(0.2)
        imports = memory_of(process.pid)
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark starts anew from here
        with Watch(process.pid) as watch:
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, weight_bytes = process.stdout.readline().split()
        return Row(
            layout, dtype, int(weight_bytes) / MB, file_bytes / MB, imports, watch.peaks, float(seconds)
        )
    finally:
        process.stdin.close()
        process.wait(timeout=60)


# --- the table ----------------------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    header = (
        "layout",
        "dtype",
        "weights MB",
        "imports MB",
        "peak RSS / weights",
        "peak RSS over imports / weights",
        "peak RssAnon / weights",
        "peak RssAnon over imports / weights",
        "peak RssFile over imports MB",
        "peak RssShmem MB",
        "seconds",
        "file MB/s",
    )
    print(" | ".join(header))
    print(" | ".join("---" for _ in header))
    for row in rows:
        peaks, imports = row.peaks, row.imports
        cells = (
            row.layout,
            row.dtype,
            f"{row.weights:.0f}",
            f"{imports['VmRSS']:.0f}",
            f"{row.peak / row.weights:.3f}",
            f"{row.over_imports:.3f}",
            f"{peaks['RssAnon'] / row.weights:.3f}",
            f"{(peaks['RssAnon'] - imports['RssAnon']) / row.weights:.3f}",
            f"{peaks['RssFile'] - imports['RssFile']:.0f}",
            f"{peaks['RssShmem']:.0f}",
            f"{row.seconds:.2f}",
            f"{row.file / row.seconds:.0f}",
        )
        print(" | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint, in bfloat16")
    arguments = parser.parse_args()
    config = config_of(arguments.gigabytes)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ("shards", "one file"):
            directory = Path(scratch) / layout.replace(" ", "_")
            file_bytes = write_checkpoint(config, directory, sharded=layout == "shards")
            rows += [load_and_watch(directory, layout, dtype, file_bytes) for dtype in ("None", "float32")]
    print_table(rows)
    worst = max(row.over_imports for row in rows)
    print(f"\npeak RSS over imports: at most {worst:.3f} times the weights; the aim is {AIM}")
    raise SystemExit(0 if worst <= AIM else 1)


if __name__ == "__main__":
    main()

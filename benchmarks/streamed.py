"""A checkpoint larger than memory: what a streamed model takes beside the same model in memory.

A checkpoint in OLMoE-1B-7B's full shape (16 layers, 64 experts, 14 GB in bfloat16, random weights, hub layout) is
written to a directory on disk, and a corpus of 4,096 tokens (8 documents of 512) goes through it, resident and
streamed:

    losses           the next-token loss of every token
    contributions    `routing_contributions` by layer, head and expert, all receivers
    metrics          the expert metrics, all layers
    census           every active expert at 16 sampled tokens changed, one at a time: 2,048 ablations

Each run is a process of its own, one after another, and before each the checkpoint's pages are dropped from the page
cache, so that both read from the disk. This process reads the memory of the running one from /proc/PID/status every
20 ms: RssAnon + RssShmem is what it holds itself; VmHWM, printed beside, also counts pages of mapped files, which the
kernel may drop. The seconds are of loading and running together. Results are checked equal.

To reach: streamed at most 4 GB (RssAnon + RssShmem) where the resident run takes 15; at most 1.25 times its time.

    python benchmarks/streamed.py [--layers 16] [--tasks losses contributions metrics census] [--checkpoint DIR]

Linux only. It takes 15 GB of disk, 17 GB of memory for the resident runs (--no-resident leaves them out), and with the
full 16 layers about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from load_memory import Watch, memory_of, write_checkpoint
from transformers import OlmoeConfig

AIM_BYTES, AIM_SECONDS = 4e9, 1.25
SAME = 1e-4
"""The largest difference of an answer, beside the largest value of its kind, that is none."""
TASKS = ("losses", "contributions", "metrics", "census")
MODES = ("resident", "streamed")

WORKER = """
import json, sys, time
import numpy as np
import torch, moe_lens, moe_lens.converters
from moe_lens.audit import census, expert_metrics
from moe_lens.routing import routing_contributions
directory, output, mode, task, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
print("imported", flush=True)
sys.stdin.readline()
start = time.perf_counter()
model = moe_lens.HookedMoE.from_pretrained(directory, device="cpu", stream=mode == "streamed", verbose=False)
loaded = time.perf_counter() - start
tokens = torch.randint(0, model.cfg.d_vocab, (8, 512), generator=torch.Generator().manual_seed(0))
batches, run = [(row, None) for row in tokens.split(1)], None
if task == "losses":
    if mode == "streamed":
        run = model.run_corpus(batches, return_type="loss")
        losses = run.losses
    else:
        with torch.no_grad():
            losses = [model(row, return_type="loss", loss_per_token=True) for row, _ in batches]
    answer = {"loss": torch.cat(losses).double().numpy()}
elif task == "contributions":
    results = routing_contributions(model, batches, by=("layer", "head", "expert"), verbose=True)
    answer = {
        f"{by}, {where}": np.asarray(values)
        for by, result in results.items() for where, values in result.variance.items()
    }
elif task == "metrics":
    answer = dict(expert_metrics(model, batches, verbose=True).values)
else:
    table = census(model, batches, n=16, noise_samples=0, verbose=True).to_pandas()
    answer = {name: table[name].to_numpy() for name in ("gap_norm", "delta_loss", "expert", "position")}
seconds = time.perf_counter() - start
np.savez(output, **answer)
counts = vars(model.read_counts) if mode == "streamed" else {}
print("DONE " + json.dumps({"seconds": seconds, "loaded": loaded, **counts}), flush=True)
sys.stdin.readline()
"""


def config_of(n_layers: int) -> OlmoeConfig:
    """OLMoE-1B-7B-0924's, with as many layers as asked for."""
    return OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )


def require_disk(directory: Path) -> str:
    """The kind of file system that a directory lies on.

    Raises:
        SystemExit: it is in memory.
    """
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max(
        ((point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)),
        key=lambda mount: len(mount[0]),
    )
    if kind in ("tmpfs", "ramfs"):
        raise SystemExit(f"{directory} lies in memory ({kind}); give one on a disk")
    return kind


def drop_from_page_cache(directory: Path) -> None:
    """Clean pages of the checkpoint's files, so that the next reader reads the disk."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class OwnMemory(Watch):
    """Also keeps the peak of what is the process's own at one moment."""

    def _sample(self) -> None:
        super()._sample()
        now = memory_of(self.pid)
        self.peaks["own"] = max(self.peaks.get("own", 0.0), now["RssAnon"] + now["RssShmem"])


@dataclass
class Run:
    """One process: peaks in MB, seconds, what was read, and what came out."""

    peaks: dict[str, float]
    facts: dict[str, Any]
    answer: dict[str, np.ndarray]


def run(directory: Path, mode: str, task: str, threads: int) -> Run:
    """A task in a process of its own, watched."""
    drop_from_page_cache(directory)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "answer.npz"
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), str(output), mode, task, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline().strip() != "imported":
                raise SystemExit(f"{task}, {mode}: the process ended before it began")
            facts = None
            with OwnMemory(process.pid) as watch:
                process.stdin.write("\n")
                process.stdin.flush()
                for line in process.stdout:
                    if line.startswith("DONE "):
                        facts = json.loads(line.removeprefix("DONE "))
                        break
                    print(f"    {line}", end="", flush=True)
                if facts is None:
                    raise SystemExit(f"{task}, {mode}: the process ended before it was done")
            process.stdin.close()
        with np.load(output) as stored:
            answer = {name: stored[name] for name in stored.files}
    return Run(watch.peaks, facts, answer)


def difference(mine: dict[str, np.ndarray], its: dict[str, np.ndarray]) -> float:
    """The largest difference of any answer, beside the largest value of its kind."""
    assert mine.keys() == its.keys()
    worst = 0.0
    for name in its:
        assert (np.isnan(mine[name]) == np.isnan(its[name])).all(), f"{name}: NaN in other places"
        there = ~np.isnan(its[name])
        assert there.any(), f"{name}: no numbers to compare"
        assert np.isfinite(its[name][there]).all(), f"{name}: infinite"
        scale = np.abs(its[name][there]).max() or 1.0
        worst = max(worst, float(np.abs(mine[name] - its[name])[there].max() / scale))
    return worst


def describe(task: str, mode: str, of: Run) -> str:
    facts = of.facts
    line = (
        f"{task} | {mode} | {of.peaks['own'] / 1e3:.2f} | {of.peaks['VmHWM'] / 1e3:.2f} | {facts['loaded']:.1f} | "
        f"{facts['seconds']:.1f} | "
    )
    if mode == "resident":
        return line + "– | –"
    waiting, share = facts["seconds_waiting"], facts["seconds_waiting"] / facts["seconds"]
    read = f"{facts['bytes_read'] / 1e9:.1f} ({facts['layers_read']} layers)"
    return line + f"{read} | {waiting:.1f} s = {share:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--checkpoint", type=Path, help="kept there, and not written again; default: a temporary directory"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-resident", action="store_true", help="streamed runs alone")
    arguments = parser.parse_args()
    modes = MODES[1:] if arguments.no_resident else MODES
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.checkpoint or Path(scratch) / "checkpoint"
        kind = require_disk(directory.parent)
        if not directory.exists():
            write_checkpoint(config_of(arguments.layers), directory, sharded=True)
        n_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        print(
            f"{arguments.layers} layers, {n_bytes / 1e9:.1f} GB in bfloat16 on {kind}; 4,096 tokens; "
            f"{arguments.threads} threads; torch {torch.__version__}",
            flush=True,
        )
        rows, verdicts, missed = [], [], False
        for task in arguments.tasks:
            runs = {mode: run(directory, mode, task, arguments.threads) for mode in modes}
            rows += [describe(task, mode, of) for mode, of in runs.items()]
            own = runs["streamed"].peaks["own"] * 1e6
            verdict = f"{task}: {own / 1e9:.2f} GB streamed"
            missed |= own > AIM_BYTES
            if "resident" in runs:
                ratio = runs["streamed"].facts["seconds"] / runs["resident"].facts["seconds"]
                missed |= ratio > AIM_SECONDS
                apart = difference(runs["streamed"].answer, runs["resident"].answer)
                missed |= apart > SAME
                verdict += f" and {ratio:.2f} of the resident run's time; largest difference {apart:.1e}"
            verdicts.append(verdict)
            print(f"{verdict}\n", flush=True)
    print(
        "task | run | own memory, peak GB | VmHWM GB | loading s | in all s | read GB | waiting for the disk"
    )
    print("--- | --- | --- | --- | --- | --- | --- | ---")
    print("\n".join(rows))
    print("\n" + "\n".join(verdicts))
    print(
        f"to reach: {AIM_BYTES / 1e9:.0f} GB, {AIM_SECONDS} of the time, and no difference above {SAME:.0e}"
    )
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()

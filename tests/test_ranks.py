"""Many processes give what one gives, bit by bit; where one is lost the others say so, and what is finished is kept."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import parse_args as torchrun_arguments

from moe_lens import cli, ranks
from moe_lens.audit import census
from moe_lens.audit.census_plan import runs_of
from moe_lens.audit.census_table import Census
from moe_lens.commands import contributions
from moe_lens.corpus_presets import corpus_kind
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.ranks import ALONE, RankLost, joined
from moe_lens.routing import shards
from moe_lens.routing.contributions import Shards, routing_contributions
from moe_lens.routing.folder_lock import FolderInUse, FolderLock
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.storage import read_arrays
from tests.families import prompts
from tests.rank_cases import Ended, new_store, on_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SENTENCE = "The router sends every token to the experts whose readouts score it highest. "
N_DOCUMENTS = 11
BY = ("layer", "expert")
KEPT = "what is finished is kept: the same command goes on from there, with any number of ranks"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i}: {SENTENCE * (1 + i % 3)}"}) for i in range(N_DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def command(checkpoint: Callable[[str], Path], corpus: Path) -> Callable[..., list[str]]:
    """`command(name, output, ...)` for a tiny model; of two options of one name, the later counts."""
    model = str(checkpoint("qwen2_moe_no_bias"))

    def made(name: str, output: Path, *more: str) -> list[str]:
        given = ["--corpus", str(corpus), "--device", "cpu", "--dtype", "float32", "--output", str(output)]
        own = ["--batch-size", "2", "--by", *BY] if name == "contributions" else ["--max-length", "12"]
        return [name, model, *given, *own, *more]

    return made


def contents(folder: Path) -> dict[str, Any]:
    """Of the results and tables by contributions; of other arrays' files, whose metadata stand in any order, what is in
    them."""
    return {
        path.name: path.read_bytes() if path.suffix == ".parquet" else in_arrays(path)
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".parquet")
    }


def in_arrays(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    arrays, facts = read_arrays(path)
    return {name: array.numpy().tobytes() for name, array in arrays.items()}, facts


def stopped_well(ended: list[Ended], lost: int, because: str) -> None:
    """All but the lost rank say in one line which it was, and do not end as if all were well."""
    for rank, (status, _, err, _) in enumerate(ended):
        if rank != lost:
            assert status == 2, err
            said = [line for line in err.splitlines() if line.startswith("moe-lens: ")]
            assert len(said) == 1, err
            assert said[0].startswith(
                f"moe-lens: rank {rank}: error: stopped, because rank {lost} {because}"
            ), err
            assert said[0].endswith(KEPT)


# ---- contributions ----


def test_contributions_do_not_depend_on_the_number_of_ranks(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """In two passes over the corpus, as the budget of memory asks for."""
    budget = ["--memory-budget", "0.0000075"]
    plain, alone = tmp_path / "plain", tmp_path / "alone"
    assert cli.main(command("contributions", plain, *budget)) == 0
    assert cli.main(command("contributions", alone, *budget, "--shards", "64")) == 0
    wanted = contents(alone)
    assert {*wanted} == {f"{by}.{kind}" for by in BY for kind in ("safetensors", "parquet")}
    # Six batches, merged; no shard of them is left.
    assert {path.name for path in (alone / "shards").iterdir()} == {
        f"batches-000000-000006.{chunk}-of-2.safetensors" for chunk in (1, 2)
    }
    for n in (1, 2, 3):
        output = tmp_path / f"on {n}"
        ended = on_ranks(n, lambda _, to=output: cli.main(command("contributions", to, *budget)), tmp_path)
        assert [rank.status for rank in ended] == [0] * n, ended
        assert contents(output) == wanted
        assert (output / "index.html").exists()
        assert f"shards: 12, of which 0 are there; {n} process" in ended[0].out
        assert all(rank.out == "" and rank.err == "" for rank in ended[1:])
    for by in BY:
        one, whole = (RoutingContributions.load(folder / f"{by}.safetensors") for folder in (plain, alone))
        assert (one.provenance, one.n_documents, one.n_tokens) == (
            whole.provenance,
            whole.n_documents,
            whole.n_tokens,
        )
        assert one.completeness_error == whole.completeness_error
        for measure in one.measures:
            for position in ("lead", "rest"):
                for values in ("measure", "standard_error"):
                    mine, its = (getattr(result, values)(measure)[position] for result in (one, whole))
                    # A spread is a root: what is rounded at 1e-16 of a variance shows at 1e-8 of the largest value.
                    floor = 1e-12 if values == "measure" else 1e-8
                    np.testing.assert_allclose(mine, its, rtol=1e-12, atol=floor * np.nanmax(np.abs(its)))


def kills_itself_after_a_shard(rank: int, lost: int) -> None:
    """In a forked process."""
    written = shards.ShardedRun._write

    def write(self: Any, piece: Any, results: Any) -> None:
        written(self, piece, results)
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3.0)  # until it is told

    shards.ShardedRun._write = write  # type: ignore[method-assign]


def test_contributions_go_on_after_a_kill(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Whichever rank is killed; with another number of ranks."""
    whole, output = tmp_path / "whole", tmp_path / "output"
    assert cli.main(command("contributions", whole, "--batch-size", "1", "--shards", "64")) == 0
    arguments = command("contributions", output, "--batch-size", "1", "--shards", "64")

    def killed(rank: int, lost: int) -> int:
        kills_itself_after_a_shard(rank, lost)
        return cli.main(arguments)

    n_there = 0
    for n, lost in ((3, 1), (2, 0)):
        ended = on_ranks(n, lambda rank, lost=lost: killed(rank, lost), tmp_path)
        assert ended[lost].status == -signal.SIGKILL
        stopped_well(ended, lost, "(process ")
        assert max(rank.seconds for rank in ended) - ended[lost].seconds < 10
        there = len(list((output / "shards").glob("batches-*")))
        assert n_there < there < N_DOCUMENTS
        n_there = there
        assert not (output / "layer.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in (output / "shards").glob("batches-*")}
    made = shards.ShardedRun._measured
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shards.ShardedRun,
            "_measured",
            lambda self, piece, done: (seen.append(piece), made(self, piece, done))[1],
        )
        # Without torchrun, and without saying that there are shards.
        assert cli.main(arguments[:-2]) == 0
    assert len(seen) == N_DOCUMENTS - len(before)
    assert contents(output) == contents(whole)


def test_an_error_ends_all_ranks(command: Callable[..., list[str]], tmp_path: Path) -> None:
    def failing(rank: int) -> int:
        if rank == 1:
            shards.ShardedRun._write = lambda *_: (_ for _ in ()).throw(OSError("the disk is full"))  # type: ignore
        else:
            kills_itself_after_a_shard(rank, -1)
        return cli.main(command("contributions", tmp_path / "output", "--shards", "6"))

    ended = on_ranks(2, failing, tmp_path)
    assert ended[1].status == 2
    assert ended[1].err.splitlines()[-1] == "moe-lens: rank 1: error: the disk is full"
    stopped_well(ended, 1, "met an error: the disk is full; ")


def test_ranks_that_see_another_run_are_refused(
    command: Callable[..., list[str]], corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text(encoding="utf-8").replace("3:", "4:"), encoding="utf-8")
    os.makedirs(tmp_path / "here")

    def run(rank: int, name: str, *of_second: str) -> int:
        ranks._TO_SEE_A_FILE = 0.5  # type: ignore[attr-defined]
        return cli.main(command(name, tmp_path / "output", *(of_second if rank == 1 else ())))

    for name in ("contributions", "census"):
        for changes, message in (
            (["--corpus", str(other)], "rank 1 sees another run than rank 0: corpus is "),
            (["--output", str(tmp_path / f"elsewhere {name}")], "rank 1 does not see what rank 0 writes in "),
        ):
            ended = on_ranks(2, lambda rank, name=name, c=changes: run(rank, name, *c), tmp_path)
            for rank in (0, 1):
                assert ended[rank].status == 2
                assert f"moe-lens: rank {rank}: error: {message}" in ended[rank].err
    assert (
        not list(tmp_path.rglob("batches-*"))
        + list(tmp_path.rglob("rows-*"))
        + list(tmp_path.rglob(".ranks-*"))
    )


def test_shards_of_another_run_are_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    """What differs is named, and nothing is run, written or deleted: before they are merged, and after."""
    model, folder = model_of("mixtral"), tmp_path / "shards"
    tokens, _ = prompts(batch=6, length=5)

    def run(given: Any = tokens, number: Any = 3, **how: Any) -> Any:
        how = {"batch_size": 2, **how}
        return routing_contributions(model, given, shards=Shards(folder, number=number), **how)

    expected = run().variance["rest"]
    (whole,) = folder.iterdir()
    merged = whole.read_bytes()
    whole.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardedRun, "_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert len([*folder.iterdir()]) == 3
    other = tokens.clone()
    other[5, 4] += 1
    for _ in range(2):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for changes, message in (
            (dict(experts=[1, 2]), "experts was 'all' and is [1, 2]"),
            (dict(given=other), "fingerprint was "),
            (dict(given=tokens[:4]), "corpus was '6 rows of .* and is '4 rows"),
            (dict(batch_size=3), "batches was "),
            (dict(number=2), "bounds was "),
            (dict(receivers=[0]), "receivers was "),
            (dict(by="head"), "by was "),
        ):
            with pytest.raises(
                ValueError, match="batches-.*' is of another run: " + message.replace("[", r"\[")
            ):
                run(**changes)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        for path in before:
            path.unlink()
        whole.write_bytes(merged)
    for damaged in (merged[:-1], b"", b"garbage" * 9):
        whole.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"the shard .*{whole.name}' is damaged.*delete it"):
            run()
    whole.unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"'notes\.txt', which is no shard of contributions"):
        run()
    (folder / "notes.txt").unlink()
    for left_over in (".ranks-123", f".{whole.name}.unfinished"):
        (folder / left_over).touch()
    lock = FolderLock(folder)
    with pytest.raises(FolderInUse, match=r"the folder of shards .* is being written by process"):
        run()
    lock.release()
    np.testing.assert_array_equal(run().variance["rest"], expected)
    assert [path.name for path in folder.iterdir()] == [whole.name]
    whole.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(OSError, match=r"the shards take up to .* GiB are free; ask for fewer"):
            run()


def test_a_state_that_shards_do_not_go_on_from_is_said(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("contributions", tmp_path / "out")
    assert cli.main(arguments) == 0
    assert "in one piece" not in capsys.readouterr().err
    for is_said in (True, False):
        assert cli.main([*arguments, "--shards", "2"]) == 0
        said = "state.safetensors' is of a run in one piece: a run in shards does not go on from it"
        assert (said in capsys.readouterr().err) == is_said


def test_a_damaged_shard_is_found_before_others_are_measured(
    model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, folder = model_of("mixtral"), tmp_path / "shards"
    tokens, _ = prompts(batch=6, length=5)

    def run() -> Any:
        return routing_contributions(model, tokens, shards=Shards(folder, number=3), batch_size=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardedRun, "_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    first, second, third = sorted(folder.iterdir())
    third.unlink()
    written = bytearray(second.read_bytes())
    written[-20] ^= 1
    second.write_bytes(written)
    with pytest.raises(ValueError, match=rf"{second} is damaged: .*Delete it, and it is measured again$"):
        run()
    assert sorted(folder.iterdir()) == [first, second]
    second.unlink()
    found = run().variance["rest"]
    folder = tmp_path / "others"
    np.testing.assert_array_equal(found, run().variance["rest"])


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_shards_where_nothing_but_bos_stands(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    """They join their neighbours, so that every shard has something to be averaged."""
    model = model_of("mixtral")
    bos = model.tokenizer.bos_token_id
    tokens, _ = prompts(batch=7, length=5)
    tokens[:, 0] = bos
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[[0, 1, 4, 6], 1:] = False
    batches = list(zip(tokens.split(1), mask.split(1), strict=True))
    assert shards._bounds(batches, 7, None) == [(i, i + 1) for i in range(7)]
    assert shards._bounds(batches, 7, bos) == [(0, 3), (3, 5), (5, 7)]
    how: dict[str, Any] = dict(by="head", bos_is_lead=False)
    one = routing_contributions(model, batches, **how)
    whole = routing_contributions(model, batches, shards=Shards(tmp_path / "shards", number=7), **how)
    assert isinstance(whole, RoutingContributions)
    assert (one.n_documents, one.n_tokens) == (whole.n_documents, whole.n_tokens)
    np.testing.assert_allclose(one.variance["rest"], whole.variance["rest"], rtol=1e-12)
    with pytest.raises(ValueError, match="there were no batches"):
        routing_contributions(model, [(tokens[:2, :1], None)], shards=Shards(tmp_path / "none"), **how)
    with pytest.raises(ValueError, match="give one of state and shards"):
        routing_contributions(
            model, batches, shards=Shards(tmp_path / "none"), state=tmp_path / "state", **how
        )


# ---- census ----


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve; one has a single token, and so no rows."""
    tokens, mask = prompts("right", batch=12, length=8, seed=8)
    mask[:] = 1
    mask[::3, 6:], mask[8, 1:] = 0, 0
    return tokens, mask.bool()


def measured(model: Any, folder: Path, **how: Any) -> Census:
    tokens, mask = documents()
    how = {"outcome": ["kl"], "shared": True, "noise_samples": 4, "save_every": 0.0, **how}
    return census(model, tokens, attention_mask=mask, output=folder, **how)


def assert_same_census(one: Census, other: Census) -> None:
    assert one.columns == other.columns
    assert (one.n_documents, one.finished) == (other.n_documents, other.finished) == (12, True)
    assert one.facts["noise_floor"] == other.facts["noise_floor"]
    mine, its = one.to_pandas(), other.to_pandas()
    for name in one.columns:
        assert mine[name].to_numpy().tobytes() == its[name].to_numpy().tobytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_census_does_not_depend_on_the_number_of_ranks(
    hooked: Callable[[str], Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Killed on three ranks, gone on with on two, and finished on one; and on three from the beginning."""
    model = copy.deepcopy(hooked("qwen2_moe_no_bias")).to(dtype)
    expected = measured(model, tmp_path / "whole")
    folder = tmp_path / "census"

    def run(rank: int, to: Path, lost: int) -> int:
        clean_run, seen = CleanRun.of, []

        def of(*arguments: Any) -> CleanRun:
            seen.append(1)
            if len(seen) == 2 and rank == lost:  # the first document is written, and the second is under way
                os.kill(os.getpid(), signal.SIGKILL)
            if len(seen) == 2 and lost >= 0:
                time.sleep(3.0)  # until it is told
            return clean_run(*arguments)

        CleanRun.of = of  # type: ignore[method-assign]
        try:
            with joined() as those:
                # With no kill to come, a shard is a run of documents.
                pace = 0.0 if lost >= 0 else 1e6
                table = measured(model, to, ranks=those, save_every=pace, verbose=True)
        except ranks.RankLost as error:
            ranks.say(f"error: {error}")
            return 2
        # Every rank has the whole table.
        assert_same_census(table, expected)
        return 0

    n_there = 0
    for n, lost in ((3, 2), (2, 0)):
        ended = on_ranks(n, lambda rank, lost=lost: run(rank, folder, lost), tmp_path)
        assert ended[lost].status == -signal.SIGKILL
        stopped_well(ended, lost, "(process ")
        part = Census.load(folder, allow_unfinished=True)
        assert n_there < part.n_documents < 12
        n_there = part.n_documents
        rows, whole = part.to_pandas(), expected.to_pandas()
        whole = whole[whole.document.isin(rows.document.unique())]
        assert rows.to_numpy().tobytes() == whole.to_numpy().tobytes()
    assert_same_census(measured(model, folder), expected)
    ended = on_ranks(3, lambda rank: run(rank, tmp_path / "three", -1), tmp_path)
    assert [rank.status for rank in ended] == [0] * 3, ended
    assert_same_census(Census.load(tmp_path / "three"), expected)
    assert "3 processes; 12 of 12 documents are to be done" in ended[0].out
    assert not any(rank.out for rank in ended[1:])


def test_the_census_command_with_a_reference(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Rank 0 makes the reference, and writes page and tables."""
    asked = ["--how", "resample", "--n", "4"]
    assert cli.main(command("census", tmp_path / "plain", *asked)) == 0
    ended = on_ranks(2, lambda _: cli.main(command("census", tmp_path / "ranks", *asked)), tmp_path)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert ended[1].out == ended[1].err == ""
    one, other = (Census.load(tmp_path / name / "census") for name in ("plain", "ranks"))
    assert one.to_pandas().to_numpy().tobytes() == other.to_pandas().to_numpy().tobytes()
    assert one.identity == other.identity
    for name in ("by_layer.csv", "by_rank.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ranks" / name).read_bytes()
    assert contents(tmp_path / "plain") == contents(tmp_path / "ranks")  # the reference
    assert (tmp_path / "ranks" / "index.html").exists()


def test_ranks_need_a_folder(hooked: Callable[[str], Any]) -> None:
    two = ranks.Ranks()
    two.n = 2
    with pytest.raises(ValueError, match="2 ranks need an output"):
        census(hooked("mixtral"), documents()[0], ranks=two)


def test_documents_in_runs_of_like_work() -> None:
    ablations = [5, 0, 90, 5, 40, 40, 1, 19]
    assert runs_of(range(8), ablations, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert runs_of([3, 5, 7], ablations, 1) == [[3, 5, 7]]
    assert runs_of([3, 5, 7], ablations, 99) == [[3], [5], [7]]
    assert runs_of([], ablations, 3) == []


# ---- torchrun itself ----

THEN_KILLED = """
import json, os, sys
from moe_lens import cli
from tests.test_ranks import kills_itself_after_a_shard
census, contributions = map(json.loads, sys.argv[1:])
assert cli.main(census) == 0
kills_itself_after_a_shard(int(os.environ["RANK"]), 1)
sys.exit(cli.main(contributions))
"""


def torchrun(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(n),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """A census, and contributions in which a rank is killed, and which are gone on with."""
    script, output, plain = tmp_path / "killed.py", tmp_path / "output", tmp_path / "plain"
    script.write_text(THEN_KILLED)
    its_census, contributions = command("census", output), command("contributions", output, "--shards", "6")
    ended = torchrun(2, str(script), json.dumps(its_census), json.dumps(contributions))
    assert ended.returncode != 0
    assert "moe-lens: rank 0: error: stopped, because rank 1 (process " in ended.stderr
    assert KEPT in ended.stderr

    assert cli.main(command("census", plain)) == 0
    tables = [Census.load(folder / "census").to_pandas() for folder in (output, plain)]
    assert tables[0].to_numpy().tobytes() == tables[1].to_numpy().tobytes()
    assert 1 <= len(list((output / "shards").glob("batches-*"))) < 6
    assert cli.main(contributions) == 0
    assert cli.main(command("contributions", plain, "--shards", "6")) == 0
    assert contents(output) == contents(plain)


def test_the_package_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe_lens", "contributions", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("moe_lens", run_name="__main__")
    assert ended.value.code == 0
    assert "usage: moe-lens contributions" in capsys.readouterr().out


def torchrun_hands_on(*arguments: str) -> list[str]:
    """What torchrun's own parser leaves to the program."""
    given = ["--nproc-per-node", "2", "-m", "moe_lens", *arguments]
    return torchrun_arguments(given).training_script_args


@pytest.mark.parametrize("name", ["contributions", "census"])
def test_torchrun_takes_no_option_for_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    options = {*re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)} - {"--help"}
    assert {"--documents", "--n", "--output", "--corpus", "--dtype"} < options
    for option in options - {"--n"}:
        assert torchrun_hands_on(name, "mini", option, "1") == [name, "mini", option, "1"]
    with pytest.raises(SystemExit):  # when this changes, --documents is not needed
        torchrun_hands_on(name, "mini", "--n", "1")


def test_the_slurm_script() -> None:
    script = Path(__file__).parents[1] / "tutorials" / "slurm" / "contributions.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    (line,) = re.findall(
        r"^srun \S+ torchrun(.*?)\n\n?\Z", script.read_text().replace("\\\n", ""), re.M | re.S
    )
    values = {
        "SLURM_NNODES": "2",
        "PROCESSES": "4",
        "SLURM_JOB_ID": "1",
        "HEAD": "h",
        "MODEL": "mini",
        "OUTPUT": "o",
    }
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    torchrun = torchrun_arguments(shlex.split(line))
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint) == ("2", "4", "h:29500")
    assert (torchrun.module, torchrun.training_script) == (True, "moe_lens")
    options = cli._parser().parse_args(torchrun.training_script_args)
    assert (options.run, options.by) == (contributions.run, ["layer", "head", "expert"])
    corpus_kind(options.corpus)


def test_ranks_that_are_started_again(tmp_path: Path) -> None:
    """With a store that keeps what was said before; and they may join more than once."""
    store = new_store()

    def work(rank: int, lost: int) -> int:
        try:
            for _ in range(2):
                with joined() as those:
                    done = list(those.taking(range(5)))
                    if rank == lost:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if lost >= 0:
                        time.sleep(30)
                    everything = those.gathered(done)
                    assert sorted(item for its in everything for item in its) == [0, 1, 2, 3, 4]
                    count = those.counter()
                    count(rank + 1)
                    those.wait()
                    assert count(0) == 3
        except ranks.RankLost:
            return 2
        return 0

    for lost, statuses in ((1, [2, -9]), (0, [-9, 2]), (-1, [0, 0])):
        ended = on_ranks(2, lambda rank, lost=lost: work(rank, lost), tmp_path, store)
        assert [rank.status for rank in ended] == statuses, ended


def test_a_store_that_is_gone_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """The main thread may meet it before the watch does."""

    def gone(*_: Any) -> int:
        raise dist.DistNetworkError("failed to recv, got 0 bytes")

    def work(rank: int) -> int:
        with joined() as ranks:
            ranks._store = SimpleNamespace(add=gone)  # type: ignore[attr-defined]
            ranks.wait()
        return 0

    (ended,) = on_ranks(1, lambda rank: told(work, rank), tmp_path)
    assert ended.status == 2, ended
    assert "RankLost: stopped, because torchrun's store cannot be reached" in ended.err
    assert ended.err.rstrip().endswith(KEPT)


def told(work: Callable[[int], int], rank: int) -> int:
    try:
        return work(rank)
    except RankLost as error:
        print(f"RankLost: {error}", file=sys.stderr)
        return 2


def test_alone(tmp_path: Path) -> None:
    """A process that was started plainly."""
    with joined() as those:
        assert those is ALONE
    assert list(ALONE.taking([3, 1, 2])) == [3, 1, 2]
    count = ALONE.counter()
    assert (count(2), count(0), count(3)) == (2, 2, 5)
    assert ALONE.gathered({1: (2,)}) == [{"1": [2]}]
    ALONE.agree({"a": 1})
    ALONE.require_shared(tmp_path)
    ALONE.require_shared(tmp_path / "nowhere")  # who is alone need not look
    assert not list(tmp_path.iterdir())


# ---- a model whose layers stay on disk ----


@pytest.mark.parametrize("name", ["contributions", "census"])
def test_streamed_on_ranks(command: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    """The numbers of the model in memory, however many ranks read it."""
    in_memory, streamed = tmp_path / "in memory", tmp_path / "streamed"
    more = ["--shards", "3"] if name == "contributions" else []
    assert cli.main(command(name, in_memory, *more)) == 0
    arguments = command(name, streamed, *more, "--stream")
    ended = on_ranks(2, lambda _: cli.main(arguments), tmp_path)
    assert [rank.status for rank in ended] == [0, 0], ended
    if name == "contributions":
        assert contents(streamed) == contents(in_memory)
    else:
        tables = [Census.load(folder / "census").to_pandas() for folder in (in_memory, streamed)]
        assert tables[0].to_numpy().tobytes() == tables[1].to_numpy().tobytes()

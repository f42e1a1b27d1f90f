"""`moe-lens census`: what it writes is what it measured, it goes on after a kill, and it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens import cli
from moe_lens.audit.census import census
from moe_lens.audit.census_table import Census
from moe_lens.audit.noise import NoiseFloor
from moe_lens.census_page import census_page_html, largest_changes
from moe_lens.corpus import TokenBatches, bos_by_default, read_jsonl, token_batches
from moe_lens.interventions import expert_reference
from moe_lens.routing.folder_lock import FolderLock

# In the package, its name is the function's.
census_module: Any = import_module("moe_lens.audit.census")

SENTENCE = "The <b>router</b> sends every token to the experts whose readouts score it highest. "
EVIL = "<script>alert('moe')</script>"
N_DOCUMENTS = 4


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i}: {SENTENCE * (1 + i % 2)}"}) for i in range(N_DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def command(checkpoint: Callable[[str], Path], corpus: Path, tmp_path: Path) -> list[str]:
    """The command for a tiny model with shared experts; of two options of one name, the later counts."""
    model = str(checkpoint("qwen2_moe"))
    given = ["--corpus", str(corpus), "--device", "cpu", "--dtype", "float32", "--max-length", "16"]
    return ["census", model, *given, "--output", str(tmp_path / "out")]


def batches_of(model: Any, corpus: Path, **how: Any) -> TokenBatches:
    how = {"max_length": 16} | how
    return token_batches(
        model, read_jsonl(corpus), batch_size=8, prepend_bos=bos_by_default(model), truncate=True, **how
    )


def assert_same(a: Census, b: Census) -> None:
    pd.testing.assert_frame_equal(a.to_pandas(), b.to_pandas(), check_exact=True)
    assert a.columns == b.columns


def page_of(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_what_is_written_is_what_was_measured(
    command: list[str],
    corpus: Path,
    tmp_path: Path,
    model_of: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--outcome", "kl", "later_loss", "--predictors", "first_order", "direct", "--shared"]
    assert cli.main([*command, *asked]) == 0
    printed = capsys.readouterr()
    model, out = model_of("qwen2_moe"), tmp_path / "out"
    direct = census(
        model,
        batches_of(model, corpus),
        outcome=["kl", "later_loss"],
        predictors=["first_order", "direct"],
        shared=True,
    )
    result = Census.load(out / "census")
    assert_same(result, direct)
    assert {path.name for path in out.iterdir()} == {"census", "by_layer.csv", "by_rank.csv", "index.html"}
    for name, frame in (("by_layer", result.by_layer()), ("by_rank", result.by_rank())):
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), frame, check_exact=False, rtol=1e-12)
    assert f"plan: {len(direct):,} ablations (zero, scope token)" in printed.out
    assert "ablations/s" in printed.err
    assert "rank 1 " in printed.out
    assert "shared " in printed.out
    page = page_of(out)
    assert page.count('class="plotly-graph-div"') == 4
    assert "<h2>What else was measured</h2>" in page
    for name in ("kl (nats)", "delta_later_loss (nats)", "first_order (nats)", "direct (logits)"):
        assert f">{name}</th>" in page
    assert result.provenance["weights"] in page
    assert "<b>router" not in page
    assert "&lt;b&gt;" in page
    # A finished census is not made again.
    before = {path: path.stat().st_mtime_ns for path in (out / "census").iterdir()}
    (out / "index.html").unlink()
    assert cli.main([*command, *asked]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "census").iterdir()} == before
    assert len(page_of(out)) == len(page)


def test_sample_scope_layers_and_how(
    command: list[str], corpus: Path, tmp_path: Path, model_of: Callable[[str], Any]
) -> None:
    model = model_of("qwen2_moe")
    layer = model.cfg.moe_layers[-1]
    asked = [
        "--layers",
        str(layer),
        "--scope",
        "sequence",
        "--how",
        "reroute",
        "--positions",
        "9",
        "--seed",
        "3",
    ]
    assert cli.main([*command, *asked]) == 0
    result = Census.load(tmp_path / "out" / "census")
    same = dict(layers=layer, scope="sequence", how="reroute", n=9, seed=3)
    assert_same(result, census(model, batches_of(model, corpus), **same))  # type: ignore[arg-type]
    assert len(result) == 9 * model.cfg.top_k
    page = page_of(tmp_path / "out")
    assert "One expert is changed wherever it is active in the document" in page
    assert "the next-ranked expert takes its slot" in page
    assert "9 positions, a uniform sample" in page


def test_a_killed_run_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    rows_of, done = census_module.rows_of, []

    def dies(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return rows_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(census_module, "rows_of", dies)
        assert cli.main(command) == 130
    assert "goes on from it with the same command" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"census"}
    assert Census.load(out / "census", allow_unfinished=True).n_documents == 2

    made: list[int] = []
    monkeypatch.setattr(census_module, "rows_of", lambda *a: made.append(1) or rows_of(*a))
    assert cli.main(command) == 0
    assert len(made) == N_DOCUMENTS - 2
    assert cli.main([*command, "--output", str(whole)]) == 0
    assert_same(Census.load(out / "census"), Census.load(whole / "census"))
    for name in ("by_layer.csv", "by_rank.csv"):
        assert (out / name).read_text() == (whole / name).read_text()


def test_a_streamed_model(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same table; what lies between layers, within the budget and the folder that are named."""
    spilled, asked = tmp_path / "spilled", ["--positions", "6", "--output"]
    spilled.mkdir()
    assert cli.main([*command, *asked, str(tmp_path / "in memory")]) == 0
    capsys.readouterr()
    streams = ["--streams-budget", "0.00000001", "--spill-directory", str(spilled)]
    assert cli.main([*command, "--stream", *streams, *asked, str(tmp_path / "out")]) == 0
    assert f"in a file in {str(spilled)!r}" in capsys.readouterr().out
    assert not any(spilled.iterdir())
    assert_same(*(Census.load(tmp_path / name / "census") for name in ("out", "in memory")))


# ---- the reference of mean and resample ----


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_a_reference_is_made_kept_and_used_again(
    command: list[str],
    corpus: Path,
    tmp_path: Path,
    model_of: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
    how: Any,
) -> None:
    model, out = model_of("qwen2_moe"), tmp_path / "out"
    assert cli.main([*command, "--how", how]) == 0
    assert "reference: corpus.jsonl" in capsys.readouterr().out
    batches = batches_of(model, corpus)
    reference = expert_reference(model, batches)
    assert_same(Census.load(out / "census"), census(model, batches, how=how, reference=reference))
    assert (out / "reference.safetensors").is_file()
    assert cli.main([*command, "--how", how]) == 0
    assert "reference: " not in capsys.readouterr().out
    # Of other documents it is another run.
    assert cli.main([*command, "--how", how, "--reference-documents", "2"]) == 2
    assert "reference.safetensors' is of another run, by its fingerprint" in capsys.readouterr().err

    file = reference.save(tmp_path / "reference.safetensors")
    given = ["--how", how, "--reference", str(file), "--output", str(tmp_path / "given")]
    assert cli.main([*command, *given]) == 0
    assert_same(Census.load(out / "census"), Census.load(tmp_path / "given" / "census"))
    assert not (tmp_path / "given" / "reference.safetensors").exists()


def test_a_reference_of_another_corpus(
    command: list[str], corpus: Path, tmp_path: Path, model_of: Callable[[str], Any]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join([SENTENCE * 2, "Mary gave a drink to John. " * 4]), encoding="utf-8")
    # A text file has no fields, and the census's corpus may have them.
    fields = tmp_path / "fields.jsonl"
    fields.write_text(corpus.read_text().replace('"text"', '"body"'))
    asked = [
        "--corpus",
        str(fields),
        "--text-field",
        "body",
        "--how",
        "mean",
        "--reference-corpus",
        str(other),
    ]
    assert cli.main([*command, *asked]) == 0
    from moe_lens.corpus import read_text

    model = model_of("qwen2_moe")
    reference = expert_reference(
        model,
        token_batches(
            model,
            read_text(other),
            batch_size=8,
            prepend_bos=bos_by_default(model),
            truncate=True,
            max_length=16,
        ),
    )
    result = Census.load(tmp_path / "out" / "census")
    assert result.identity["reference"] == reference.fingerprint


# ---- half precision ----


@pytest.mark.parametrize("met", [True, False])
def test_half_precision_reports_its_noise_floor(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    met: bool,
) -> None:
    noise_floor = census_module.noise_floor

    def measured(*arguments: Any, **settings: Any) -> NoiseFloor:
        floor = noise_floor(*arguments, **settings)
        assert settings["n_samples"] == 3
        return replace(floor, replay_error=1.0 if met else 1.6, hooked_error=1.0)

    monkeypatch.setattr(census_module, "noise_floor", measured)
    asked = ["--dtype", "bfloat16", "--noise-samples", "3", "--positions", "5"]
    assert cli.main([*command, *asked]) == (0 if met else 1)
    assert ("ok" if met else "FAIL") in capsys.readouterr().out.splitlines()[-1]
    page = page_of(tmp_path / "out")
    assert "<h2>The noise floor</h2>" in page
    assert "null_delta_loss (nats)" not in page


# ---- the page ----


def test_the_largest_changes_stand_in_their_text(corpus: Path, model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    batches = batches_of(model, corpus, max_length=60)
    result = census(model, batches)
    changes = largest_changes(model, batches, result, n=25)
    documents = [tokens[real] for rows, mask, _ in batches for tokens, real in zip(rows, mask, strict=True)]
    assert [change.delta_loss for change in changes] == result.top(25)["delta_loss"].tolist()
    assert any(change.before.startswith("… ") for change in changes)
    for change, row in zip(changes, result.top(25).itertuples(), strict=True):
        tokens = documents[row.document]
        assert change.token == model.to_string(int(tokens[row.position]))
        assert change.next == model.to_string(int(tokens[row.position + 1]))
        first = max(0, row.position - 16)
        before = str(model.to_string(tokens[first : row.position].tolist())) if row.position else ""
        assert change.before == ("… " if first else "") + before
        assert (change.layer, change.expert, change.rank) == (row.layer, row.expert, row.rank)
    with pytest.raises(ValueError, match="not of these tokens"):
        largest_changes(model, batches_of(model, corpus, max_length=12), result)


def test_names_and_text_are_escaped(corpus: Path, model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    batches = batches_of(model, corpus)
    result = census(model, batches, n=6)
    result.identity["model"] = result.identity["corpus"] = EVIL
    result.identity["documents"] = [EVIL]
    (change, *_) = largest_changes(model, batches, result, n=1)
    evil = replace(change, before=EVIL, token="<i>\n", next="<u>", document=f'" {EVIL}')
    page = census_page_html(result, examples=[evil])
    assert EVIL not in page
    assert "<mark>&lt;i&gt;\\n</mark><u>&lt;u&gt;</u>" in page
    assert 'title="&quot; &lt;script&gt;' in page
    # Numbers of a table whose columns are constant: no correlation, and no crash.
    assert "nan" not in page.split("<h1>")[1].split("plotly-graph-div")[0]


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--corpus", "no-such-corpus"], "no-such-corpus"),
        (["--layers", "99"], "99"),
        (["--positions", "100000"], "n=100000 positions are wanted"),
        (["--positions", "0"], "n="),
        (["--n", "1000"], "1000"),
        (["--memory-budget", "-1"], "--memory-budget -1.0 must be a positive number"),
        (["--streams-budget", "1"], "--streams-budget is for --stream"),
        (["--spill-directory", "."], "--spill-directory is for --stream"),
        (["--stream", "--streams-budget", "0"], "--streams-budget 0.0 must be a positive number"),
        (["--stream", "--spill-directory", "absent"], "no folder --spill-directory 'absent'"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--scope", "sequence", "--outcome", "later_loss"], "later_loss is of a change at one token"),
        (
            ["--reference-documents", "3"],
            "--reference-documents is for --how mean and resample, not for zero",
        ),
        (["--how", "mean", "--reference", "absent"], "no file --reference 'absent'"),
        (["--how", "mean", "--reference-corpus", "absent"], "absent"),
        (
            ["--how", "mean", "--reference", "x", "--reference-corpus", "y"],
            "so --reference-corpus says nothing",
        ),
    ],
)
def test_one_line_errors(
    command: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, *changes]) == 2
    printed = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(printed) == 1
    assert printed[0].startswith("moe-lens: error: ")
    assert message in printed[0]


def test_a_folder_of_another_run_or_of_a_running_one(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--positions", "4"]) == 0
    assert cli.main([*command, "--positions", "5"]) == 2
    assert "is of another run" in capsys.readouterr().err
    lock = FolderLock(tmp_path / "out" / "census")
    assert cli.main([*command, "--positions", "4"]) == 2
    assert "is being written by" in capsys.readouterr().err
    lock.release()
    assert cli.main([*command, "--positions", "4"]) == 0


def test_a_broken_model_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise FloatingPointError("the loss is nan at position 3")

    monkeypatch.setattr(census_module, "rows_of", breaks)
    assert cli.main(command) == 2
    assert "document 0" in capsys.readouterr().err


def test_a_tables_numbers_are_those_of_the_layers(corpus: Path, model_of: Callable[[str], Any]) -> None:
    from scipy.stats import spearmanr

    model = model_of("qwen2_moe")
    result = census(model, batches_of(model, corpus), predictors="first_order", shared=True)
    page = census_page_html(result)
    for layer in result.layers:
        rows = result.to_pandas(layers=layer).query("rank > 0")
        rho = spearmanr(rows["first_order"], rows["delta_loss"]).statistic  # type: ignore[attr-defined]
        mean = float(np.mean(rows["first_order"].to_numpy(float)))
        cells = f'<td>M{layer}</td><td class="number">{mean:.3g}</td><td class="number">{rho:.3f}</td>'
        assert cells.replace(">-", ">−").replace("e-", "e−") in page

"""`moe-lens audit`: its tables are what its parts measure, a run goes on after a kill, and it says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import cli
from moe_lens.audit import Census, audit, expert_metrics, progressive, redistribution
from moe_lens.audit.audit_tables import TABLES, AuditTables
from moe_lens.audit.census_shards import HEADER
from moe_lens.commands.audit import _folder_names, _labels
from moe_lens.corpus import bos_by_default, read_jsonl, read_lines, token_batches
from moe_lens.routing.folder_lock import FolderLock
from tests.families import VARIANTS, Variant, write_checkpoint, write_tokenizer

census_module: Any = import_module("moe_lens.audit.census")
stages_module: Any = import_module("moe_lens.audit.audit_stages")

N_DOCUMENTS = 6
SENTENCES = (
    "The router sends every token to the experts whose readouts score it highest. ",
    "When Mary and John went to the store, John gave a drink to Mary. ",
    "Each expert writes what it knows into the residual stream. ",
)
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i}: {SENTENCES[i % 3] * 2}"}) for i in range(N_DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> list[str]:
    """What every command has; of two options of one name, the later counts."""
    given = ["--corpus", str(corpus), "--device", "cpu", "--dtype", "float32", "--max-length", "24"]
    return [*given, "--output", str(tmp_path / "out")]


SMALL = ["--metrics", "activation_norm", "random", "--layers", "1"]


@pytest.fixture(scope="session")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with OLMoE's layers, in a directory of its name."""
    directory = tmp_path_factory.mktemp("models") / "OLMoE-1B-7B-0924"
    VARIANTS["olmoe_16_layers"] = Variant(
        "olmoe",
        dict(num_hidden_layers=16, hidden_size=32, intermediate_size=8, num_experts_per_tok=3),
    )
    try:
        write_checkpoint("olmoe_16_layers", directory)
    finally:
        del VARIANTS["olmoe_16_layers"]
    write_tokenizer(directory)
    return directory


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    """Lines of which 500 have more than 100 characters and 33 tokens, as progressive removal asks for."""
    path = tmp_path / "wiki.test.raw"
    long = [f" the cat {i} sat on it and then on that with all {i % 7} of them " * 2 for i in range(503)]
    path.write_text("\n".join([" = Title = ", "", *long]) + "\n", encoding="utf-8")
    return path


def batches_of(model: Any, corpus: Path, **how: Any) -> Any:
    return token_batches(
        model,
        read_jsonl(corpus) if corpus.suffix == ".jsonl" else read_lines(corpus),
        **{
            "batch_size": 8,
            "prepend_bos": bos_by_default(model),
            "truncate": True,
            "max_length": 24,
            **how,
        },
    )


def page_of(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def assert_same(a: AuditTables, b: AuditTables) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)
    assert a.labels == b.labels


def files_of(folder: Path) -> dict[Path, int]:
    """What stages keep, and when it was written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder and path.name != ".lock"
    }


def error_of(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Of a command that cannot run: one line, and status 2."""
    capsys.readouterr()
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("moe-lens: error: ")]
    assert len(lines) == 1
    assert err.endswith(f"{lines[0]}\n")
    assert "Traceback" not in err
    return lines[0].removeprefix("moe-lens: error: ")


# ---- what it measures ----


@pytest.mark.slow
def test_tables_are_what_the_parts_measure(
    options: list[str],
    checkpoint: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    model_of: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, out = checkpoint("olmoe"), tmp_path / "out"
    asked = ["--layers", "0", "2", "--positions", "60", "--seed", "3", "--compare", "2", "--smallest-effect"]
    command = ["audit", str(given), *options, *asked, "0.2", "--metrics", "activation_norm", "random"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    label = given.name
    tables = AuditTables.load(out)
    assert tables.labels == (label,)
    assert tables.passed
    assert {path.name for path in out.iterdir()} == {
        label,
        "index.html",
        *(f"{name}.parquet" for name in TABLES),
    }

    model = model_of("olmoe")
    batches = batches_of(model, corpus)
    table = Census.load(out / label / "census-token")
    metrics = expert_metrics(model, batches, metrics=["activation_norm", "random"], layers=(0, 2), seed=3)
    direct = audit(table, metrics, seed=3, compare=2, smallest_effect=0.2)
    expected = direct.cells.assign(model=str(given))
    pd.testing.assert_frame_equal(tables.audit.drop(columns="label"), expected, check_exact=True)
    removed = progressive(model, batches, layers=(0, 2), n=60, seed=3).to_frame()
    ours = tables.progressive.drop(columns=["label", "scope", "how"])
    pd.testing.assert_frame_equal(ours, removed, check_exact=True, check_dtype=False)
    moved = redistribution(model, batches, layers=(0, 2), seed=3, census=table).correlations
    pd.testing.assert_frame_equal(
        tables.redistribution.drop(columns="label"), moved, check_exact=True, check_dtype=False
    )
    assert tables.published.empty
    assert table.identity["sample"] == {"n": 60, "seed": 3}

    page = page_of(out)
    assert escape(label) in page
    assert 'data-row="audit:0"' in page
    assert 'data-row="progressive:0"' in page
    assert f"{label}: corpus.jsonl: 6 of 6 documents" in printed
    assert f"tables and page: {out}" in printed
    assert "activation_norm" in printed

    # Nothing is made again, and the same is said.
    before, text = files_of(out), printed
    assert cli.main(command) == 0
    again = capsys.readouterr().out
    assert files_of(out) == before
    assert_same(AuditTables.load(out), tables)
    said = text[text.index(f"{label}: corpus.jsonl") :].split("\n", 1)
    assert said[0] in again
    results = text.index("checks against transformers passed")
    assert text[results:] == again[again.index("checks against transformers passed") :]


@pytest.mark.slow
def test_several_models(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of them fails verification: its checks are told, and nothing else of it, and the status says so."""
    good, bad = checkpoint("olmoe"), checkpoint("qwen2_moe")
    out, command = tmp_path / "out", ["audit", str(bad), str(good), *options, *SMALL]
    verify = stages_module.verify

    def fails(model: Any, *arguments: Any, **named: Any) -> Any:
        found = verify(model, *arguments, **named)
        if model.cfg.model_type == "qwen2_moe":
            wrong = replace(found.checks[0], value=7.25, rule="<=", tolerance=0.5)
            found = replace(found, checks=(wrong, *found.checks[1:]))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "verify", fails)
        assert cli.main(command) == 1
    printed = capsys.readouterr().out
    tables = AuditTables.load(out)
    assert tables.labels == (bad.name, good.name)
    assert not tables.passed
    assert set(tables.verification["label"]) == {bad.name, good.name}
    failed = tables.verification.query("not passed")
    assert list(failed["label"]) == [bad.name]
    for name in TABLES[1:4]:
        assert set(getattr(tables, name)["label"]) == {good.name}
    assert not (out / bad.name).exists() or not any((out / bad.name).iterdir())
    results = printed[printed.index(f"{bad.name}: ", printed.index(f"{good.name}: corpus")) :]
    assert "FAILED" in results
    # After its verification, its name does not come again.
    after = results[results.index(f"{good.name}: ") :]
    assert bad.name not in after
    assert good.name in after
    page = page_of(out)
    rows = {int(number) for number in re.findall(r'data-row="audit:(\d+)"', page)}
    assert rows <= set(tables.audit.index)
    assert rows
    assert page.count(bad.name) > 0

    # With nothing wrong, the other is there as well, and what was there is as it was.
    assert cli.main(command) == 0
    whole = AuditTables.load(out)
    assert whole.passed
    assert list(dict.fromkeys(whole.audit["label"])) == [bad.name, good.name]
    of_good = whole.audit.query("label == @good.name").reset_index(drop=True)
    pd.testing.assert_frame_equal(of_good, tables.audit, check_exact=True)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {bad.name, good.name}


@pytest.mark.slow
def test_all_fail(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verify = stages_module.verify

    def fails(*arguments: Any, **named: Any) -> Any:
        found = verify(*arguments, **named)
        return replace(found, checks=(replace(found.checks[0], value=float("nan")),))

    monkeypatch.setattr(stages_module, "verify", fails)
    for name in ("census", "expert_metrics", "progressive", "redistribution"):
        monkeypatch.setattr(stages_module, name, lambda *a, **k: pytest.fail("measured without verification"))
    assert cli.main(["audit", str(checkpoint("mixtral")), *options]) == 1
    tables = AuditTables.load(tmp_path / "out")
    assert len(tables.verification) == 1
    assert all(getattr(tables, name).empty for name in TABLES[1:])
    assert "FAILED" in capsys.readouterr().out
    assert 'data-row="audit:' not in page_of(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_as_released(
    options: list[str],
    checkpoint: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    model_of: Callable[[str], Any],
    variant: str,
) -> None:
    out = tmp_path / "out"
    asked = [
        "--as-released",
        *SMALL,
        "--scope",
        "token",
        "sequence",
        "--no-progressive",
        "--no-redistribution",
    ]
    assert cli.main(["audit", str(checkpoint(variant)), *options, *asked]) == 0
    tables = AuditTables.load(out)
    of = tables.audit[["scope", "as_released"]].drop_duplicates()
    assert list(of.itertuples(index=False, name=None)) == [
        ("token", ""),
        ("token", variant),
        ("sequence", ""),
        ("sequence", variant),
    ]
    released = tables.audit.query("as_released != '' and family == 'metrics'")
    assert set(released["metric"]) == {
        "utilization_rate",
        "activation_norm",
        "mean_routing_weight",
        "activation_std",
    }
    assert tables.progressive.empty
    assert tables.redistribution.empty
    model = model_of(variant)
    theirs = expert_metrics(
        model,
        batches_of(model, corpus),
        metrics=list(released["metric"].unique()),
        as_released=variant,
        layers=(1,),
    )
    direct = audit(Census.load(out / checkpoint(variant).name / "census-sequence"), theirs).cells
    ours = tables.audit.query("scope == 'sequence' and as_released != ''").drop(columns="label")
    pd.testing.assert_frame_equal(
        ours.reset_index(drop=True), direct.assign(model=str(checkpoint(variant))), check_exact=True
    )


# ---- censuses ----


@pytest.mark.slow
def test_a_census_that_is_there(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder that `moe-lens census` wrote, or the one within; the model is the one that it names, or is said."""
    given = checkpoint("qwen2_moe")
    made = tmp_path / "made"
    options = [*options, "--positions", "20"]
    census_options = ["--layers", "1", "--predictors", "first_order", "--output", str(made)]
    assert cli.main(["census", str(given), *options, *census_options]) == 0
    metrics = ["--metrics", "activation_norm", "random"]
    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "census", lambda *a, **k: pytest.fail("a census was made"))
        for name, folder, more in (
            ("around", made, []),
            ("within", made / "census", []),
            ("said", made, ["--checkpoint", str(given)]),
        ):
            out = tmp_path / name
            assert cli.main(["audit", str(folder), *options, *metrics, *more, "--output", str(out)]) == 0
            found[name] = AuditTables.load(out)
            assert found[name].labels == (given.name,)
            assert not list(out.glob("*/census*"))
        assert_same(found["around"], found["within"])
        assert_same(found["around"], found["said"])
    # It is the audit of that census, and the same as one that makes its own.
    own = tmp_path / "own"
    assert cli.main(["audit", str(given), *options, *metrics, "--layers", "1", "--output", str(own)]) == 0
    assert_same(found["around"], AuditTables.load(own))

    # Beside its own model both have what was given as labels, since their names are one.
    command = ["audit", str(made), str(given), *options, *metrics, "--layers", "1"]
    assert cli.main(command) == 0
    both = AuditTables.load(tmp_path / "out")
    assert both.labels == (str(made), str(given))
    n = len(both.audit) // 2
    halves = [both.audit.iloc[:n], both.audit.iloc[n:]]
    pd.testing.assert_frame_equal(
        *(half.drop(columns="label").reset_index(drop=True) for half in halves), check_exact=True
    )


@pytest.mark.slow
def test_a_census_of_another_model(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tmp_path / "made"
    command = ["census", str(checkpoint("olmoe")), *options, "--layers", "1", "--positions", "10"]
    assert cli.main([*command, "--output", str(made)]) == 0
    other = str(checkpoint("olmoe_gqa_clip"))
    message = error_of(capsys, ["audit", str(made), "--checkpoint", other, *options])
    assert "both must be the same, in the same dtype" in message
    header = made / "census" / HEADER
    text = header.read_text()
    header.write_text(text.replace(str(checkpoint("olmoe")), str(tmp_path / "gone")))
    if header.read_text() != text:
        assert "gone" in error_of(capsys, ["audit", str(made), *options])


# ---- the published settings ----


@pytest.mark.slow
def test_as_published(
    options: list[str],
    sixteen: Path,
    wiki: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    # The tiny model's context is shorter than the published cut.
    asked = ["--corpus", f"lines:{wiki}", "--max-length", "36", "--scope", "token", "sequence"]
    fewer = ["--positions", "60", "--cell-positions", "50", "--no-redistribution"]
    assert cli.main(["audit", str(sixteen), *options, "--as-published", *asked, *fewer]) == 0
    tables = AuditTables.load(out)
    published = tables.published
    assert set(tables.audit["layer"]) == {0, 4, 7, 11, 15}
    assert set(tables.progressive["layer"]) == {0, 1, 7, 8, 9, 15}
    (of,) = tables.provenance
    assert [found["settings"]["n"] for found in of["audits"]] == [50, 50]
    assert of["progressive"]["sample"] == {"n": 500, "seed": 0, "per_document": 1, "min_context": 32}
    assert of["progressive"]["corpus"].startswith("causal-audit-progressive (wiki.test.raw)")
    assert of["audits"][0]["census"]["corpus"].startswith("causal-audit (wiki.test.raw)")
    for corpus in (of["progressive"]["corpus"], of["audits"][0]["census"]["corpus"]):
        assert corpus.endswith("tokens with the tokenizer's own special tokens")
    # Each cell by two scopes; here three experts are active, so k ends at 2.
    named = published.query("ours_row != ''")
    assert published["table"].value_counts().to_dict() == {1: 80, 4: 40, 8: 42, 9: 12}
    assert named["table"].value_counts().to_dict() == {1: 80, 4: 40, 8: 12}
    assert set(named.query("family == 'progressive'")["removed"]) == {1, 2}
    files = {name: pd.read_parquet(out / f"{name}.parquet") for name in TABLES}
    columns = {"d": "d", "p_t": "p_t_plain", "p_wilcoxon": "p_wilcoxon_plain", "rho": "rho"}
    columns |= {"mean": "delta_loss"}
    for line in named.to_dict("records"):
        table, number = line["ours_row"].split(":")
        row = files[table].iloc[int(number)]
        assert (row["label"], row["layer"]) == (sixteen.name, line["layer"])
        value = row[columns[line["quantity"]]]
        assert line["ours"] == value or (pd.isna(line["ours"]) and pd.isna(value))
    assert named["ours"].notna().mean() > 0.9
    assert named.query("table == 1")["ours_sampling"].str.contains(" pairs of 50 positions ").all()
    assert named.query("table == 8")["ours_sampling"].str.startswith("500 positions, drawn ").all()
    shown = set(re.findall(r'data-row="(published:\d+)"', page_of(out)))
    assert shown
    assert shown <= {f"published:{i}" for i in range(len(published))}


# ---- a run that was stopped ----


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["census", "expert_metrics", "progressive", "redistribution"])
def test_a_killed_run_goes_on(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    command = ["audit", str(checkpoint("mixtral")), *options, *SMALL, "--positions", "30"]
    out = tmp_path / "out"

    def dies(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, stage, dies)
        assert cli.main(command) == 130
    assert "goes on from it with the same command" in capsys.readouterr().err
    assert not (out / "index.html").exists()
    assert not list(out.glob("*.parquet"))
    before = files_of(out)
    assert cli.main(command) == 0
    after = files_of(out)
    assert {path: after[path] for path in before} == before
    assert len(after) > len(before)
    whole = [*command, "--output", str(tmp_path / "whole")]
    assert cli.main(whole) == 0
    assert_same(AuditTables.load(out), AuditTables.load(tmp_path / "whole"))
    text = capsys.readouterr().out.split("checks against transformers passed")
    assert text[1].split("tables and page")[0] == text[2].split("tables and page")[0]


@pytest.mark.slow
def test_a_folder_in_use_or_of_another_run(
    options: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = checkpoint("mixtral")
    command = ["audit", str(given), *options, *SMALL, "--no-progressive", "--no-redistribution"]
    rows_of, done = census_module.rows_of, []

    def dies(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return rows_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(census_module, "rows_of", dies)
        assert cli.main(command) == 130
    folder = tmp_path / "out" / given.name / "census-token"
    assert Census.load(folder, allow_unfinished=True).n_documents == 2
    message = error_of(capsys, ["audit", str(folder), *options])
    assert "finished" in message
    assert str(folder) in message
    lock = FolderLock(folder)
    assert "is being written by" in error_of(capsys, command)
    lock.release()
    assert cli.main(command) == 0
    assert len(Census.load(folder)) > 0
    assert "is of another run" in error_of(capsys, [*command, "--seed", "4"])
    assert "is of another run" in error_of(capsys, [*command, "--metrics", "random"])
    assert cli.main(command) == 0


# ---- what is refused ----

Given = Callable[[str], Path]


def refused() -> list[tuple[str, list[str], str]]:
    """Name, what comes after the models, and the message."""
    return [
        ("metric", ["--metrics", "nothing"], "there is no metric 'nothing'"),
        ("corpus", ["--corpus", "nowhere.jsonl"], "'nowhere.jsonl' is no corpus"),
        ("metrics corpus", ["--metrics-corpus", "nowhere.txt"], "'nowhere.txt' is no corpus"),
        ("published corpus", ["--as-published", "--corpus", "bundled"], "is a preset on a preset"),
        ("memory", ["--memory-budget", "0"], "--memory-budget 0.0 must be a positive number"),
        ("positions", ["--positions", "0"], "--positions=0 must be"),
        ("cell positions", ["--cell-positions", "-3"], "--cell-positions=-3 must be"),
        ("compare", ["--compare", "0"], "--compare=0 must be"),
        ("compare with fewer", ["--compare", "2"], "--compare 2 needs 4 active routed experts"),
        ("smallest effect", ["--smallest-effect", "0"], "smallest_effect=0.0 must be a positive"),
        ("seed", ["--seed", "-1"], "--seed=-1 must"),
        ("device", ["--device", "abacus"], "'abacus' is no device"),
        ("layers", ["--layers", "9"], "layer"),
        ("checkpoint", ["--checkpoint", "mini"], "--checkpoint names 1 models, and 0 censuses are given"),
        ("released", ["--as-released"], "--as-released: the released code has definitions for olmoe"),
        ("published", ["--as-published"], "the published audit is of olmoe, qwen2_moe, deepseek_v2; "),
    ]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in refused()], ids=[case[0] for case in refused()]
)
@pytest.mark.usefixtures("no_weight_is_read")
def test_refused_before_a_weight_is_read(
    options: list[str],
    checkpoint: Given,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    """Also where a model before it would be right."""
    assert message in error_of(capsys, ["audit", str(checkpoint("mixtral")), *options, *changes])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weight_is_read")
def test_the_last_model_is_found_wrong_before_the_first_runs(
    options: list[str], checkpoint: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(checkpoint("olmoe"))
    missing = str(tmp_path / "none")
    assert "is no checkpoint" in error_of(capsys, ["audit", good, missing, *options])
    command = ["audit", good, str(checkpoint("mixtral")), *options]
    assert "and none" not in error_of(capsys, [*command, "--as-released"])
    assert "mixtral" in error_of(capsys, [*command, "--as-released"])
    assert "no layer 4, 7, 11, 15 here" in error_of(capsys, [*command, "--as-published"])
    # Layer 2 is the first model's alone.
    assert "2" in error_of(capsys, [*command, "--layers", "2"])
    (tmp_path / "empty").mkdir()
    assert "config.json" in error_of(capsys, ["audit", good, str(tmp_path / "empty"), *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weight_is_read")
def test_one_thing_twice_and_a_file_for_the_output(
    options: list[str],
    checkpoint: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = checkpoint("olmoe")
    monkeypatch.chdir(given.parent)
    for other in (str(given), f"{given}/", given.name, f"./{given.name}"):
        message = error_of(capsys, ["audit", str(given), other, *options])
        assert message.startswith("each model or census is given once, not ")
    assert "given once" in error_of(capsys, ["audit", "mini", "mini", *options])
    (tmp_path / "file").write_text("")
    message = error_of(capsys, ["audit", str(given), *options, "--output", str(tmp_path / "file")])
    assert "is a file, and a folder is wanted" in message
    with pytest.raises(SystemExit):
        cli.main(["audit", str(given), "--corpus", "bundled-demo"])
    with pytest.raises(SystemExit):
        cli.main(["audit", *options])


@pytest.fixture
def made(options: list[str], checkpoint: Given, tmp_path: Path) -> Path:
    """What `moe-lens census` writes."""
    folder = tmp_path / "made"
    command = ["census", str(checkpoint("mixtral")), *options, "--layers", "1", "--positions", "12"]
    assert cli.main([*command, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def only_censuses(made: Path, request: pytest.FixtureRequest) -> Path:
    """From here on no weight is read."""
    request.getfixturevalue("no_weight_is_read")
    return made


def test_what_is_of_a_census_that_is_there(
    options: list[str],
    only_censuses: Path,
    checkpoint: Given,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = str(only_censuses)
    for name, value in (("scope", "sequence"), ("how", "reroute")):
        message = error_of(capsys, ["audit", made, *options, f"--{name}", value])
        assert message.startswith(f"--{name} is for a census that is to be made, and cannot be given")
        assert made in message
    message = error_of(capsys, ["audit", made, *options, "--layers", "0"])
    assert message.endswith("has no layer 0; it is of layers 1")
    model = str(checkpoint("mixtral"))
    message = error_of(capsys, ["audit", made, *options, "--checkpoint", model, model])
    assert "--checkpoint names 2 models, and 1 censuses are given" in message
    message = error_of(capsys, ["audit", made, f"{made}/census", *options])
    assert message.startswith("each model or census is given once")
    other = tmp_path / "copied"
    shutil.copytree(made, other)
    message = error_of(capsys, ["audit", made, str(other), *options, "--checkpoint", model])
    assert "--checkpoint names 1 models, and 2 censuses are given" in message
    gone = str(tmp_path / "gone")
    assert "is no checkpoint" in error_of(capsys, ["audit", made, *options, "--checkpoint", gone])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--scope", "token", "token"], "--scope names each scope once"),
        (
            ["--positions", "20", "--cell-positions", "21"],
            "--cell-positions 21 are drawn of a census, and --positions 20",
        ),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
@pytest.mark.usefixtures("no_weight_is_read")
def test_asked_for_what_cannot_be(
    options: list[str],
    asked: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in error_of(capsys, ["audit", "mini", *options, *asked])


# ---- names ----


def test_labels_are_their_own() -> None:
    assert _labels({"a/x": "a/x", "b/y": "b/y"}) == {"a/x": "a/x", "b/y": "b/y"}
    assert _labels({"c1": "mini", "c2": "mini", "z": "z"}) == {"c1": "c1", "c2": "c2", "z": "z"}


def test_labels_where_short_names_and_what_was_given_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two censuses of one model are called by their folders, and one is named as another model's directory is."""
    for name in ("models/one", "models/c1", "c1", "c2", "other/one"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert _labels({"models/one": "models/one"}) == {"models/one": "one"}
    assert _labels({"models/one": "models/one", "other/one": "other/one"}) == {
        "models/one": "models/one",
        "other/one": "other/one",
    }
    wheres = {"c1": "models/one", "c2": "models/one", "models/c1": "models/c1"}
    assert _labels(wheres) == {name: name for name in wheres}
    # A name of dots is that of the directory.
    monkeypatch.chdir(tmp_path / "models" / "one")
    assert _labels({".": "."}) == {".": "one"}


def test_folders_are_their_own() -> None:
    assert _folder_names(["OLMoE-1B-7B-0924"]) == ["OLMoE-1B-7B-0924"]
    assert _folder_names(["a/x", "a--x", "a x", "A/X"]) == ["a--x", "a--x-2", "a--x-3", "A--X-4"]
    assert _folder_names(["./x", "../x", "/x", ".."]) == ["x", "x-2", "x-3", "model"]
    for name in _folder_names(["../../etc", "..\\up", "a\nb", EVIL]):
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name)


@pytest.mark.slow
def test_names_and_corpora_are_escaped(
    checkpoint: Given, corpus: Path, options: list[str], tmp_path: Path
) -> None:
    evil = tmp_path / EVIL
    shutil.copytree(checkpoint("mixtral"), evil)
    text = tmp_path / f"{EVIL}.jsonl"
    text.write_text(corpus.read_text().replace("residual", EVIL))
    out = tmp_path / "out"
    assert cli.main(["audit", str(evil), *options, *SMALL, "--positions", "20", "--corpus", str(text)]) == 0
    page = page_of(out)
    assert "<img" not in page
    assert escape(EVIL) in page
    assert AuditTables.load(out).labels == (EVIL,)
    # What is kept of it stays in the output folder.
    assert len([path for path in out.iterdir() if path.is_dir()]) == 1


# ---- dtype, and documents of the metrics ----


@pytest.mark.slow
def test_metrics_of_other_documents(
    options: list[str],
    checkpoint: Given,
    tmp_path: Path,
    model_of: Callable[[str], Any],
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{i} {SENTENCES[i % 3] * 2}" for i in range(9)))
    out = tmp_path / "out"
    alone = ["--no-progressive", "--no-redistribution", "--metrics-corpus", f"lines:{other}"]
    given = checkpoint("mixtral")
    assert cli.main(["audit", str(given), *options, *SMALL, *alone]) == 0
    (of,) = AuditTables.load(out).provenance
    assert of["audits"][0]["same_corpus"] is False
    model = model_of("mixtral")
    theirs = expert_metrics(
        model, batches_of(model, other), metrics=["activation_norm", "random"], layers=(1,)
    )
    direct = audit(Census.load(out / given.name / "census-token"), theirs).cells
    ours = AuditTables.load(out).audit.drop(columns="label")
    pd.testing.assert_frame_equal(ours, direct.assign(model=str(given)), check_exact=True)


@pytest.mark.slow
def test_the_dtype_of_a_census_is_its_models(options: list[str], checkpoint: Given, tmp_path: Path) -> None:
    """A census in float32 of a checkpoint in bfloat16: without --dtype the model is loaded as the census was."""
    given = checkpoint("olmoe_bf16")
    made, out = tmp_path / "made", tmp_path / "out"
    command = ["census", str(given), *options, "--layers", "1", "--positions", "40", "--output", str(made)]
    assert cli.main(command) == 0
    without = [word for word in options if word not in ("--dtype", "float32")]
    asked = ["--metrics", "random", "--no-progressive", "--no-redistribution"]
    assert cli.main(["audit", str(made), *without, *asked]) == 0
    (of,) = AuditTables.load(out).provenance
    assert of["verified"]["dtype"] == "float32"
    assert Census.load(made / "census").provenance["dtype"] == str(torch.float32).removeprefix("torch.")

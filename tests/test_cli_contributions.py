"""`moe-lens contributions`: what it writes is what it measured, it goes on after a kill, and it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens import cli
from moe_lens.corpus import bos_by_default, read_jsonl, token_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.streaming import ContributionAccumulator

SENTENCE = "The router sends every token to the experts whose readouts score it highest. "
N_DOCUMENTS = 7


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i}: {SENTENCE * (1 + i % 3)}"}) for i in range(N_DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def command(checkpoint: Callable[[str], Path], corpus: Path, tmp_path: Path) -> list[str]:
    """The command for a tiny model; of two options of one name, the later counts."""
    model = str(checkpoint("qwen2_moe"))
    given = ["--corpus", str(corpus), "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]
    return ["contributions", model, *given, "--output", str(tmp_path / "out")]


def loaded(folder: Path, by: str) -> RoutingContributions:
    return RoutingContributions.load(folder / f"{by}.safetensors")


def assert_same(a: RoutingContributions, b: RoutingContributions) -> None:
    for when_active in (False, True):
        mine, its = a.to_frame(when_active=when_active), b.to_frame(when_active=when_active)
        pd.testing.assert_frame_equal(mine, its, check_exact=True)
    assert a.provenance["fingerprints"] == b.provenance["fingerprints"]
    assert (a.n_documents, a.n_tokens) == (b.n_documents, b.n_tokens)


def test_what_is_written_is_what_was_measured(
    command: list[str],
    corpus: Path,
    tmp_path: Path,
    model_of: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    granularities = ["layer", "head", "source", "expert", "neuron"]
    assert cli.main([*command, "--by", *granularities]) == 0
    printed = capsys.readouterr().out
    model, out = model_of("qwen2_moe"), tmp_path / "out"
    batches = token_batches(
        model, read_jsonl(corpus), batch_size=2, prepend_bos=bos_by_default(model), truncate=True
    )
    direct = routing_contributions(model, batches, by=granularities)
    wanted = {f"{by}.{kind}" for by in granularities for kind in ("parquet", "safetensors")}
    assert {path.name for path in out.iterdir()} == {*wanted, "index.html", "state.safetensors"}
    for by in granularities:
        result = loaded(out, by)
        assert_same(result, direct[by])
        assert result.closes
        assert result.n_documents["lead"] == N_DOCUMENTS
        table = pd.read_parquet(out / f"{by}.parquet")
        assert list(table.columns) == ["tokens", *result.to_frame().columns]
        for tokens in ("all", "active"):
            frame = result.to_frame(when_active=tokens == "active").assign(tokens=tokens)
            order = ["tokens", "position", "sender", "receiver"]
            mine, its = (
                rows.sort_values(order).reset_index(drop=True)
                for rows in (table[table.tokens == tokens], frame[table.columns])
            )
            pd.testing.assert_frame_equal(mine, its, check_exact=True, check_dtype=False)
        last = result.receivers[-1]
        top = result.top(last, n=len(result.senders))
        divided = [s for s in top.sender if result.senders.group_of(result.senders.index(s)).kind != "whole"]
        first = top[top.sender.isin(divided)].iloc[0] if divided else top.iloc[0]
        assert f"by {by}: largest variance at {last}: {first.sender} {first.variance:.3g}" in printed
        assert f"<h2>Senders by {by}</h2>" in (page := (out / "index.html").read_text(encoding="utf-8"))
    assert 'id="routing-page"' in page
    assert f"means over\n{N_DOCUMENTS} documents" in page


class Killed(KeyboardInterrupt):
    pass


@contextmanager
def killed_in_batch(monkeypatch: pytest.MonkeyPatch, n: int) -> Iterator[None]:
    """A kill in the middle of the n-th forward pass, with everything before it saved."""
    from moe_lens.routing import runs

    listening, made = ContributionAccumulator.listening, []

    @contextmanager
    def dies(self: ContributionAccumulator, *args: Any, **settings: Any) -> Iterator[Any]:
        made.append(1)
        with listening(self, *args, **settings) as inside:
            if len(made) == n:
                raise Killed
            yield inside

    with monkeypatch.context() as patch:
        patch.setattr(ContributionAccumulator, "listening", dies)
        patch.setattr(runs.Run, "__init__", _saves_every_batch(runs.Run.__init__))
        yield


def _saves_every_batch(made: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        self.save_every = 0.0

    return init


def test_a_killed_run_goes_on(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*command, "--by", "layer", "expert"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    with killed_in_batch(monkeypatch, 3):
        assert cli.main(arguments) == 130
    assert {path.name for path in out.iterdir()} == {"state.safetensors"}

    n_forwards = count_batches(monkeypatch)
    assert cli.main(arguments) == 0
    # Four batches, two of them done before.
    assert len(n_forwards) == 2
    assert cli.main([*arguments, "--output", str(whole)]) == 0
    assert len(n_forwards) == 2 + 4
    for by in ("layer", "expert"):
        assert_same(loaded(out, by), loaded(whole, by))
        same = [pd.read_parquet(folder / f"{by}.parquet") for folder in (out, whole)]
        pd.testing.assert_frame_equal(*same, check_exact=True)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    listening = ContributionAccumulator.listening

    def counted(self: ContributionAccumulator, *args: Any, **settings: Any) -> Any:
        made.append(1)
        return listening(self, *args, **settings)

    monkeypatch.setattr(ContributionAccumulator, "listening", counted)
    return made


def test_a_state_of_another_corpus_is_refused(
    command: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0
    corpus.write_text(json.dumps({"text": "Another text. " + SENTENCE}) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(command) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("moe-lens: error: ")
    assert "state.safetensors" in printed


def test_receivers_experts_and_rank_shift(command: list[str], tmp_path: Path) -> None:
    chosen = ["--receivers", "0", "1", "--experts", "0", "2", "5", "--by", "head", "expert"]
    assert cli.main([*command, *chosen]) == 0
    result = loaded(tmp_path / "out", "head")
    assert result.receivers == ("M0", "M1")
    assert result.provenance["experts"] == [0, 2, 5]
    first = [*command, "--output", str(tmp_path / "first")]
    assert cli.main([*first, "--receivers", "0", "--by", "expert", "--rank-shift"]) == 0
    result = loaded(tmp_path / "first", "expert")
    assert result.receivers == ("M0",)
    assert "aarv" in result.measures
    # No expert comes before the first router, and the page says so.
    page = (tmp_path / "first" / "index.html").read_text(encoding="utf-8")
    assert "<td>M0</td><td>none comes before it</td>" in page


def test_text_leads(command: list[str], tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    with_bos = tmp_path / "with_bos"
    assert cli.main([*command, "--output", str(with_bos)]) == 0
    assert cli.main([*command, "--text-leads"]) == 0
    first, text = loaded(with_bos, "layer"), loaded(tmp_path / "out", "layer")
    assert first.provenance["lead_token"] != text.provenance["lead_token"]
    assert text.n_documents["lead"] == N_DOCUMENTS
    assert text.n_tokens["lead"] == first.n_tokens["lead"] == N_DOCUMENTS
    assert text.n_tokens["rest"] == first.n_tokens["rest"] - N_DOCUMENTS
    # One BOS leads all documents alike; their first tokens of text differ.
    assert np.nanmax(first.standard_error("variance")["lead"]) < 1e-9
    assert np.nanmax(text.standard_error("variance")["lead"]) > 1e-6


def test_half_precision(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--dtype", "bfloat16", "--by", "layer", "head"]) == 0
    result = loaded(tmp_path / "out", "head")
    assert result.rounding_ratio is not None
    assert 0 < result.rounding_ratio <= 1
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"rounding is at most {result.rounding_ratio:.2g} of what rounding can be" in page
    assert "not all that the routers read.</b>" not in page
    assert "of what rounding can be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--corpus", "no-such-corpus"], "no-such-corpus"),
        (["--corpus", "absent.jsonl"], "absent.jsonl"),
        (["--corpus", "bundled", "--text-field", "body"], "text_field"),
        (["--experts", "most"], "--experts most: give all, selected, or the numbers of experts"),
        (["--experts", "all", "3"], "--experts all 3: give all, selected"),
        (["--experts", "99"], "99"),
        (["--experts", "0", "1", "--rank-shift"], "rank_shift"),
        (["--receivers", "99"], "99"),
        (["--n", "1000"], "1000"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--text-field", "body"], "body"),
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


def test_the_output_is_a_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a file"
    file.write_text("mine")
    assert cli.main([*command, "--output", str(file)]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed == f"moe-lens: error: --output {str(file)!r} is a file, and a folder is wanted"
    assert file.read_text() == "mine"


def test_an_unknown_granularity_is_a_usage_error(command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--by", "router"])
    assert exit_.value.code == 2

"""The page stands alone and trusts no name; figures show what they say; the command line tells what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE, cli
from moe_lens.audit import audit, expert_metrics
from moe_lens.audit.audit_tables import AuditTables
from moe_lens.corpus import Document, TokenBatches, bos_by_default, token_batches
from moe_lens.demo import DemoResult, run_demo
from moe_lens.plots import load_heatmap, stripes
from moe_lens.report import report_html, write_report

EVIL = "<script>alert('moe')</script>"
SENTENCE = "The router sends every token to the experts whose readouts score it highest. "


def corpus(n: int = 42) -> list[Document]:
    return [Document(f"{EVIL} {i}", f"<b>topic {i % 3}</b>", SENTENCE * 6 + str(i)) for i in range(n)]


@pytest.fixture(scope="module")
def result(checkpoint: Callable[[str], Path]) -> DemoResult:
    return run_demo(checkpoint("olmoe"), documents=corpus(), device="cpu", verbose=False)


@pytest.fixture(scope="module")
def page(result: DemoResult) -> str:
    return report_html(replace(result, cfg=replace(result.cfg, model_name=EVIL)))


class _Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_loads_nothing(page: str) -> None:
    tags = _Tags(page).tags
    assert not [attributes for _, attributes in tags if attributes.get("src")]
    # Links lead to places of the page itself.
    links = {str(attributes["href"]) for _, attributes in tags if "href" in attributes}
    assert links <= {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "img", "object", "embed", "base")]
    assert "@import" not in page.split("<script>")[0]
    policies = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert (policies[0] or "").startswith("default-src 'none'")


def test_names_are_escaped(page: str) -> None:
    assert EVIL not in page
    assert "&lt;script&gt;alert" in page
    assert "<b>topic" not in page
    scripts = [tag for tag, _ in _Tags(page).tags if tag == "script"]
    assert len(scripts) == page.count("<script") - len(re.findall(r"<script", _script_bodies(page)))


def _script_bodies(page: str) -> str:
    return "".join(re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL))


def test_page_shows_everything(result: DemoResult, page: str) -> None:
    assert page.count('class="plotly-graph-div"') == 11 + 5  # with those of the audit
    for check in result.verification.checks:
        assert check.name in page
    assert f"{result.loss:.3f}" in page
    assert f"{result.completeness_error:.1e}" in page
    assert f"{result.n_tokens:,} tokens" in page
    assert result.decisions.json in page
    assert page.count('id="routing-page"') == 1


def test_result(result: DemoResult) -> None:
    assert result.passed
    assert result.completeness_error <= 1e-5
    assert result.decisions.n_documents == 6
    assert result.contributions.n_documents == {"lead": 42, "rest": 42}
    assert result.load.n_tokens == result.n_tokens == int(result.documents["tokens"].to_numpy().sum())
    losses = result.documents["loss"].to_numpy()
    weights = result.documents["tokens"].to_numpy() - 1
    assert result.loss == pytest.approx(float(np.average(losses, weights=weights)))
    top = result.top_senders("ans", n=2)
    first, second = top["mean"].abs().tolist()
    assert first >= second
    for word in ("nats per token", "variance", "aps", "ans", "expert load", "census:", "audit, ", "time:"):
        assert word in result.summary()
    assert not replace(result, completeness_error=2e-5).passed


def test_the_census_is_of_every_position(result: DemoResult, page: str) -> None:
    cfg = result.cfg
    n_positions = result.n_tokens - len(result.documents)
    assert result.census is not None
    assert len(result.census) == n_positions * cfg.top_k * len(cfg.moe_layers)
    assert result.census.identity["sample"] is None
    assert f"census: {len(result.census):,} ablations" in result.summary()
    assert "at every position; mean change of the loss in nats: rank 1 " in result.summary()
    top = result.census.top(10)
    assert [change.delta_loss for change in result.largest_changes] == top["delta_loss"].tolist()
    for change, row in zip(result.largest_changes, top.itertuples(), strict=True):
        assert change.document == result.documents["document"].iloc[row.document]
        assert f"<td>M{row.layer}E{row.expert}</td>" in page
        assert f"position {row.position}" in page
    assert page.count("<mark>") == 1 + 10
    # The documents' names, in attributes here, hold markup too.
    assert 'title="&lt;script&gt;alert(&#x27;moe&#x27;)&lt;/script&gt; ' in page


def test_the_audit_is_of_the_census(result: DemoResult, page: str) -> None:
    (found,) = result.audit.audits
    assert result.census is not None
    table = expert_metrics(*_model_and_corpus(result))
    pd.testing.assert_frame_equal(found.cells, audit(result.census, table).cells, check_exact=True)
    assert set(found.cells.loc[found.cells["family"] == "control", "metric"]) == {
        "routing_weight",
        "first_order",
    }
    assert result.audit.progressive is not None
    n_positions = result.n_tokens - len(result.documents)
    assert result.audit.progressive.to_frame()["n_rows"].unique().tolist() == [min(n_positions, 4_000)]
    assert result.tables.audit["d"].equals(found.cells["d"])
    for verdict, n in found.cells.loc[found.cells["family"] == "metrics", "verdict"].value_counts().items():
        assert f"{n} {verdict}" in result.summary()
    for name in ("mean_gap_norm", "first_order"):
        assert name in page


def _model_and_corpus(result: DemoResult) -> tuple[HookedMoE, TokenBatches]:
    model = HookedMoE.from_pretrained(result.audit.model, dtype=torch.float32, device="cpu", verbose=False)
    return model, token_batches(
        model,
        corpus(),
        batch_size=8,
        max_length=min(512, model.cfg.n_ctx),
        prepend_bos=bos_by_default(model),
        truncate=True,
    )


def test_nothing_is_measured_without_verification(result: DemoResult) -> None:
    check = replace(result.verification.checks[1], value=1.0)
    failed = replace(result.audit, verification=replace(result.verification, checks=(check,)))
    failed = replace(failed, censuses=(), audits=(), progressive=None, redistribution=None)
    without = replace(result, audit=failed, tables=AuditTables.of([failed]), largest_changes=[])
    assert not without.passed
    assert "census:" not in without.summary()
    assert "audit, " not in without.summary()
    page = report_html(without)
    assert "its experts were not tested" in page
    assert page.count('class="plotly-graph-div"') == 11 - 4


def test_a_large_model_is_sampled(hooked: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lens import demo
    from moe_lens.corpus import token_batches

    batches = token_batches(hooked("olmoe"), corpus(5), batch_size=2, truncate=True)
    assert demo._n_census_positions(hooked("olmoe"), batches) is None
    some = []
    for flops in (1e9, 5e8, 1.0):
        monkeypatch.setattr(demo, "_CENSUS_FLOPS", flops)
        some.append(demo._n_census_positions(hooked("olmoe"), batches))
    assert some[2] == 1
    assert some[0] == pytest.approx(2 * some[1], abs=1)
    assert some[1] > 1


def test_stripes(result: DemoResult) -> None:
    for measure in ("variance", "aps", "ans"):
        for position in ("lead", "rest"):
            figure = stripes(result.contributions, measure, position)
            heat: Any = figure.data[0]
            np.testing.assert_array_equal(heat.z, result.contributions.measure(measure)[position].T)
            assert figure.layout.xaxis.title.text == "sender"
            assert figure.layout.yaxis.title.text == "receiving router"
            if measure == "variance":
                assert heat.zmin == 0
            else:
                assert heat.zmid == 0
                assert heat.zmin == -heat.zmax
            assert np.nanmax(np.abs(heat.z)) <= heat.zmax
    with pytest.raises(ValueError, match="position must be one of"):
        stripes(result.contributions, "aps", "middle")


def test_load_heatmap_marks_the_even_share(result: DemoResult) -> None:
    heat: Any = load_heatmap(result.load).data[0]
    assert heat.zmid == 100 * 4 / 8
    assert "50.0 even" in heat.colorbar.ticktext
    np.testing.assert_allclose(heat.z, 100 * result.load.shares)


def test_demo_refuses_too_little(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="needs 40 documents; there are 3"):
        run_demo(checkpoint("olmoe"), documents=corpus(3), verbose=False)
    short = [Document(str(i), "t", "Mary") for i in range(40)]
    with pytest.raises(ValueError, match="needs 8000 tokens"):
        run_demo(checkpoint("olmoe"), documents=short, device="cpu", verbose=False)


# ---- the command line ----


def test_verify_command(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([SENTENCE * 3] * 4))
    path = str(checkpoint("olmoe"))
    assert cli.main(["verify", path, "--device", "cpu", "--dtype", "float32", "--text-file", str(text)]) == 0
    assert "12 of 12 checks passed" in capsys.readouterr().out


def test_verify_command_fails_with_one(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_lens.model.hooked_moe import HookedMoE

    load = HookedMoE.from_pretrained

    def doctored(*args: object, **kwargs: object) -> HookedMoE:
        model = load(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            model.unembed.weight.mul_(1.1)
        return model

    monkeypatch.setattr(HookedMoE, "from_pretrained", doctored)
    assert cli.main(["verify", str(checkpoint("olmoe")), "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "/nowhere/at/all"], "no checkpoint"),
        (["verify", "mini", "--device", "toaster"], "'toaster' is no device"),
        (["verify", "mini", "--text-file", "absent.txt"], "no text file absent.txt"),
        (["demo", "--output", "/nowhere/at/all/report.html"], "no folder"),
        (["demo", "--model", "/nowhere/at/all"], "no checkpoint"),
    ],
)
def test_one_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("moe-lens: error: ")
    assert message in printed
    assert "\n" not in printed


def test_write_report(result: DemoResult, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(result, tmp_path / "absent" / "report.html")


@pytest.mark.slow
def test_demo_command_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    assert cli.main(["demo", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "checks passed" in printed
    assert "FAIL" not in printed
    assert output.stat().st_size > 1e6

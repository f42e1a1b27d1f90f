"""The demo's result as one page of HTML that needs nothing else: no network, no server, no other file.

Everything that comes from outside (names, topics, text) is escaped; plotly's script is inside the page; and a
content security policy forbids the page to load anything at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_lens.audit.checks import Check
from moe_lens.demo import COMPLETENESS_TOLERANCE, DemoResult
from moe_lens.plots import MEASURE_NAMES, UNITS, load_heatmap, stripes

# Two figures beside each other only where their columns can still be told apart.
_MOST_SENDERS_SIDE_BY_SIDE = 40

# The measures that the page shows as stripes, and how to read them.
_HOW_TO_READ = {
    "variance": "How unequally a sender treats the experts of a router: 0 means that it adds the same to all, and "
    "so cannot change the choice. A vertical stripe is a component that many later routers listen to.",
    "aps": "How much a sender raises the experts that it raises, averaged over all experts. It is read beside ANS, "
    "on the same colours: a component may promote, inhibit, or do both.",
    "ans": "How much a sender lowers the experts that it lowers, averaged over all experts. What is as negative "
    "here as it is positive above sorts the experts; what is lopsided shifts all of them.",
}

_CSS = """
:root { --ink: #1f2933; --muted: #61707f; --line: #e3e8ee; --good: #1d7a46; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fbfcfd; color: var(--ink); line-height: 1.55; font-size: 15px;
  font-family: Inter, "Helvetica Neue", Helvetica, Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 8px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 28px 0 2px; }
p { max-width: 46em; margin: 6px 0 12px; }
.lead, .note, .facts dt { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 26px 0 8px; }
.card { background: white; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.figures { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .figures.pair { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.figure { background: white; border: 1px solid var(--line); border-radius: 8px; padding: 8px 10px 2px; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: white; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details summary { cursor: pointer; color: var(--muted); margin: 8px 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 12px 0; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
"""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(result: DemoResult, path: str | Path) -> Path:
    """Write the page.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write the report into")
    path.write_text(report_html(result), encoding="utf-8")
    return path


def report_html(result: DemoResult) -> str:
    """The page as text."""
    name = escape(result.cfg.model_name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Routing of {name}</title>
<style>{_CSS}</style>
<script>{get_plotlyjs()}</script>
</head>
<body><main>
<h1>What decides the routing of {name}</h1>
<p class="lead">Every router's scores, taken apart exactly into what the embedding and each attention and MoE layer
wrote, over {result.n_tokens:,} tokens of {len(result.documents)} held-out documents.</p>
{_cards(result)}
{_stripes_section(result)}
{_load_section(result)}
{_verification_section(result)}
{_facts_section(result)}
</main></body>
</html>
"""


def _cards(result: DemoResult) -> str:
    checks = result.verification.checks
    n_passed = sum(check.passed for check in checks)
    cards = [
        (f"{result.loss:.3f}", "nats per token, mean loss", ""),
        (
            f"{result.completeness_error:.1e}",
            f"largest error of the sums (tolerance {COMPLETENESS_TOLERANCE:.0e})",
            "good" if result.closes else "bad",
        ),
        (
            f"{n_passed} of {len(checks)}",
            "checks against transformers passed",
            "good" if result.verification.passed else "bad",
        ),
        (
            f"{result.load.shares.min():.1%} – {result.load.shares.max():.1%}",
            "of tokens choose an expert",
            "",
        ),
    ]
    boxes = [
        f'<div class="card"><b class="{kind}">{value}</b><span>{text}</span></div>'
        for value, text, kind in cards
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def _stripes_section(result: DemoResult) -> str:
    contributions = result.contributions
    pair = " pair" if len(contributions.senders) <= _MOST_SENDERS_SIDE_BY_SIDE else ""
    parts = [
        "<h2>Who shapes which router</h2>",
        "<p>Columns are senders in the order in which they write into the residual stream: the embedding, attention "
        "layers (A) and MoE or dense layers (M). Rows are the routers that read it. Blank: the sender comes later. "
        "The first token of each document is kept apart, on a colour scale of its own, because models treat it "
        "unlike any other.</p>",
    ]
    for measure in _HOW_TO_READ:
        figures = [_figure(stripes(contributions, measure, position)) for position in ("rest", "lead")]
        parts += [
            f"<h3>{MEASURE_NAMES[measure]}</h3><p>{_HOW_TO_READ[measure]}</p>",
            f'<div class="figures{pair}">{"".join(figures)}</div>',
        ]
    rows = []
    for measure in _HOW_TO_READ:
        top = result.top_senders(measure)
        named = ", ".join(f"{escape(s)} ({m:.3g})" for s, m in zip(top["sender"], top["mean"], strict=True))
        rows.append([MEASURE_NAMES[measure], UNITS[measure], named])
    parts += [
        "<h3>The largest senders</h3><p>By their mean over the routers that they reach, all tokens but the lead.</p>",
        _table(["measure", "unit", "senders"], rows),
    ]
    return "\n".join(parts)


def _load_section(result: DemoResult) -> str:
    return f"""<h2>The load of every expert</h2>
<p>The share of tokens whose top {result.load.top_k} hold the expert. White is the even share,
{result.load.uniform:.1%}; red experts are busier, blue ones idler. Padding is not counted.</p>
<div class="figures">{_figure(load_heatmap(result.load))}</div>"""


def _verification_section(result: DemoResult) -> str:
    verification = result.verification

    def verdict(check: Check) -> str:
        return '<span class="good">passed</span>' if check.passed else '<b class="bad">failed</b>'

    signs = {"<=": "≤", ">": ">", "==": "="}
    body = "".join(
        f"<tr><td>{escape(check.name)}</td>"
        f'<td class="number">{check.value:.3g} {escape(check.unit)}</td>'
        f'<td class="number">{escape(signs[check.rule])} {check.tolerance:g}</td>'
        f"<td>{verdict(check)}</td><td>{escape(check.meaning)}</td></tr>"
        for check in verification.checks
    )
    return f"""<h2>Is this the model?</h2>
<p>The same tokens through transformers' model and through the hooked one, and interventions that must do what they
say: {verification.n_tokens:,} tokens of {verification.n_documents} documents. The sums above close to
{result.completeness_error:.1e} of the largest logit, at every router and for all documents.</p>
<div class="wide"><table><thead><tr><th>check</th><th class="number">measured</th><th class="number">must be</th>
<th>result</th><th>what it means</th></tr></thead><tbody>{body}</tbody></table></div>"""


def _facts_section(result: DemoResult) -> str:
    cfg = result.cfg
    facts = [
        ("model", cfg.model_name),
        ("family", cfg.model_type),
        ("parameters", f"{result.n_parameters:,}"),
        ("layers", f"{cfg.n_layers}, of which {len(cfg.moe_layers)} with experts; width {cfg.d_model}"),
        ("experts", f"{cfg.n_experts} a layer, top {cfg.top_k}, {cfg.d_expert} neurons each"),
        ("vocabulary", f"{cfg.d_vocab:,} tokens; context {cfg.n_ctx:,}"),
        (
            "precision",
            f"stored in {str(result.stored_dtype).removeprefix('torch.')}, upcast and run in "
            f"{str(cfg.dtype).removeprefix('torch.')}"
            if result.stored_dtype != cfg.dtype
            else f"stored and run in {str(cfg.dtype).removeprefix('torch.')}",
        ),
        ("corpus", f"{result.n_tokens:,} tokens in {len(result.documents)} documents"),
        ("cut", f"{result.n_truncated_tokens:,} tokens of {result.n_truncated_documents} documents"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    rows = [
        [str(document), str(topic), f"{n_tokens:,}", f"{loss:.3f}"]
        for document, topic, n_tokens, loss in result.documents.itertuples(index=False)
    ]
    documents = _table(["document", "topic", "tokens", "loss, nats per token"], rows, numbers=(2, 3))
    return f"""<h2>Model and corpus</h2>
<dl class="facts">{listed}</dl>
<details><summary>All documents</summary>{documents}</details>
<p class="note">Measures as in “Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs”
(ICLR 2026): means over a document's tokens, then over documents. Hover over a cell for its standard error over
documents; it is zero at the lead token where all documents begin with the same one.</p>"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of text, every cell escaped."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{escape(text)}</{tag}>'
            if i in numbers
            else f"<{tag}>{escape(text)}</{tag}>"
            for i, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(figure: go.Figure) -> str:
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_height=f"{figure.layout.height}px",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    return f'<div class="figure">{drawn}</div>'

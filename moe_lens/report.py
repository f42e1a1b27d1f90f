"""The demo's result as one page of HTML that needs nothing else: no network, no server, no other file.

Everything that comes from outside (names, topics, text) is escaped; plotly's script is inside the page; and a
content security policy forbids the page to load anything at all (see `moe_lens.page`).
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from moe_lens.audit.checks import Check
from moe_lens.audit_page import AUDIT_CSS, audit_section
from moe_lens.census_page import CENSUS_CSS, census_section, what_was_done
from moe_lens.demo import COMPLETENESS_TOLERANCE, DemoResult
from moe_lens.page import HOW_TO_READ, MEASURES_NOTE, figure_html, page_html, stripes_html, table, write_page
from moe_lens.plots import MEASURE_NAMES, UNITS, load_heatmap
from moe_lens.routing_page import routing_css, routing_section


def write_report(result: DemoResult, path: str | Path) -> Path:
    """Write the page.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return write_page(report_html(result), path)


def report_html(result: DemoResult) -> str:
    """The page as text."""
    body = f"""<h1>What decides the routing of {escape(result.cfg.model_name)}</h1>
<p class="lead">Every router's scores, taken apart exactly into what the embedding and each attention and MoE layer
wrote, over {result.n_tokens:,} tokens of {len(result.documents)} held-out documents; what becomes of the loss without
each expert that they chose; and whether anything predicts it.</p>
{_cards(result)}
{_stripes_section(result)}
{_load_section(result)}
{routing_section(result.decisions)}
{_census_section(result)}
{_audit_section(result)}
{_verification_section(result)}
{_facts_section(result)}"""
    return page_html(f"Routing of {result.cfg.model_name}", body, css=routing_css() + CENSUS_CSS + AUDIT_CSS)


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
    parts = [
        "<h2>Who shapes which router</h2>",
        "<p>Columns are senders in the order in which they write into the residual stream: the embedding, attention "
        "layers (A) and MoE or dense layers (M). Rows are the routers that read it. Blank: the sender comes later. "
        "The first token of each document is kept apart, on a colour scale of its own, because models treat it "
        "unlike any other.</p>",
        stripes_html(contributions),
    ]
    rows = []
    for measure in HOW_TO_READ:
        top = result.top_senders(measure)
        named = ", ".join(f"{escape(s)} ({m:.3g})" for s, m in zip(top["sender"], top["mean"], strict=True))
        rows.append([MEASURE_NAMES[measure], UNITS[measure], named])
    parts += [
        "<h3>The largest senders</h3><p>By their mean over the routers that they reach, all tokens but the lead.</p>",
        table(["measure", "unit", "senders"], rows),
    ]
    return "\n".join(parts)


def _load_section(result: DemoResult) -> str:
    return f"""<h2>The load of every expert</h2>
<p>The share of tokens whose top {result.load.top_k} hold the expert. White is the even share,
{result.load.uniform:.1%}; red experts are busier, blue ones idler. Padding is not counted.</p>
<div class="figures">{figure_html(load_heatmap(result.load))}</div>"""


def _census_section(result: DemoResult) -> str:
    if result.census is None:
        return _NOT_VERIFIED
    return f"""<h2>What every expert does to the loss</h2>
<p>{what_was_done(result.census)}</p>
{census_section(result.census, result.largest_changes)}"""


_NOT_VERIFIED = """<h2>No experiment</h2>
<p class="bad">This is not the model that transformers runs (see below), so its experts were not tested.</p>"""


def _audit_section(result: DemoResult) -> str:
    if result.census is None:
        return ""
    return f"""<h2>Does any metric say which expert matters?</h2>
{audit_section(result.tables, lead=True)}"""


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
    documents = table(["document", "topic", "tokens", "loss, nats per token"], rows, numbers=(2, 3))
    return f"""<h2>Model and corpus</h2>
<dl class="facts">{listed}</dl>
<details><summary>All documents</summary>{documents}</details>
<p class="note">{MEASURES_NOTE} Hover over a cell for its standard error over documents; it is zero at the lead token
where all documents begin with the same one.</p>"""

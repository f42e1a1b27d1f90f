"""What every page of HTML here shares: one look, one policy, and the little that is drawn more than once.

A page needs nothing else: no network, no server, no other file. What comes from outside (names, topics, text) is
escaped, and a content security policy forbids the page to load anything at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_lens.plots import MEASURE_NAMES, stripes
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.storage import whole_or_not

# Two figures beside each other only where their columns can still be told apart.
_MOST_SENDERS_SIDE_BY_SIDE = 40

# The measures that the page shows as stripes, and how to read them.
HOW_TO_READ = {
    "variance": "How unequally a sender treats the experts of a router: 0 means that it adds the same to all, and "
    "so cannot change the choice. A vertical stripe is a component that many later routers listen to.",
    "aps": "How much a sender raises the experts that it raises, averaged over all experts. It is read beside ANS, "
    "on the same colours: a component may promote, inhibit, or do both.",
    "ans": "How much a sender lowers the experts that it lowers, averaged over all experts. What is as negative "
    "here as it is positive above sorts the experts; what is lopsided shifts all of them.",
}

CSS = """
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

MEASURES_NOTE = (
    "Measures as in “Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs” (ICLR 2026): means "
    "over a document's tokens, then over documents; the lead token of each document is kept apart."
)

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page_html(title: str, body: str, *, css: str = "", figures: bool = True) -> str:
    """A whole page.

    Args:
        title: as text; it is escaped.
        body: as HTML, escaped by whoever made it.
        css: beyond the look that all pages share.
        figures: whether plotly's script is in the page, which the figures of `figure_html` need.
    """
    script = f"<script>{get_plotlyjs()}</script>\n" if figures else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}{css}</style>
{script}</head>
<body><main>
{body}
</main></body>
</html>
"""


def write_page(text: str, path: str | Path) -> Path:
    """Write a page, whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: there is no room on the disk.
    """
    with whole_or_not(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return Path(path)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of text, every cell escaped; the columns in `numbers` are aligned as numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{escape(text)}</{tag}>'
            if i in numbers
            else f"<{tag}>{escape(text)}</{tag}>"
            for i, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def figure_html(figure: go.Figure) -> str:
    """A figure in its box; the page must hold plotly's script."""
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_height=f"{figure.layout.height}px",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    return f'<div class="figure">{drawn}</div>'


def stripes_html(contributions: RoutingContributions) -> str:
    """Every measure of `HOW_TO_READ` as stripes, lead token and rest beside each other, and how to read it."""
    pair = " pair" if len(contributions.senders) <= _MOST_SENDERS_SIDE_BY_SIDE else ""
    parts = []
    for measure, how_to_read in HOW_TO_READ.items():
        figures = [figure_html(stripes(contributions, measure, position)) for position in ("rest", "lead")]
        parts += [
            f"<h3>{MEASURE_NAMES[measure]}</h3><p>{how_to_read}</p>",
            f'<div class="figures{pair}">{"".join(figures)}</div>',
        ]
    return "\n".join(parts)


def closing_html(result: RoutingContributions) -> str:
    """How well the scores summed to the logits; in half precision, where `rounding` closes every sum, also whether
    it is no larger than it can be."""
    sums = f"The scores sum to every router's logits to {result.completeness_error:.1e} of the largest."
    ratio = result.rounding_ratio
    if ratio is not None:
        sums += (
            f" In half precision that is no proof, because what the stream lost at its additions is a sender too, "
            f"<code>rounding</code>; but rounding is at most {ratio:.2g} of what rounding can be."
        )
    if not result.closes:
        sums += ' <b class="bad">So the senders are not all that the routers read.</b>'
    return sums

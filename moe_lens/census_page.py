"""A census as a page, and as a part of a page: figures, the largest changes in their text, and what it is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from moe_lens.audit.census_table import Census
from moe_lens.corpus import TokenBatches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.page import figure_html, page_html, table, write_page
from moe_lens.plots import census_lines, literal, loss_change_distribution

CENSUS_CSS = """
.context { overflow-wrap: anywhere; }
.context .before { color: var(--muted); }
.context mark { background: #d5e5f3; color: var(--ink); border-radius: 3px; padding: 1px 0; white-space: pre-wrap; }
.context u { text-decoration-color: #d55e00; text-decoration-thickness: 2px; text-underline-offset: 3px;
  white-space: pre-wrap; }
"""
"""The look of `census_section`, beyond what all pages share."""

UNITS = {"kl": "nats", "delta_later_loss": "nats", "first_order": "nats"}
"""Of the columns that are not in logits."""

_HOW = {
    "zero": "its contribution becomes zero",
    "renormalize": "its contribution becomes zero, and the other routing weights grow to the same sum",
    "reroute": "it cannot be chosen, and the next-ranked expert takes its slot",
    "mean": "its output becomes its mean over a reference corpus",
    "resample": "its output becomes that at another token where it was active",
}
_SCOPES = {
    "token": "One active expert is changed at one token, and the loss is read there",
    "sequence": "One expert is changed wherever it is active in the document, and the loss is read at one token where "
    "it is",
}
_N_BEFORE = 16


@dataclass(frozen=True)
class LossChange:
    """A row of a census, in its text.

    Attributes:
        document: its name, or number where the corpus has no names.
        position, layer, expert, rank, routing_weight, loss, delta_loss: as in the census.
        before: the text before the token, from a few tokens on.
        token: the one at which the expert was changed.
        next: the one whose loss it is.
    """

    document: str
    position: int
    layer: int
    expert: int
    rank: int
    routing_weight: float
    loss: float
    delta_loss: float
    before: str
    token: str
    next: str

    @property
    def name(self) -> str:
        """Of the expert."""
        return f"M{self.layer}S" if self.expert < 0 else f"M{self.layer}E{self.expert}"


def largest_changes(model: HookedMoE, corpus: TokenBatches, census: Census, n: int = 10) -> list[LossChange]:
    """The rows of a census where the loss rises most, with the text that they are of.

    Args:
        model: for its tokenizer.
        corpus: that the census is of.
        census: of this corpus.
        n: how many.

    Raises:
        ValueError: the census is of other tokens.
    """
    if census.identity.get("tokens") not in (None, corpus.fingerprint):
        raise ValueError(f"the census is not of these tokens: {corpus.description}")
    rows = census.top(n).to_dict("records")
    wanted = {int(row["document"]) for row in rows}
    tokens: dict[int, tuple[str, list[int]]] = {}
    number = 0
    for batch_tokens, mask, documents in corpus:
        for document, row, real in zip(documents, batch_tokens, mask, strict=True):
            if number in wanted:
                tokens[number] = (document.name, row[: int(real.sum())].tolist())
            number += 1
    return [_in_text(model, row, *tokens[int(row["document"])]) for row in rows]


def _in_text(model: HookedMoE, row: Mapping[Any, Any], document: str, tokens: Sequence[int]) -> LossChange:
    at = int(row["position"])
    first = max(0, at - _N_BEFORE)
    before = str(model.to_string(list(tokens[first:at]))) if at else ""
    return LossChange(
        document=document,
        position=at,
        layer=int(row["layer"]),
        expert=int(row["expert"]),
        rank=int(row["rank"]),
        routing_weight=float(row["routing_weight"]),
        loss=float(row["loss"]),
        delta_loss=float(row["delta_loss"]),
        before=f"… {before}" if first else before,
        token=str(model.to_string(int(tokens[at]))),
        next=str(model.to_string(int(tokens[at + 1]))),
    )


# ---- the page ----


def write_census_page(census: Census, path: str | Path, *, examples: Sequence[LossChange] = ()) -> Path:
    """Write a page of a census. It needs no other file.

    Args:
        examples: from `largest_changes`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return write_page(census_page_html(census, examples=examples), path)


def census_page_html(census: Census, *, examples: Sequence[LossChange] = ()) -> str:
    """The page as text; see `write_census_page`."""
    facts = census.provenance
    title = f"What every expert of {facts['model']} does to the loss"
    body = f"""<h1>{escape(title)}</h1>
<p class="lead">{what_was_done(census)}</p>
{_cards(census)}
{census_section(census, examples)}
{_other_columns(census)}
{_noise_section(facts)}
{_provenance_section(census)}"""
    return page_html(title, body, css=CENSUS_CSS)


def what_was_done(census: Census) -> str:
    """In a sentence or two, as HTML."""
    facts = census.provenance
    how = _HOW.get(facts["how"], escape(str(facts["how"])))
    sentence = f"{_SCOPES.get(facts['scope'], escape(str(facts['scope'])))}: {how}."
    sample = facts.get("sample")
    places = (
        "every position that has a next token"
        if sample is None
        else f"{sample['n']:,} positions, a uniform sample"
    )
    return (
        f"{sentence} {len(census):,} such changes, one at a time, of every active expert at {places}, in "
        f"{census.n_documents:,} documents and {len(census.layers)} MoE layers."
    )


def census_section(census: Census, examples: Sequence[LossChange] = ()) -> str:
    """Figures and the largest changes, as HTML; the page must have plotly's script and `CENSUS_CSS`."""
    by_rank = [
        census_lines(census),
        census_lines(census, statistic="p95"),
    ]
    others = [census_lines(census, "gap_norm", scale="log"), loss_change_distribution(census)]
    return f"""<h3>By layer and rank</h3>
<p>Rank 1 is the expert with the largest routing weight. A change above zero means that the expert was of use: without
it the next token is less likely. The mean is of a distribution with heavy tails on both sides, so beside it stands its
95th percentile.</p>
<div class="figures pair">{"".join(map(figure_html, by_rank))}</div>
<h3>How much it changes the layer’s output, and how often the loss changes by how much</h3>
<p>The gap norm is the length of the difference that the change makes to the layer’s output, ‖y − y′‖. On the right each
point is a bin, and bins are equally wide on the axis.</p>
<div class="figures pair">{"".join(map(figure_html, others))}</div>
{_examples(examples)}"""


def _examples(examples: Sequence[LossChange]) -> str:
    if not examples:
        return ""
    head = ["text", "expert", "rank", "weight", "loss", "change"]
    cells = "".join(
        f'<th class="number">{name}</th>' if name not in ("text", "expert") else f"<th>{name}</th>"
        for name in head
    )
    body = "".join(
        f'<tr><td class="context" title="{escape(f"{e.document}, position {e.position}")}">'
        f'<span class="before">{literal(e.before)}</span><mark>{literal(e.token)}</mark><u>{literal(e.next)}</u></td>'
        f'<td>{e.name}</td><td class="number">{"shared" if e.rank == 0 else e.rank}</td>'
        f'<td class="number">{e.routing_weight:.3f}</td><td class="number">{e.loss:.3f}</td>'
        f'<td class="number">{_signed(e.delta_loss)}</td></tr>'
        for e in examples
    )
    return f"""<h3>Where the loss rises most</h3>
<p>The expert is changed at the <span class="context"><mark>marked</mark></span> token, and the loss is that of the
<span class="context"><u>underlined</u></span> one, which comes next: before, and by how many nats it changes.</p>
<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"""


def _cards(census: Census) -> str:
    layers, ranks = census.by_layer(), census.by_rank()
    worst = layers.loc[layers["delta_loss"].idxmax()]
    of_ranks = mean_by_rank(census)
    heaviest, lightest = min(r for r in of_ranks if r), max(of_ranks)
    cards = [
        (f"{len(census):,}", f"changes of one expert at {ranks['n_rows'].max():,} positions"),
        (_rounded(_mean(layers)), "nats, mean change of the loss"),
        (_rounded(of_ranks[heaviest]), "nats for the expert of the largest weight"),
        (_rounded(of_ranks[lightest]), f"nats for that of rank {lightest}, the smallest"),
        (f"M{int(worst['layer'])}", f"is where it changes most: {_rounded(worst['delta_loss'])} nats"),
    ]
    boxes = [f'<div class="card"><b>{value}</b><span>{text}</span></div>' for value, text in cards]
    return f'<div class="cards">{"".join(boxes)}</div>'


def mean_by_rank(census: Census) -> dict[int, float]:
    """The mean change of the loss of each rank, over all layers."""
    frame = census.by_rank()
    return {int(rank): _mean(frame[frame["rank"] == rank]) for rank in sorted(set(frame["rank"]))}


def _mean(frame: Any) -> float:
    """Over the rows that a summary's lines are of."""
    return float(np.average(frame["delta_loss"], weights=frame["n_rows"]))


def _other_columns(census: Census) -> str:
    """What was measured beside the loss: its mean at each layer, and how it goes with the change of the loss."""
    # The null branch's change is noise, which the noise floor is about.
    names = [name for name in census.identity["extra_columns"] if name != "null_delta_loss"]
    if not names:
        return ""
    head = ["layer"]
    for name in names:
        head += [f"{name} ({UNITS.get(name, 'logits')})", "ρ"]
    rows = []
    for layer in census.layers:
        frame = census.to_pandas(["rank", "delta_loss", *names], layers=layer)
        routed = frame["rank"].to_numpy() > 0
        change, cells = frame["delta_loss"].to_numpy(), [f"M{layer}"]
        for name in names:
            values = frame[name].to_numpy()
            there = routed & np.isfinite(values)
            cells += _mean_and_rho(values[there].astype(float), change[there])
        rows.append(cells)
    return f"""<h2>What else was measured</h2>
<p>Means over the routed experts’ rows of a layer; and ρ, Spearman’s correlation with the change of the loss.</p>
{table(head, rows, numbers=range(1, len(head)))}"""


def _mean_and_rho(values: np.ndarray, change: np.ndarray) -> list[str]:
    if len(values) == 0:
        return ["–", "–"]
    varies = len(values) > 2 and np.ptp(values) > 0 and np.ptp(change) > 0
    rho = f"{spearmanr(values, change).statistic:.3f}" if varies else "–"  # type: ignore[attr-defined]
    return [f"{values.mean():.3g}".replace("-", "−"), rho.replace("-", "−")]


def _noise_section(facts: Mapping[str, Any]) -> str:
    noise = facts.get("noise_floor")
    if noise is None:
        return ""
    rows = [
        ["size of the changes, in float32", f"{noise['median_effect']:.2g}"],
        ["error of these changes", f"{noise['replay_error']:.2g}"],
        ["error of full forward passes with hooks, in the same precision", f"{noise['hooked_error']:.2g}"],
        ["error that counting from a null branch took away", f"{noise['null_error']:.2g}"],
    ]
    return f"""<h2>The noise floor</h2>
<p>In half precision a small change may be rounding. Medians over {noise["n_samples"]:,} sampled ablations, each also
made in full forward passes and in float32:</p>
{table(["median", "nats"], rows, numbers=(1,))}"""


def _provenance_section(census: Census) -> str:
    facts = dict(census.provenance)
    documents = facts.pop("documents", None)
    for shown_elsewhere in ("kind", "noise_floor", "extra_columns"):
        facts.pop(shown_elsewhere, None)
    listed = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_shown(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "", [])
    )
    names = (
        ""
        if documents is None
        else f"<details><summary>All documents</summary><p>{escape(', '.join(map(str, documents)))}</p></details>"
    )
    return f"""<h2>What this is of</h2>
<dl class="facts">{listed}</dl>
{names}
<p class="note">The gap norm, and the change of the loss without one expert, as in “From Observation to Intervention: A
Causal Audit of Expert Importance in Mixture-of-Experts Models” (arXiv:2606.10703), there at a sample of positions.
Standard errors are clustered by document.</p>"""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_shown, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _signed(nats: float) -> str:
    return f"{nats:+.3f}".replace("-", "−")


def _rounded(nats: float) -> str:
    return f"{nats:+.2g}".replace("-", "−")

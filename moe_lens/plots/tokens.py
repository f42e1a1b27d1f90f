"""Tokens as points: a two-dimensional projection of the scores that they give to the experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from moe_lens.plots.style import CATEGORIES, GREY, INK, SEQUENTIAL, colorbar, lay_out, lay_out_chart, literal

MOST_CATEGORIES = len(CATEGORIES)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def token_projection(
    scores: Float[np.ndarray, "token feature"],
    labels: Sequence[str],
    *,
    method: Literal["pca", "tsne"] = "pca",
    color: Sequence[str] | Sequence[float] | np.ndarray | None = None,
    color_name: str = "",
    lead: Bool[np.ndarray, " token"] | Sequence[bool] | None = None,
    seed: int = 0,
    perplexity: float = 30.0,
    title: str = "Scores of tokens",
) -> go.Figure:
    """A point for each token, near to tokens that score the experts alike.

    Args:
        scores: for each token its scores, of all experts that are looked at.
        labels: the tokens; shown literally.
        method: `pca`, exact and always the same; or `tsne`, which keeps neighbours together and needs scikit-learn.
        color: for each token a category (the 12 most frequent are told apart) or a number (its position, say).
        color_name: of the categories or the number; shown literally.
        lead: which tokens are leads; they are ringed.
        seed, perplexity: of t-SNE; the perplexity is lowered where there are few tokens.
        title: shown literally.

    Raises:
        ValueError: scores that are no finite `[token, feature]` of at least two tokens and two features; labels,
            colours or leads of another number of tokens; another method.
        ImportError: `tsne` without scikit-learn.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 2a,
    2b, 15 and 16.
    """
    points = np.asarray(scores, dtype=float)
    if points.ndim != 2 or min(points.shape) < 2 or not np.isfinite(points).all():
        raise ValueError(
            f"scores must be finite [token, feature] of at least two tokens and two features; their shape is "
            f"{points.shape}"
        )
    for name, given in (("labels", labels), ("color", color), ("lead", lead)):
        if given is not None and len(given) != len(points):
            raise ValueError(f"there are {len(points)} tokens and {len(given)} of {name}")
    if method == "pca":
        flat, explained = principal_components(points)
        axes = [f"principal component {i + 1} ({share:.1%} of variance)" for i, share in enumerate(explained)]
    elif method == "tsne":
        flat = _tsne(points, seed, perplexity)
        axes = ["t-SNE 1", "t-SNE 2"]
    else:
        raise ValueError(f"method must be pca or tsne, not {method!r}")

    figure = go.Figure()
    names = [literal(label) for label in labels]
    if color is None:
        figure.add_trace(_points(flat, names, "", marker=dict(color=CATEGORIES[0])))
    elif np.asarray(color).dtype.kind in "biuf":
        numbers = np.asarray(color, dtype=float)
        bar = colorbar(literal(color_name))
        marker = dict(
            color=numbers, colorscale=[[0, "#a9cbe6"], *SEQUENTIAL[2:]], colorbar=bar, showscale=True
        )
        figure.add_trace(
            _points(flat, names, "", marker=marker, notes=[f"{literal(color_name)} {v:g}" for v in numbers])
        )
    else:
        _add_categories(figure, flat, names, [str(c) for c in color])
    if lead is not None:
        ringed = np.asarray(lead, dtype=bool)
        ring = dict(symbol="circle-open", size=11, color=INK, line=dict(width=1.6))
        figure.add_trace(_points(flat[ringed], [], f"lead token ({ringed.sum():,})", marker=ring))
        figure.update_traces(hoverinfo="skip", hovertemplate=None, selector=-1)
    lay_out(figure, literal(title), axes[0], axes[1], height=520, subtitle=f"{len(points):,} tokens")
    lay_out_chart(figure)
    has_bar = color is not None and np.asarray(color).dtype.kind in "biuf"
    figure.update_layout(
        showlegend=lead is not None or (color is not None and not has_bar),
        legend=dict(
            title=dict(text=literal(color_name) if not has_bar else ""),
            font=dict(size=11),
            itemsizing="constant",
            **(dict(x=0.01, y=0.99, bgcolor="rgba(255,255,255,0.8)") if has_bar else {}),
        ),
    )
    return figure


def principal_components(
    points: Float[np.ndarray, "token feature"],
) -> tuple[Float[np.ndarray, "token two"], Float[np.ndarray, " two"]]:
    """Coordinates along the first two principal components, and the share of variance of each.

    Of the two directions of a component, the one is taken along which its largest loading is positive.
    """
    _, sizes, directions = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    directions = directions[:2]
    strongest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(2), strongest])[:, None]
    total = float(np.square(sizes).sum())
    shares = np.square(sizes[:2]) / total if total else np.zeros(2)
    return (points - points.mean(axis=0)) @ directions.T, shares


def _tsne(points: np.ndarray, seed: int, perplexity: float) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "t-SNE needs scikit-learn: pip install 'moe-lens[tsne]'; method='pca' needs nothing more"
        ) from error
    if len(points) < 4:
        raise ValueError(f"t-SNE needs at least four tokens; there are {len(points)}")
    fitting = min(perplexity, (len(points) - 1) / 3)
    return TSNE(2, perplexity=fitting, init="pca", random_state=seed).fit_transform(points)


def _add_categories(
    figure: go.Figure, flat: np.ndarray, names: Sequence[str], categories: Sequence[str]
) -> None:
    """A trace for each of the most frequent categories, over one of all others."""
    counts = Counter(categories)
    kept = [c for c, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CATEGORIES]]
    notes = np.array([literal(c) for c in categories], dtype=object)
    members = {c: np.array([other == c for other in categories]) for c in kept}
    rest = ~np.any(list(members.values()), axis=0)
    if rest.any():
        name = f"other: {len(counts) - len(kept):,} categories ({rest.sum():,})"
        figure.add_trace(
            _points(flat[rest], _of(names, rest), name, marker=dict(color=GREY), notes=list(notes[rest]))
        )
    for i, (category, chosen) in enumerate(members.items()):
        marker = dict(color=CATEGORIES[i], symbol=_SYMBOLS[i // 3 % len(_SYMBOLS)])
        name = f"{literal(category)} ({chosen.sum():,})"
        figure.add_trace(
            _points(flat[chosen], _of(names, chosen), name, marker=marker, notes=list(notes[chosen]))
        )
    if rest.any():
        # Drawn first, below all; named last.
        figure.update_traces(legendrank=2000, selector=0)


def _of(names: Sequence[str], chosen: np.ndarray) -> list[str]:
    return [name for name, kept in zip(names, chosen, strict=True) if kept]


def _points(
    flat: np.ndarray,
    names: Sequence[str],
    name: str,
    *,
    marker: dict[str, Any],
    notes: Sequence[str] | None = None,
) -> go.Scatter:
    return go.Scatter(
        x=flat[:, 0],
        y=flat[:, 1],
        mode="markers",
        marker=dict(size=6, opacity=0.8) | marker,
        text=list(names),
        customdata=None if notes is None else list(notes),
        hovertemplate="%{text}" + ("" if notes is None else "<br>%{customdata}") + "<extra></extra>",
        name=name,
        showlegend=bool(name),
    )

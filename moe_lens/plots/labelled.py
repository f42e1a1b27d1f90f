"""Tables of one model or several, as figures take them: told apart by a label, and none of their rows lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from moe_lens.plots.style import CATEGORIES, MUTED, literal

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
"""Of models, beside their colours."""

_TELLS_APART = ("scope", "how")
"""What a model is named with where the table has it in more than one of these."""


def labelled(
    given: Any, attribute: str, needed: Sequence[str], key: Sequence[str], expected: str
) -> pd.DataFrame:
    """The rows with a column `label`: the caller's own, or the model, with scope and treatment where they differ.

    Args:
        given: a frame; an object that has one, and a `provenance`; or a sequence of such objects, whose rows are then
            counted through.
        attribute: of the object, which is the frame.
        needed: columns.
        key: columns of which, with the label, each row has its own values.
        expected: what should be given, for messages.

    Raises:
        ValueError: something else; columns that are not there; no rows; two rows for one place in the figure.
    """
    if isinstance(given, pd.DataFrame):
        frame = given.copy()
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if not given:
            raise ValueError(f"{expected} is needed, and the sequence is empty")
        frame = pd.concat([_frame_of(part, attribute, expected) for part in given], ignore_index=True)
    else:
        frame = _frame_of(given, attribute, expected)
    lacking = [name for name in needed if name not in frame]
    if lacking:
        raise ValueError(f"{expected} is needed, and this frame has no {', '.join(lacking)}")
    if len(frame) == 0:
        raise ValueError("there are no rows to show")
    if "label" not in frame:
        frame["label"] = _labels(frame)
    twice = frame.loc[frame.duplicated(["label", *key])]
    if len(twice):
        first = ", ".join(
            f"{name} {twice.iloc[0][name]}" for name in ["label", *key] if twice.iloc[0][name] != ""
        )
        raise ValueError(f"two rows have {first}; a column label= tells the models or runs apart")
    return frame


def _frame_of(given: Any, attribute: str, expected: str) -> pd.DataFrame:
    frame = getattr(given, attribute, None)
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{expected} is needed, not {type(given).__name__}")
    if "model" in frame:
        return frame.copy()
    provenance: Mapping[str, Any] = getattr(given, "provenance", {})
    return frame.assign(model=str(provenance.get("model", "unknown")))


def _labels(frame: pd.DataFrame) -> list[str]:
    if "model" not in frame:
        return [""] * len(frame)
    labels = [str(model) for model in frame["model"]]
    # Owners of repositories and folders are left out as long as the names still differ.
    short = [label.rsplit("/", 1)[-1] for label in labels]
    if len(set(short)) == len(set(labels)):
        labels = short
    for column in _TELLS_APART:
        if column in frame:
            values = [str(value) for value in frame[column]]
            if len(set(zip(labels, values, strict=True))) > len(set(labels)):
                labels = [f"{label}, {value}" for label, value in zip(labels, values, strict=True)]
    return labels


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def colour_and_symbol(index: int) -> tuple[str, str]:
    """Of the models' lines: two of the same colour have other symbols."""
    return CATEGORIES[index % len(CATEGORIES)], SYMBOLS[index % len(SYMBOLS)]


def paler(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def arms(
    values: Float[np.ndarray, " row"], low: Float[np.ndarray, " row"], high: Float[np.ndarray, " row"]
) -> dict[str, Any]:
    """Error bars from an interval's ends; none where it has none."""
    return dict(
        type="data",
        symmetric=False,
        array=np.nan_to_num(high - values),
        arrayminus=np.nan_to_num(values - low),
    )


def depths(frame: pd.DataFrame) -> tuple[Float[np.ndarray, " row"], bool]:
    """Where each row's layer is on the axis, and whether that is relative: where the labels' last layers differ, layers
    are divided by their label's last one that is there."""
    layer = frame["layer"].to_numpy(float)
    last = frame.groupby("label")["layer"].transform("max").to_numpy(float)
    if len(np.unique(last)) == 1:
        return layer, False
    return layer / np.maximum(last, 1), True


def depth_axis(figure: go.Figure, x: Float[np.ndarray, " row"], relative: bool) -> None:
    """The axis of `depths`, with its title; for each panel of the figure."""
    if relative:
        figure.update_xaxes(
            title_text="depth: layer / last layer shown",
            range=[-0.03, 1.03],
            tickvals=[0, 0.25, 0.5, 0.75, 1],
            ticktext=["0", "0.25", "0.5", "0.75", "1"],
        )
        return
    layers = np.unique(x).astype(int)
    step = -(-len(layers) // 16)
    pad = 0.03 * max(float(layers[-1] - layers[0]), 1) + 0.15
    figure.update_xaxes(
        title_text="layer", range=[layers[0] - pad, layers[-1] + pad], tickvals=layers[::step].tolist()
    )


def legend_below_heading(
    figure: go.Figure, *, lines: int = 2, panel_names: int = 0, subtitle_lines: int = 1
) -> None:
    """Labels side by side under title and subtitle, so that the figure keeps its width for the values.

    Args:
        figure: laid out, with a subtitle.
        lines: for which there is room, in a narrow figure.
        panel_names: lines of text above the panels.
        subtitle_lines: of the subtitle, whose first one `lay_out` has room for.
    """
    layout: Any = figure.layout
    below = 16 * (subtitle_lines - 1)
    more = 20 * lines + 15 * panel_names + below
    height = layout.height + more
    figure.update_layout(
        height=height,
        margin_t=layout.margin.t + more,
        title_y=1 - 16 / height,
        legend=dict(
            orientation="h",
            font=dict(size=11),
            tracegroupgap=0,
            x=0.005,
            xref="container",
            xanchor="left",
            y=1 - (62 + below) / height,
            yref="container",
            yanchor="top",
        ),
    )


def shown_label(label: object) -> str:
    """Literally; rows without a name are not blank."""
    return literal(label) or "(no label)"


def name_panel(figure: go.Figure, panel: int, text: str, size: int = 12) -> None:
    """Text above a panel, at its left; panels are counted from 0."""
    figure.add_annotation(
        text=text,
        x=0,
        y=1,
        xref=f"x{'' if panel == 0 else panel + 1} domain",
        yref="paper",
        yshift=4,
        xanchor="left",
        yanchor="bottom",
        align="left",
        showarrow=False,
        font=dict(size=size, color=MUTED),
    )

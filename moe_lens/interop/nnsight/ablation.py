"""`ablate`: many ablations of a model in nnsight, in one session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from moe_lens.interop.nnsight.ablation_data import Vectors, explain_refusal, layers_of
from moe_lens.interop.nnsight.jobs import Analysis, Job, Remote, Step, run
from moe_lens.interop.nnsight.model import facts_of, inputs_of, structure_of, tokens_of
from moe_lens.interop.nnsight.shipped.ablations import run_ablated
from moe_lens.interventions.hooks import Interventions
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.receipt import Receipt
from moe_lens.interventions.spec import RouterOnly
from moe_lens.interventions.spec_base import Spec
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.observers import Run
from moe_lens.routing.attribution import require_finite
from moe_lens.routing.score_maps import position_columns

Measure = Literal["loss", "logits"] | LogitDifference
"""`"loss"`: of every token but the last, in nats. `"logits"`, or the difference of two: at a column of each row."""

Columns = int | Sequence[int] | Int[Tensor, " batch"] | None


@dataclass(frozen=True, eq=False)
class AblationResults:
    """What `ablate` measured; in float32, on the device where the model ran (the CPU, where that was remote).

    Attributes:
        measure: what `clean` and `values` are. `"loss"`: -log p(next token), nats, `[batch, pos - 1]`, NaN where a
            token or its next is padding. `"logits"`: `[batch, d_vocab]`, at a column of each row. A `LogitDifference`:
            `[batch]`, in logits, at a column of each row.
        specs: of each ablation.
        clean: without any.
        values: under each ablation.
        receipts: what each was asked to do, and did; every change that was asked for fired.
        real: which tokens are no padding.
        columns: where logits were read, one for each row; None for the loss.
    """

    measure: Measure
    specs: tuple[tuple[Spec, ...], ...]
    clean: Float[Tensor, "*place"]
    values: Float[Tensor, "ablation ..."]
    receipts: tuple[Receipt, ...]
    real: Bool[Tensor, "batch pos"]
    columns: Int[Tensor, " batch"] | None = None

    @property
    def losses(self) -> Float[Tensor, "ablation batch pos_minus_1"]:
        """The values, where they are losses, in nats.

        Raises:
            ValueError: something else was measured.
        """
        if self.measure != "loss":
            raise ValueError(f"measure={self.measure!r} was asked for, so there are no losses; see `values`")
        return self.values

    @property
    def effects(self) -> Float[Tensor, "ablation ..."]:
        """What each ablation did to what is measured: ablated - clean, in nats or logits."""
        return self.values - self.clean

    def to_frame(self) -> pd.DataFrame:
        """A row for each ablation and place: `ablation` (its number), `interventions`, `row`, `position`, `ablated`,
        `clean`, `effect` (nats or logits). A loss stands at the token that predicts; where there is none, no row.

        Raises:
            ValueError: whole logits were measured, which are no table.
        """
        if self.measure == "logits":
            raise ValueError("logits are no table: see `values` [ablation, batch, d_vocab] and `effects`")
        clean, values = self.clean.cpu(), self.values.cpu()
        if self.columns is None:
            # Where there is a loss, the tokens say, and not the values.
            there = self.real[:, :-1] & self.real[:, 1:]
            rows, positions = there.nonzero().unbind(dim=-1)
        else:
            there = torch.ones_like(clean, dtype=torch.bool)
            rows, positions = torch.arange(len(clean)), self.columns
        frames = [
            pd.DataFrame(
                {
                    "ablation": number,
                    "interventions": ", ".join(map(str, specs)),
                    "row": rows.numpy(),
                    "position": positions.numpy(),
                    "ablated": values[number][there].numpy(),
                    "clean": clean[there].numpy(),
                    "effect": (values[number] - clean)[there].numpy(),
                }
            )
            for number, specs in enumerate(self.specs)
        ]
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        what = self.measure if isinstance(self.measure, str) else self.measure.name
        n = len(self.specs)
        return (
            f"<AblationResults: {what} under {n} ablation{'' if n == 1 else 's'}, {list(self.values.shape)}>"
        )


def ablate_analysis(
    lm: TransformersModel,
    text: Any,
    specs: Sequence[Spec | Sequence[Spec]],
    *,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    measure: Measure = "loss",
    positions: Columns = None,
) -> Analysis[AblationResults]:
    """See `ablate`."""
    structure = structure_of(lm)
    items = _items(specs)
    tokens, real = tokens_of(structure, text, attention_mask, prepend_bos)
    sent_measure, shape, columns = _measure_data(structure, measure, positions, real)
    measured = _measured(real, columns)
    now = Run(real, 0, structure.cfg.n_layers, tokens)
    vectors = Vectors(now, structure.cfg.dtype)
    told, steps = [], [Step(inputs_of(tokens, real), {"layers": []})]
    for number, item in enumerate(items):
        try:
            interventions = Interventions(structure, item)
            interventions.begin(now)
            _require_seen(item, real, measured)
            steps.append(Step(inputs_of(tokens, real), {"layers": layers_of(interventions, vectors)}))
        except (TypeError, ValueError) as error:
            error.add_note(_name(number, item))
            raise
        told.append(interventions)
    job = Job(
        function=run_ablated,
        arguments={
            "facts": facts_of(structure.cfg),
            "tokens": tokens,
            "real": real,
            "measure": sent_measure,
            "vectors": vectors.tables(),
        },
        steps=steps,
        result_bytes=len(steps) * 4 * shape.numel()
        + sum(4 * 8 * len(interventions.receipt.lines) for interventions in told),
    )

    def finish(results: list[list[Any]]) -> AblationResults:
        clean, *ablated = results[0]
        require_finite(_there(clean["values"], measured, columns), "the clean run's values")
        for number, (interventions, found) in enumerate(zip(told, ablated, strict=True)):
            try:
                _check(interventions, now, found)
                require_finite(_there(found["values"], measured, columns), "its values")
            except (RuntimeError, ValueError) as error:
                error.add_note(_name(number, items[number]))
                raise
        return AblationResults(
            measure=measure,
            specs=items,
            clean=clean["values"],
            values=torch.stack([found["values"] for found in ablated]),
            receipts=tuple(interventions.receipt for interventions in told),
            real=real,
            columns=columns,
        )

    return Analysis("ablate", [job], finish)


def ablate(
    lm: TransformersModel,
    text: Any,
    specs: Sequence[Spec | Sequence[Spec]],
    *,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    measure: Measure = "loss",
    positions: Columns = None,
    remote: Remote = False,
    verbose: bool = False,
) -> AblationResults:
    """Run a text under many ablations, one forward pass each, and once without any; all in one session.

        results = ablate(lm, text, [Ablate("M1E9", pos=4), Ablate(ranks=1, layers=3), [TopK(4), ForbidExperts("M2E7")]])
        results.effects[0]                    # [batch, pos - 1], nats: what expert 9 of layer 1 is worth

    Args:
        lm: an nnsight `TransformersModel` of one of the five families; its weights need not be here where it runs
            remotely.
        text: one or several, padded on the right; or tokens `[batch, pos]`.
        specs: for each ablation a spec of `moe_lens.interventions`, or several that are applied together: `Ablate`,
            `ForceExperts`, `ForbidExperts`, `SwapRanks`, `TopK`. Of `mean` and `resample` the vectors travel that may
            be needed: for experts that are named, theirs; for `ranks` and `all_but`, those of all experts of the
            layer. The plan counts them. Of which weights a reference is, only the model's name says here.
        attention_mask: of tokens; padding may lie on either side.
        prepend_bos: as in `HookedMoE.tokenize`.
        measure: `"loss"`, of every token; `"logits"`, or a `LogitDifference`, at a column of each row.
        positions: the column, for all rows or one for each, negative from the end of the columns; None is the last.
        remote: `False`, `True`, `"local"` or a URL; see `moe_lens.interop.nnsight.jobs`.
        verbose: print the plan first.

    Returns:
        What `moe_lens.interventions.run_with_interventions` gives for each, losses (or logits) and receipts. In a lower
        precision than float32 the sums over slots are rounded otherwise: transformers' kernel adds the slots that
        stay, and what stands in for the others is added to that.

    Raises:
        TypeError, UnsupportedCheckpoint: a model that is none of these; something that is no spec, or `RouterOnly`,
            which is not carried out in a trace.
        ValueError: before anything runs, what makes no sense in this model or for these tokens, specs that contradict
            each other, and ablations at tokens after all that is measured; a wrong `measure`, `positions` or `remote`.
            After it, what only the choice of the run shows: too few experts left to choose from, `renormalize` that
            keeps none, an expert ablated by two specs; and a loss or logit that is not finite.
        UnfiredIntervention: a named expert is not active where it has to be, or not all that was asked for happened.

    Notes on these errors name the ablation.
    """
    analysis = ablate_analysis(
        lm,
        text,
        specs,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        measure=measure,
        positions=positions,
    )
    return run(lm, analysis, remote, verbose=verbose)


def _items(specs: Any) -> tuple[tuple[Spec, ...], ...]:
    """The ablations, each a tuple of specs.

    Raises:
        TypeError: no sequence; `RouterOnly`.
        ValueError: there is none.
    """
    if not isinstance(specs, list | tuple):
        raise TypeError(
            f"specs must be a list with a spec, or a list of specs, for each ablation; not {specs!r}"
        )
    if not specs:
        raise ValueError("there is no ablation; give one or more specs")
    items = tuple(tuple(item) if isinstance(item, list | tuple) else (item,) for item in specs)
    for item in items:
        for spec in item:
            if isinstance(spec, RouterOnly):
                raise TypeError(
                    f"{spec} is not carried out in a trace: HookedMoE does it, and here go Ablate, ForceExperts, "
                    f"ForbidExperts, SwapRanks and TopK"
                )
    return items


def _measure_data(
    structure: HookedMoE, measure: Any, positions: Columns, real: Bool[Tensor, "batch pos"]
) -> tuple[dict[str, Any], torch.Size, Int[Tensor, " batch"] | None]:
    """What is measured, as data; the shape of it; and the columns of logits.

    Raises:
        ValueError: nothing that can be measured, or not in these tokens.
    """
    n_rows, n_columns = real.shape
    if measure == "loss":
        if positions is not None:
            raise ValueError("the loss is measured at every token; positions= goes with logits")
        if not bool((real[:, 1:] & real[:, :-1]).any()):
            raise ValueError(
                "no position has a next token, so there is no loss; give at least two real tokens"
            )
        return {"kind": "loss"}, torch.Size((n_rows, n_columns - 1)), None
    if measure != "logits" and not isinstance(measure, LogitDifference):
        raise ValueError(f"measure={measure!r} must be 'loss', 'logits' or a LogitDifference")
    columns = position_columns(-1 if positions is None else positions, "positions", real)
    if measure == "logits":
        return (
            {"kind": "logits", "columns": columns.tolist()},
            torch.Size((n_rows, structure.cfg.d_vocab)),
            columns,
        )
    measure.check(structure.cfg.d_vocab)
    asked = {
        "kind": "difference",
        "columns": columns.tolist(),
        "tokens": [measure.correct, measure.incorrect],
    }
    return asked, torch.Size((n_rows,)), columns


def _measured(
    real: Bool[Tensor, "batch pos"], columns: Int[Tensor, " batch"] | None
) -> Bool[Tensor, "batch pos"]:
    """At which tokens something is measured: those with a next one, or a column of each row."""
    if columns is None:
        return real & torch.nn.functional.pad(real[:, 1:], (0, 1))
    return torch.arange(real.shape[1]) == columns[:, None]


def _there(
    values: Float[Tensor, "*place"],
    measured: Bool[Tensor, "batch pos"],
    columns: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "*place"]:
    """The values where something is measured: losses at padding are NaN."""
    return values[measured[:, :-1].to(values.device)] if columns is None else values


def _require_seen(
    item: tuple[Spec, ...], real: Bool[Tensor, "batch pos"], measured: Bool[Tensor, "batch pos"]
) -> None:
    """Raise for an ablation that acts only after everything that is measured.

    Raises:
        ValueError: no change could be seen.
    """
    acts = torch.stack([spec.places(real) for spec in item]).any(dim=0)
    measured_from_here = measured.flip(1).cumsum(dim=1).flip(1) > 0
    if not bool((acts & measured_from_here).any()):
        raise ValueError(
            "it acts only at tokens after all that is measured, so it would change nothing there: a row's last token "
            "has no loss; measure='logits' or a LogitDifference reads it"
        )


def _check(interventions: Interventions, now: Run, found: dict[str, Any]) -> None:
    """Put one pass's counts into the receipt, and raise unless everything happened."""
    if "values" not in found:
        explain_refusal(interventions, now, found)
    for spec, layer, asked, fired in found["counts"]:
        interventions.receipt.add(spec, layer, asked=asked, fired=fired)
    interventions.receipt.n_runs += 1
    interventions.receipt.check()
    interventions.forget()


def _name(number: int, item: tuple[Spec, ...]) -> str:
    return f"ablation {number}: {', '.join(map(str, item))}"

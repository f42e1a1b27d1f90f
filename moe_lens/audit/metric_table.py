"""The table of population metrics: a value for every metric, layer and expert, with what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from moe_lens.audit.metric_registry import check_name, checked_values
from moe_lens.routing.storage import read_arrays, write_atomically

_FORMAT = "moe_lens expert metrics 1"


@dataclass(frozen=True, eq=False)
class MetricTable:
    """Metrics of the routed experts of some layers; `expert_metrics` makes one.

    Attributes:
        layers: MoE layers, the first axis of every array.
        values: of each metric, `[layer, expert]`, float64. NaN where a metric is over the tokens at which an expert is
            active and it never is.
        standard_errors: likewise, clustered by document, where the metric is a mean over tokens; elsewhere NaN.
        counts: tokens at which each expert is active.
        n_tokens: tokens that were counted.
        n_documents: rows of the batches.
        provenance: model, revision, dtype, weights (fingerprint), edited (hook points that other hooks edited
            meanwhile), corpus, fingerprint (of its real tokens), seed, definitions (of each metric, in words),
            functions (of each registered metric, the fingerprint of its function's code), higher_is_more_important (of
            each metric; one that is not there is taken for True),
            as_released (whose released definitions these are, or None), padding (where padding counts: token, width of
            all rows and side; else None), n_padding_counted (padded positions that are among the tokens), moe_lens
            (version).
    """

    layers: tuple[int, ...]
    values: Mapping[str, Float[np.ndarray, "layer expert"]]
    standard_errors: Mapping[str, Float[np.ndarray, "layer expert"]]
    counts: Int[np.ndarray, "layer expert"]
    n_tokens: int
    n_documents: int
    provenance: Mapping[str, Any]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def n_experts(self) -> int:
        return self.counts.shape[1]

    def layer_index(self, layer: int) -> int:
        """The place of a layer on the first axis.

        Raises:
            ValueError: it is not among them.
        """
        if layer not in self.layers:
            raise ValueError(
                f"the table has no layer {layer!r}; it is of layers {', '.join(map(str, self.layers))}"
            )
        return self.layers.index(layer)

    def higher_is_more_important(self, name: str) -> bool:
        """Whether a higher value claims more importance, or a lower one."""
        return bool(self.provenance.get("higher_is_more_important", {}).get(name, True))

    def importance(self, name: str) -> Float[np.ndarray, "layer expert"]:
        """What a metric claims, highest for the experts it takes for most important: its values, or their negatives."""
        return self.values[name] if self.higher_is_more_important(name) else -self.values[name]

    def with_array(
        self,
        name: str,
        values: Any,
        *,
        standard_errors: Any = None,
        definition: str = "an array given by the caller",
        higher_is_more_important: bool = True,
    ) -> MetricTable:
        """The same with one metric more, brought as an array.

        Args:
            name: a Python identifier that no metric of the table has.
            values: `[layer, expert]`, in the order of `layers`. NaN stands for nothing, and only an expert that is
                never active may have it.
            standard_errors: likewise; NaN where there is none.
            definition: in words, for the provenance.
            higher_is_more_important: whether a higher value claims more importance; an audit ranks by that.

        Raises:
            ValueError: another shape, a NaN or an infinity, a name that is taken or can be no column.
        """
        check_name(name)
        if name in self.values:
            raise ValueError(f"the table has a metric {name!r} already; take another name")
        found = checked_values(values, self, f"the array {name!r}")
        errors = np.full_like(found, np.nan)
        if standard_errors is not None:
            errors = checked_values(
                standard_errors, self, f"the array {name!r}'s standard error", may_be_nan=True
            )
        definitions = {**self.provenance["definitions"], name: definition}
        claims = {one: self.higher_is_more_important(one) for one in self.metrics}
        claims[name] = bool(higher_is_more_important)
        return replace(
            self,
            values={**self.values, name: found},
            standard_errors={**self.standard_errors, name: errors},
            provenance={
                **self.provenance,
                "definitions": definitions,
                "higher_is_more_important": claims,
            },
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, expert): `layer`, `expert`, `count`, and for each metric its values under its name and
        their errors under `<name>_standard_error`."""
        columns: dict[str, np.ndarray] = {
            "layer": np.repeat(self.layers, self.n_experts),
            "expert": np.tile(np.arange(self.n_experts), len(self.layers)),
            "count": self.counts.ravel(),
        }
        for name, values in self.values.items():
            columns[name] = values.ravel()
            columns[f"{name}_standard_error"] = self.standard_errors[name].ravel()
        return pd.DataFrame(columns)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        arrays = {"counts": self.counts}
        for name in self.metrics:
            arrays[f"values/{name}"] = self.values[name]
            arrays[f"standard_errors/{name}"] = self.standard_errors[name]
        facts = {
            "format": _FORMAT,
            "metrics": self.metrics,
            "layers": self.layers,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "provenance": dict(self.provenance),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return write_atomically(path, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> MetricTable:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        arrays, facts = read_arrays(path, "a table of expert metrics")
        if facts.get("format") != _FORMAT:
            raise ValueError(f"{Path(path).name} is no table of expert metrics: {facts.get('format')!r}")
        names = facts["metrics"]
        return cls(
            layers=tuple(facts["layers"]),
            values={name: arrays[f"values/{name}"].numpy() for name in names},
            standard_errors={name: arrays[f"standard_errors/{name}"].numpy() for name in names},
            counts=arrays["counts"].numpy(),
            n_tokens=facts["n_tokens"],
            n_documents=facts["n_documents"],
            provenance=facts["provenance"],
        )

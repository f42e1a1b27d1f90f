"""The stages of a model's audit: what each is asked for, checked before anything runs, and kept when it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.census import census
from moe_lens.audit.census_document import SCOPES
from moe_lens.audit.census_plan import Documents
from moe_lens.audit.census_table import Census
from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.audit.metric_registry import find_metrics
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.metrics import expert_metrics
from moe_lens.audit.paired_tests import check_levels
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.audit.redistribution import Redistribution, redistribution
from moe_lens.audit.released_metrics import RELEASED, released_of
from moe_lens.audit.released_padding import pad_token_of
from moe_lens.audit.verification import Verification, verify
from moe_lens.interventions.clean_run import require_no_hooks
from moe_lens.interventions.spec_base import moe_layers_of
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few, natural_number, positive_integer
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import weights_fingerprint
from moe_lens.routing.runs import Corpus

_BATCH_SIZE = 8
# Enough of a text for every check, little enough for a large vocabulary's logits.
_VERIFIED_DOCUMENTS, _VERIFIED_LENGTH = 8, 256
_WITHOUT_REFERENCE = ("zero", "renormalize", "reroute")


@dataclass(frozen=True, eq=False)
class GivenDocuments:
    """Documents that a stage runs, gone through once so that it is known what they are."""

    corpus: Corpus
    documents: Documents

    @classmethod
    def of(cls, model: HookedMoE, given: Batches, what: str) -> GivenDocuments:
        """Raises:
        ValueError: they can be gone through only once.
        """
        corpus = corpus_of(model, given, None, _BATCH_SIZE)
        if not corpus.can_be_repeated:
            raise ValueError(
                f"the {what} are gone through more than once; give a list of batches, not an iterator"
            )
        return cls(corpus, Documents.of(model, corpus))

    @property
    def key(self) -> dict[str, Any]:
        """What tells them from others."""
        return {"tokens": self.documents.fingerprint, "columns": self.documents.columns}


class _Kept(Protocol):
    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def save(self, path: str | Path) -> Path: ...


Result = TypeVar("Result", bound=_Kept)


@dataclass(frozen=True, eq=False)
class AuditStages:
    """The stages of one model's audit. `of` checks all that can be known to be wrong."""

    model: HookedMoE
    settings: AuditSettings
    given: Sequence[Census]
    of_census: GivenDocuments
    of_metrics: GivenDocuments
    of_progressive: GivenDocuments
    of_redistribution: GivenDocuments
    folder: Path | None
    verbose: bool

    @classmethod
    def of(
        cls,
        model: HookedMoE,
        settings: AuditSettings,
        batches: Sequence[Batches | None],
        given: Sequence[Census],
        folder: Path | None,
        verbose: bool,
    ) -> AuditStages:
        """Check what is asked for.

        Args:
            batches: the documents of census, metrics, progressive and redistribution; None is the census's.

        Raises:
            ValueError, FileNotFoundError, NotADirectoryError: what makes no sense.
        """
        require_no_hooks(model)
        if folder is not None:
            if not folder.absolute().parent.is_dir():
                raise FileNotFoundError(f"there is no folder {str(folder.parent)!r} to keep the audit in")
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{str(folder)!r} is a file, and a folder is wanted")
        names = (
            "documents of the census",
            *(f"documents of {what}" for what in ("metrics", "progressive removal", "redistribution")),
        )
        known: dict[int, GivenDocuments] = {}
        chosen = []
        for name, one in zip(names, batches, strict=True):
            source = batches[0] if one is None else one
            assert source is not None
            if id(source) not in known:
                known[id(source)] = GivenDocuments.of(model, source, name)
            chosen.append(known[id(source)])
        stages = cls(model, settings, given, chosen[0], chosen[1], chosen[2], chosen[3], folder, verbose)
        stages._check()
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return stages

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Those asked for; where none are named, those of the censuses that were given, or all."""
        if self.given and self.settings.layers is None:
            return tuple(sorted({layer for one in self.given for layer in one.layers}))
        return moe_layers_of(self.model.cfg, self.settings.layers)

    def _check(self) -> None:
        asked, cfg = self.settings, self.model.cfg
        if (
            not asked.scopes
            or len(set(asked.scopes)) < len(asked.scopes)
            or not set(asked.scopes) <= set(SCOPES)
        ):
            raise ValueError(f"scopes must be one or both of {', '.join(SCOPES)}, not {list(asked.scopes)}")
        if asked.how not in _WITHOUT_REFERENCE:
            raise ValueError(
                f"how={asked.how!r} must be one of {', '.join(_WITHOUT_REFERENCE)}; a census of another kind can be "
                f"given instead"
            )
        if not self.layers:
            raise ValueError("the censuses that were given have no rows")
        find_metrics(asked.metrics)
        if asked.as_released:
            self._pad_token(released_of(self.model, asked.as_released))
        natural_number(asked.seed, "seed")
        positive_integer(asked.memory_budget, "memory_budget")
        check_levels(asked.smallest_effect, asked.alpha)
        if 2 * positive_integer(asked.compare, "compare") > cfg.top_k:
            raise ValueError(
                f"compare={asked.compare} needs {2 * asked.compare} active routed experts, and {cfg.model_name} has "
                f"{cfg.top_k}"
            )
        for one in self.given:
            self._check_given(one)
        least = self._fewest_positions()
        if asked.n is not None and positive_integer(asked.n, "n") > least:
            raise ValueError(f"n={asked.n} positions are wanted for each cell, and the census has {least}")
        if asked.progressive:
            if cfg.top_k == 1:
                raise ValueError(
                    "progressive removal leaves an expert that stays, and this model's routers choose one; leave it out"
                )
            moe_layers_of(cfg, asked.progressive_layers)
            self.of_progressive.documents.sampled(
                self._n_progressive,
                asked.seed,
                per_document=asked.per_document,
                min_context=asked.min_context,
            )
        if asked.redistribution:
            moe_layers_of(cfg, asked.redistribution_layers)

    def _check_given(self, one: Census) -> None:
        weights = weights_fingerprint(self.model)
        if one.provenance.get("weights") != weights:
            raise ValueError(
                f"the census is of {one.provenance.get('model')} with weights "
                f"{str(one.provenance.get('weights'))[:12]}, and the model is {self.model.cfg.model_name} with weights "
                f"{weights[:12]} in {str(self.model.cfg.dtype).removeprefix('torch.')}; both must be the same, in the "
                f"same dtype"
            )
        how, asked = one.provenance.get("how"), self.settings
        if asked.progressive and how != asked.how:
            raise ValueError(
                f"the census is of how={how!r}, and progressive removal beside it would be of how={asked.how!r}; "
                f"give settings of the same how, or progressive=False"
            )
        if asked.layers is not None:
            missing = [layer for layer in self.layers if layer not in one.layers]
            if missing:
                raise ValueError(f"the census has no layer {few(missing)}; it is of layers {few(one.layers)}")
        if not one.finished:
            raise ValueError("the census is not finished; go on with its run first")

    def _fewest_positions(self) -> int:
        if self.given:
            return min(
                int(np.count_nonzero(one.to_pandas("rank", layers=layer)["rank"].to_numpy() == 1))
                for one in self.given
                for layer in (one.layers if self.settings.layers is None else self.layers)
            )
        n = self.settings.positions
        n = None if n is None else positive_integer(n, "positions")
        return sum(map(len, self.of_census.documents.sampled(n, self.settings.seed)))

    @property
    def _n_progressive(self) -> int | None:
        asked = self.settings
        same = asked.progressive_positions is None and self.of_progressive is self.of_census
        return asked.positions if same else asked.progressive_positions

    # ---- the stages ----

    def censuses(self) -> list[Census]:
        """Those that were given, or one for each scope."""
        if self.given:
            return list(self.given)
        asked = self.settings
        return [
            census(
                self.model,
                self.of_census.corpus.source,
                layers=asked.layers,
                how=asked.how,
                scope=scope,
                seed=asked.seed,
                n=asked.positions,
                predictors=("first_order",),
                output=None if self.folder is None else self.folder / f"census-{scope}",
                memory_budget=asked.memory_budget,
                verbose=self.verbose,
            )
            for scope in asked.scopes
        ]

    def metric_tables(self) -> list[MetricTable]:
        """The metrics, and where asked for the four of the published audit as its released code computes them."""
        asked = self.settings
        names = [one.name for one in find_metrics(asked.metrics)]
        tables = [self._metric_table("metrics", names, None)]
        if asked.as_released:
            whose = released_of(self.model, asked.as_released)
            tables.append(self._metric_table("metrics-as-released", list(PAPER_METRICS), whose))
        return tables

    def _metric_table(self, name: str, metrics: list[str], as_released: str | None) -> MetricTable:
        key = {
            **self.of_metrics.key,
            "metrics": metrics,
            "definitions": [one.definition for one in find_metrics(metrics)],
            "functions": [one.fingerprint for one in find_metrics(metrics)],
            "higher_is_more_important": [one.higher_is_more_important for one in find_metrics(metrics)],
            "as_released": as_released,
            "pad_token": self._pad_token(as_released),
            "layers": list(self.layers),
            "seed": self.settings.seed,
        }
        return self._kept(
            f"{name}.safetensors",
            key,
            MetricTable.load,
            lambda: expert_metrics(
                self.model,
                self.of_metrics.corpus.source,
                metrics=metrics,
                as_released=as_released,
                layers=self.layers,
                seed=self.settings.seed,
                verbose=self.verbose,
            ),
        )

    def _pad_token(self, as_released: str | None) -> int | None:
        """The token that released definitions count as padding, where they count any.

        Raises:
            ValueError: the model has none.
        """
        counts = as_released is not None and RELEASED[as_released].counts_padding
        return pad_token_of(self.model, None) if counts else None

    def progressive(self) -> Progressive:
        asked = self.settings
        layers = (
            self.layers
            if asked.progressive_layers is None
            else moe_layers_of(self.model.cfg, asked.progressive_layers)
        )
        what = {
            "layers": list(layers),
            "how": asked.how,
            "seed": asked.seed,
            "n": self._n_progressive,
            "per_document": asked.per_document,
            "min_context": asked.min_context,
            "memory_budget": asked.memory_budget,
        }
        return self._kept(
            "progressive.parquet",
            {**self.of_progressive.key, **what},
            Progressive.load,
            lambda: progressive(self.model, self.of_progressive.corpus.source, **what, verbose=self.verbose),
        )

    def redistribution(self, censuses: Sequence[Census]) -> Redistribution:
        """With the loss changes of a census of the same documents, where there is one of zero ablation at one token."""
        asked = self.settings
        layers = (
            self.layers
            if asked.redistribution_layers is None
            else moe_layers_of(self.model.cfg, asked.redistribution_layers)
        )
        beside = next((one for one in censuses if self._is_beside(one, layers)), None)
        key = {
            **self.of_redistribution.key,
            "layers": list(layers),
            "seed": asked.seed,
            "census": None
            if beside is None
            else {name: beside.identity.get(name) for name in ("tokens", "sample", "layers")},
        }
        return self._kept(
            "redistribution.parquet",
            key,
            Redistribution.load,
            lambda: redistribution(
                self.model,
                self.of_redistribution.corpus.source,
                layers=layers,
                census=beside,
                seed=asked.seed,
                verbose=self.verbose,
            ),
        )

    def _is_beside(self, one: Census, layers: Sequence[int]) -> bool:
        return (
            one.identity.get("tokens") == self.of_redistribution.documents.fingerprint
            and (one.identity.get("scope"), one.identity.get("how")) == ("token", "zero")
            and set(layers) <= set(one.layers)
        )

    def _kept(
        self, name: str, key: Mapping[str, Any], load: Callable[[Path], Result], make: Callable[[], Result]
    ) -> Result:
        """A stage's result: of the folder where it is there, else made, and kept there.

        Raises:
            ValueError: what is there is of another run.
        """
        asked = {
            "weights": weights_fingerprint(self.model),
            **key,
            "versions": {name: version(name) for name in ("moe-lens", "torch", "transformers")},
        }
        asked = json.loads(json.dumps(asked))
        if self.folder is None:
            return make()
        path = self.folder / name
        if path.exists():
            kept = load(path)
            before = kept.provenance.get("asked", {})
            other = [name for name, value in asked.items() if before.get(name) != value]
            if other:
                raise ValueError(
                    f"{str(path)!r} is of another run, by its {few(other)}; name another folder, or delete that file"
                )
            return kept
        made = make()
        # Every result is a frozen dataclass with a provenance.
        made = replace(made, provenance={**made.provenance, "asked": asked})  # type: ignore[type-var]
        made.save(path)
        return made


def verified(model: HookedMoE, reference: nn.Module | str | Path, of: GivenDocuments) -> Verification:
    """Verify a model on a corpus's longest documents, cut short.

    Raises:
        ValueError: too few tokens; what `verify` raises.
    """
    rows = [tokens[real] for tokens, real in of.documents.rows]
    longest = sorted(rows, key=len, reverse=True)[:_VERIFIED_DOCUMENTS]
    cut = [row[:_VERIFIED_LENGTH] for row in longest]
    tokens = pad_sequence(cut, batch_first=True)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in cut], batch_first=True)
    device = model.cfg.device
    return verify(model, reference, tokens.to(device), attention_mask=mask.to(device))

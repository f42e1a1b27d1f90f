"""The settings of the published audit, by model, as data.

    preset = AUDIT_PRESETS["olmoe"]
    corpus = preset_batches(model, preset.corpus_preset, prepend_bos=None)
    table = census(model, corpus, layers=preset.layers)
    metric_table = expert_metrics(model, corpus, layers=preset.layers)
    found = audit(table, metric_table, metrics=preset.metrics, layers=preset.layers, n=preset.n)

    preset = PROGRESSIVE_PRESET
    corpus = preset_batches(model, preset.corpus_preset, prepend_bos=None)
    removal = progressive(
        model,
        corpus,
        layers=preset.layers,
        n=preset.n,
        per_document=preset.per_document,
        min_context=preset.min_context,
    )

`corpus_preset` names a recipe of `moe_lens.corpus_presets`, which says which lines of WikiText-2 are taken and where
they are cut. It reads them from the Hugging Face hub; `documents=read_lines(file)` gives it those of a file instead.
`prepend_bos=None` leaves special tokens to the tokenizer, as the released code does.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), sections 2 and 3 and appendices A.3 and C, for layers, metrics and numbers of positions; its
released code (https://github.com/callmeloui/observational_metrics) for which lines of WikiText-2 are taken and how
positions are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.corpus_presets import PRESETS, WIKITEXT_2, CorpusPreset, HubDataset


@dataclass(frozen=True)
class Lines:
    """Which lines of a corpus are taken, each a document: a corpus preset, for lines in hand.

    Attributes:
        longer_than: characters, without white space at the ends.
        first: so many of these; None is all.
        min_tokens: that a line has; None is no limit.
        max_tokens: a line is cut to so many.
        dataset: where the lines are.
    """

    longer_than: int
    first: int | None
    min_tokens: int | None
    max_tokens: int
    dataset: HubDataset = WIKITEXT_2

    @classmethod
    def of(cls, preset: CorpusPreset) -> Lines:
        """Those of a corpus preset.

        Raises:
            ValueError: it takes no lines of a dataset in order, longer than so many characters and cut.
        """
        in_order = preset.n is None or preset.choice == "first"
        if (
            not isinstance(preset.dataset, HubDataset)
            or preset.longer_than is None
            or preset.max_length is None
            or not in_order
        ):
            raise ValueError(
                f"the corpus preset {preset.name!r} takes no lines of a dataset in their order, longer than so many "
                f"characters and cut to so many tokens"
            )
        return cls(preset.longer_than, preset.n, preset.min_length, preset.max_length, preset.dataset)

    def choose(self, lines: Iterable[str]) -> list[str]:
        """Those that are long enough in characters, as they are, in order; tokens are up to whoever tokenises.

        Raises:
            ValueError: `min_tokens` and `first` together, which only a tokenizer can choose by.
        """
        if self.first is not None and self.min_tokens is not None:
            raise ValueError(
                f"the first {self.first} lines of at least {self.min_tokens} tokens cannot be told without a "
                f"tokenizer; take preset_batches"
            )
        return [line for line in lines if len(line.strip()) > self.longer_than][: self.first]


@dataclass(frozen=True)
class AuditPreset:
    """One published experiment on one model.

    Attributes:
        model: on the Hugging Face hub.
        layers: counted from 0, dense ones included.
        n: positions of each cell; None is all.
        corpus_preset: which lines, a name in `moe_lens.corpus_presets.PRESETS`.
        metrics: names in a `MetricTable`; none where nothing is ranked by a metric.
        drawn: how the released code draws positions. Here, `audit` draws uniformly without replacement.
        removed: how many of the heaviest experts are taken away together, where that is the experiment.
        per_document: at most so many positions of a line are drawn; None is no limit. As in `progressive`.
        min_context: tokens before the one that is predicted, at the positions that are drawn. As in `progressive`.
    """

    model: str
    layers: tuple[int, ...]
    n: int | None
    corpus_preset: str
    metrics: tuple[str, ...]
    drawn: str
    removed: tuple[int, ...] = ()
    per_document: int | None = None
    min_context: int = 0

    @property
    def corpus(self) -> Lines:
        """The lines of `corpus_preset`."""
        return Lines.of(PRESETS[self.corpus_preset])


_OLMOE, _QWEN, _DEEPSEEK = (
    "allenai/OLMoE-1B-7B-0924",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "deepseek-ai/DeepSeek-V2-Lite",
)
_AUDITED, _REDISTRIBUTED = "causal-audit", "causal-audit-redistribution"
_UNIFORM = "uniformly over positions, without replacement"
_BY_LINE = "with replacement: a line uniformly, then a position of it but the first and the last, uniformly"

AUDIT_PRESETS = {
    "olmoe": AuditPreset(_OLMOE, (0, 4, 7, 11, 15), 200, _AUDITED, PAPER_METRICS, _UNIFORM),
    "qwen2_moe": AuditPreset(_QWEN, (0, 6, 12, 18, 23), 200, _AUDITED, PAPER_METRICS, _BY_LINE),
    "deepseek_v2": AuditPreset(_DEEPSEEK, (1, 7, 13, 20, 26), 200, _AUDITED, PAPER_METRICS, _UNIFORM),
}
"""Tables 1 to 6: the metrics and the routing-weight control, by the model's family."""

PROGRESSIVE_PRESET = AuditPreset(
    _OLMOE,
    (0, 1, 7, 8, 9, 15),
    500,
    "causal-audit-progressive",
    (),
    "one position of each line, the lines shuffled",
    removed=(1, 2, 3, 4, 5, 6, 7),
    per_document=1,
    min_context=32,
)
"""Tables 8 and 9."""

REDISTRIBUTION_PRESETS = {
    "olmoe": AuditPreset(_OLMOE, tuple(range(16)), None, _REDISTRIBUTED, (), "all"),
    "qwen2_moe": AuditPreset(_QWEN, (0, 6, 12, 18, 23), None, _REDISTRIBUTED, (), "all"),
}
"""Figure 2 and, of Qwen, table 7."""

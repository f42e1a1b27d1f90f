"""The settings of the published audit, by model, as data.

    preset = AUDIT_PRESETS["olmoe"]
    texts = preset.corpus.choose(lines)  # of WikiText-2's raw test split
    table = census(model, texts, layers=preset.layers)
    found = audit(table, metric_table, metrics=preset.metrics, layers=preset.layers, n=preset.n)

`choose` gives whole lines; cutting them to `max_tokens` is up to whoever tokenises.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), sections 2 and 3 and appendices A.3 and C, for layers, metrics and numbers of positions; its
released code (https://github.com/callmeloui/observational_metrics) for which lines of WikiText-2 are taken and how
positions are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.corpus_presets import HubDataset

WIKITEXT_2 = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text")


@dataclass(frozen=True)
class Lines:
    """Which lines of a corpus are taken, each a document.

    Attributes:
        longer_than: characters, without white space at the ends.
        first: so many of these; None is all.
        min_tokens: before the position that is measured; None is no limit.
        max_tokens: a line is cut to so many.
        dataset: where the lines are.
    """

    longer_than: int
    first: int | None
    min_tokens: int | None
    max_tokens: int
    dataset: HubDataset = WIKITEXT_2

    def choose(self, lines: Iterable[str]) -> list[str]:
        """Those that are long enough in characters, as they are, in order."""
        return [line for line in lines if len(line.strip()) > self.longer_than][: self.first]


@dataclass(frozen=True)
class AuditPreset:
    """One published experiment on one model.

    Attributes:
        model: on the Hugging Face hub.
        layers: counted from 0, dense ones included.
        n: positions of each cell; None is all.
        corpus: its lines.
        metrics: names in a `MetricTable`; none where nothing is ranked by a metric.
        drawn: how the released code draws positions. Here, `audit` draws uniformly without replacement.
        removed: how many of the heaviest experts are taken away together, where that is the experiment.
    """

    model: str
    layers: tuple[int, ...]
    n: int | None
    corpus: Lines
    metrics: tuple[str, ...]
    drawn: str
    removed: tuple[int, ...] = ()


_OLMOE, _QWEN, _DEEPSEEK = (
    "allenai/OLMoE-1B-7B-0924",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "deepseek-ai/DeepSeek-V2-Lite",
)
_AUDITED = Lines(longer_than=50, first=100, min_tokens=None, max_tokens=512)
_REDISTRIBUTED = Lines(longer_than=100, first=200, min_tokens=None, max_tokens=256)
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
    Lines(longer_than=100, first=None, min_tokens=32, max_tokens=256),
    (),
    "one position of each line, the lines shuffled",
    removed=(1, 2, 3, 4, 5, 6, 7),
)
"""Tables 8 and 9."""

REDISTRIBUTION_PRESETS = {
    "olmoe": AuditPreset(_OLMOE, tuple(range(16)), None, _REDISTRIBUTED, (), "all"),
    "qwen2_moe": AuditPreset(_QWEN, (0, 6, 12, 18, 23), None, _REDISTRIBUTED, (), "all"),
}
"""Figure 2 and, of Qwen, table 7."""

"""The statistics of the audit, under one roof.

- `paired_test`: does ablating the expert that a metric ranks highest change the loss more than ablating the lowest?
  t-test and signed-rank test that know of documents, the plain ones beside, Cohen's d with its interval, equivalence,
  a Bayes factor, and the effect that could have been found (`moe_lens.audit.paired_tests`, `signed_rank`,
  `bayes_factor`).
- `holm`, `benjamini_hochberg`, `bonferroni`: corrections within a family; `verdict`: what a cell is called
  (`moe_lens.audit.corrections`).
- `compare_metrics`: posterior odds over metrics and none of them (`moe_lens.audit.metric_comparison`).
"""

from moe_lens.audit.bayes_factor import jzs_log_bayes_factor
from moe_lens.audit.corrections import Verdict, benjamini_hochberg, bonferroni, holm, verdict
from moe_lens.audit.metric_comparison import MetricComparison, compare_metrics, within_token_rank
from moe_lens.audit.paired_tests import SMALLEST_EFFECT, PairedTest, detectable_d, paired_test, tost
from moe_lens.audit.signed_rank import SignedRank, clustered_signed_rank

__all__ = [
    "SMALLEST_EFFECT",
    "MetricComparison",
    "PairedTest",
    "SignedRank",
    "Verdict",
    "benjamini_hochberg",
    "bonferroni",
    "clustered_signed_rank",
    "compare_metrics",
    "detectable_d",
    "holm",
    "jzs_log_bayes_factor",
    "paired_test",
    "tost",
    "verdict",
    "within_token_rank",
]

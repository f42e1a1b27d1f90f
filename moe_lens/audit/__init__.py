"""Test: is the hooked model the model, and do its interventions do what they say? And at scale: a census of what every
expert does to the loss, and an audit of what predicts it."""

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.census import Census, census
from moe_lens.audit.metrics import MetricTable, expert_metrics, metric
from moe_lens.audit.noise import NoiseFloor, noise_floor
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.audit.protocol import audit
from moe_lens.audit.statistics import PairedTest, benjamini_hochberg, bonferroni, holm, paired_test, verdict
from moe_lens.audit.verification import Verification, verify
from moe_lens.interventions.outcomes import LogitDifference

__all__ = [
    "Audit",
    "Census",
    "LogitDifference",
    "MetricTable",
    "NoiseFloor",
    "PairedTest",
    "Progressive",
    "Verification",
    "audit",
    "benjamini_hochberg",
    "bonferroni",
    "census",
    "expert_metrics",
    "holm",
    "metric",
    "noise_floor",
    "paired_test",
    "progressive",
    "verdict",
    "verify",
]

"""Test: is the hooked model the model, and do its interventions do what they say? And at scale: a census of what every
expert does to the loss, and an audit of what predicts it."""

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.census import Census, census
from moe_lens.audit.metrics import MetricTable, expert_metrics, metric
from moe_lens.audit.model_audit import ModelAudit, audit_model
from moe_lens.audit.noise import NoiseFloor, noise_floor
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.audit.protocol import audit
from moe_lens.audit.redistribution import Redistribution, redistribution
from moe_lens.audit.statistics import (
    PairedTest,
    benjamini_hochberg,
    bonferroni,
    compare_metrics,
    holm,
    paired_test,
    verdict,
)
from moe_lens.audit.verification import Verification, verify
from moe_lens.interventions.outcomes import LogitDifference

__all__ = [
    "Audit",
    "AuditSettings",
    "Census",
    "LogitDifference",
    "MetricTable",
    "ModelAudit",
    "NoiseFloor",
    "PairedTest",
    "Progressive",
    "Redistribution",
    "Verification",
    "audit",
    "audit_model",
    "benjamini_hochberg",
    "bonferroni",
    "census",
    "compare_metrics",
    "expert_metrics",
    "holm",
    "metric",
    "noise_floor",
    "paired_test",
    "progressive",
    "redistribution",
    "verdict",
    "verify",
]

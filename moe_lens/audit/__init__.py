"""Test: is the hooked model the model, and do its interventions do what they say?"""

from moe_lens.audit.census import Census, census
from moe_lens.audit.noise import NoiseFloor, noise_floor
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.audit.verification import Verification, verify
from moe_lens.interventions.outcomes import LogitDifference

__all__ = [
    "Census",
    "LogitDifference",
    "NoiseFloor",
    "Progressive",
    "Verification",
    "census",
    "noise_floor",
    "progressive",
    "verify",
]

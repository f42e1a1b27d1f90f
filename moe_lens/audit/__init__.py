"""Test: is the hooked model the model, and do its interventions do what they say?"""

from moe_lens.audit.verification import Verification, verify

__all__ = ["Verification", "verify"]

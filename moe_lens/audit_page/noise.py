"""What a census in half precision says of its own exactness, in words."""

from __future__ import annotations

from html import escape

from moe_lens.audit.noise import CRITERION, NoiseFloor
from moe_lens.audit_page.experiments import Experiment

_HALF = ("bfloat16", "float16")


def noise_said(experiment: Experiment) -> str:
    """The noise floor of an experiment's census in two sentences, as text; empty for one in float32."""
    facts = experiment.facts.get("census") or {}
    dtype = facts.get("dtype")
    floor = NoiseFloor.in_facts(facts)
    if floor is None:
        return f"Noise floor: not measured, although the census is in {dtype}." if dtype in _HALF else ""
    if floor.n_samples == 0:
        return (
            f"Noise floor: unknown, as none of {floor.n_routed_otherwise:,} sampled ablations could be compared with "
            f"float32; the criterion is NOT met."
        )
    met = (
        f"at most {CRITERION:g} times that, so the criterion of exactness is met"
        if floor.meets_criterion
        else f"more than {CRITERION:g} times that, so the criterion of exactness is NOT met"
    )
    return (
        f"Noise floor, {dtype}: without an expert the loss changes by {floor.median_effect:.2g} nats (median of "
        f"{floor.n_samples:,} sampled ablations), and the census is off by {floor.replay_error:.2g} (median, from "
        f"float32), full forward passes with hooks by {floor.hooked_error:.2g}: {met}. Where the changes of a token's "
        f"experts are below {floor.replay_error:.2g} nats, their order is noise."
    )


def noise_html(experiment: Experiment) -> str:
    """The same as a paragraph; empty for float32."""
    said = noise_said(experiment)
    if not said:
        return ""
    floor = NoiseFloor.in_facts(experiment.facts.get("census"))
    bad = ' class="bad"' if floor is not None and not floor.meets_criterion else ""
    return f"<p{bad}>{escape(said)}</p>"

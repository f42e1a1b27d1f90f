"""An explanation in a few plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.routing.decision import Decision, eligible_experts

if TYPE_CHECKING:
    from moe_lens.routing.explanation import Explanation

MOST = 0.8
"""The share of the sum of |contributions| that counts as most of it."""

_NAMED = 3


def summary_of(explanation: Explanation, decision: Decision) -> str:
    """What was decided, by how much, who pushed which way, and how few senders make up most of it."""
    lines = [*_about_decision(explanation, decision), *_about_groups(decision)]
    if explanation.selected != explanation.chosen_by_model:
        did = "chose" if explanation.chosen_by_model else "did not choose"
        lines.append(
            f"In the run the gate {did} it: its own logits differ from the exact ones by up to "
            f"{explanation.model_logit_difference:.2g}, or the choice was edited."
        )
    if explanation.of is not None:
        lines.append(
            f"{explanation.of} adds {explanation.margin:+.3f} to the difference; what follows are its parts."
        )
    return "\n".join([*lines, *_about_senders(explanation), *_about_sums(explanation)])


def _about_decision(explanation: Explanation, decision: Decision) -> list[str]:
    chosen, boundary = (
        explanation.selected,
        f"expert {explanation.boundary} (rank {explanation.boundary_rank})",
    )
    verdict = f"chose expert {explanation.expert}" if chosen else f"left expert {explanation.expert} out"
    weight = f", with routing weight {explanation.routing_weight:.3f}" if chosen else ""
    side = "above" if explanation.logit_difference >= 0 else "below"
    if decision.boundary_given:
        which = "with which it was to be compared"
    else:
        which = "the best that was left out" if chosen else "the worst that was chosen"
        if chosen and decision.router.n_groups > 1:
            eligible = eligible_experts(decision.logits, decision.router)
            which += " of those that could have been chosen" if bool(eligible[decision.boundary]) else ""
    return [
        f"At token {explanation.pos} ({explanation.token!r}) the router of layer {explanation.router} {verdict}: it "
        f"has rank {explanation.rank} of {len(decision.logits)}, and {decision.router.top_k} are chosen{weight}.",
        f"Its logit lies {abs(explanation.logit_difference):.3f} {side} that of {boundary}, {which}.",
    ]


def _about_groups(decision: Decision) -> list[str]:
    """Under group-limited routing, why rank alone does not decide."""
    router = decision.router
    if router.n_groups == 1:
        return []
    eligible = eligible_experts(decision.logits, router)
    best = decision.logits.view(router.n_groups, -1).amax(dim=-1)
    size = len(decision.logits) // router.n_groups
    group, of_boundary = decision.expert // size, decision.boundary // size
    if not bool(eligible[decision.expert]):
        last = float(best[eligible.view(router.n_groups, -1).any(dim=-1)].min())
        return [
            f"Its group {group} (experts {group * size} to {group * size + size - 1}) is not eligible: its best "
            f"logit lies {last - float(best[group]):.3f} below that of the last of the {router.top_k_groups} groups "
            f"that are, so whatever its rank it could not be chosen."
        ]
    if not bool(eligible[decision.boundary]):
        return [
            f"Expert {decision.boundary} could not have been chosen: its group {of_boundary} is not eligible."
        ]
    return []


def _about_senders(explanation: Explanation) -> list[str]:
    table, lines = explanation.table(), []
    labels = dict(zip(explanation.senders, explanation.labels, strict=True))
    for pushed, sign in (("in", 1), ("out", -1)):
        found = table[sign * table["contribution"] > 0]
        if len(found):
            most = zip(found["sender"][:_NAMED], found["contribution"][:_NAMED], strict=True)
            names = ", ".join(f"{labels[name]} ({value:+.3f})" for name, value in most)
            total = found["contribution"].sum()
            lines.append(f"{_senders(len(found))} pushed it {pushed}, {total:+.3f} together: most {names}.")
    cumulative = table["cumulative"].to_numpy()
    if cumulative[-1] > 0:
        n_most = min(int((cumulative < MOST).sum()) + 1, len(table))
        lines.append(f"{_senders(n_most)} of {len(table)} made up {MOST:.0%} of all pushing, either way.")
    if explanation.n_absent:
        lines.append(
            f"{explanation.n_absent} more are not listed: of experts that the token did not choose, or of tokens that "
            f"it cannot see, they are zero."
        )
    return lines


def _about_sums(explanation: Explanation) -> list[str]:
    """That what was listed is not all there is, where it is not."""
    if explanation.closes:
        return []
    if explanation.of is None:
        what, where = "The senders do not add up to the stream", "the stream"
    else:
        what, where = f"The parts do not add up to what {explanation.of} wrote", "it or one of them"
    missing = f"they miss {explanation.completeness_error:.2g} of the largest logit"
    if explanation.rounding_ratio is not None and not explanation.rounding_ratio <= 1:
        missing = f"what is missing is {explanation.rounding_ratio:.2g} times the most that rounding can be"
    return [
        f"{what}: {missing}. A hook has edited {where}, or something else was written, and the contributions are not "
        f"the whole of the decision."
    ]


def _senders(n: int) -> str:
    return f"{n} sender" + ("" if n == 1 else "s")

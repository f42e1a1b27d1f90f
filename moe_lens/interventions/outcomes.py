"""What is read where a branch ends: the loss, the divergence from the clean prediction, a logit difference.

The logits of many branches over a large vocabulary are the largest tensor of a replay: they are made for a few at a
time and let go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.interventions.arguments import integer
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.replay_plan import HELP
from moe_lens.out_of_memory import InParts


@dataclass(frozen=True)
class LogitDifference:
    """logit(correct) - logit(incorrect) at the position, in logits.

    Attributes:
        correct, incorrect: token ids (`model.to_single_token(" Mary")`).
        name: of the column.
    """

    correct: int
    incorrect: int
    name: str = "logit_difference"

    def __post_init__(self) -> None:
        for field in ("correct", "incorrect"):
            token = getattr(self, field)
            if isinstance(token, str):
                raise ValueError(
                    f"{field}={token!r} is text, and a token's id is wanted; model.to_single_token({token!r}) has it"
                )
            object.__setattr__(self, field, integer(token, field))

    def check(self, d_vocab: int) -> None:
        """Raises:
        ValueError: a token outside the vocabulary, or one compared with itself.
        """
        for token in (self.correct, self.incorrect):
            if not 0 <= token < d_vocab:
                raise ValueError(f"{self}: token {token} is not in the vocabulary, 0..{d_vocab - 1}")
        if self.correct == self.incorrect:
            raise ValueError(f"{self} compares a token with itself")


Outcome = Literal["kl"] | LogitDifference
"""`"kl"`: D_KL(clean prediction || the branch's), nats, over the vocabulary."""


def outcome_names(outcomes: Iterable[Outcome]) -> list[str]:
    return [outcome.name if isinstance(outcome, LogitDifference) else outcome for outcome in outcomes]


def check_outcomes(outcomes: Iterable[Outcome], d_vocab: int) -> None:
    """Raises:
    ValueError: something that is no outcome, or two (or one and the loss) under one name.
    """
    outcomes = list(outcomes)
    for outcome in outcomes:
        if isinstance(outcome, LogitDifference):
            outcome.check(d_vocab)
        elif outcome != "kl":
            raise ValueError(f"outcome {outcome!r} must be 'kl' or a LogitDifference")
    names = ["loss", *outcome_names(outcomes)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two outcomes would be named alike: {names}; give LogitDifferences names of their own"
        )


def read_outcomes(
    clean: CleanRun,
    rows: Int[Tensor, " n"],
    streams: Float[Tensor, "n branch d_model"],
    outcomes: Iterable[Outcome],
    memory_budget: int,
) -> dict[str, Float[Tensor, "n branch"]]:
    """The loss (`"loss"`, nats) of every branch, and the outcomes that are asked for, by name; float32.

    Args:
        clean: whose next tokens and clean prediction are compared with.
        rows: the tokens at which the branches are.
        streams: the branches before the final norm.
        outcomes: beside the loss.
        memory_budget: bytes for logits.
    """
    outcomes = list(outcomes)
    n, n_branches, _ = streams.shape
    # Logits in the model's dtype and float32, and their softmax.
    per_token = clean.model.cfg.d_vocab * (12 + 12 * ("kl" in outcomes))
    step = max(1, memory_budget // (per_token * n_branches))
    in_parts = InParts("tokens' logits of a replay", HELP, step)
    parts = in_parts.run(lambda part: _read(clean, rows[part], streams[part], outcomes), n)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _read(
    clean: CleanRun,
    rows: Int[Tensor, " n"],
    streams: Float[Tensor, "n branch d_model"],
    outcomes: list[Outcome],
) -> dict[str, Float[Tensor, "n branch"]]:
    model, n_branches = clean.model, streams.shape[1]
    logits = model.unembed(model.ln_final(streams)).float()
    targets = clean.next_tokens[rows]
    loss = F.cross_entropy(
        rearrange(logits, "n branch vocab -> (n branch) vocab"),
        targets.repeat_interleave(n_branches),
        reduction="none",
    )
    read = {"loss": rearrange(loss, "(n branch) -> n branch", branch=n_branches)}
    for outcome in outcomes:
        if isinstance(outcome, LogitDifference):
            read[outcome.name] = logits[..., outcome.correct] - logits[..., outcome.incorrect]
        else:
            before = model.unembed(model.ln_final(clean.final[rows][:, None])).float().log_softmax(dim=-1)
            after = logits.log_softmax(dim=-1)
            read[outcome] = (before.exp() * (before - after)).sum(dim=-1)
    return read

"""What a router would have decided at one token had something not been in the stream, frozen scale beside recompute.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 7.2, whose
ablation of scores is the frozen one.
"""

from __future__ import annotations

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moe_lens.routing.decision import Decision
from moe_lens.routing.rank_shift import choice_of, ranks


def without_senders(decision: Decision, vectors: Float[Tensor, "sender d_model"]) -> pd.DataFrame:
    """The decision without each of some vectors, one at a time; see `Explanation.verify`.

    Args:
        vectors: what each sender wrote into the stream.

    Returns:
        A row for each: `rank`, `selected`, `logit_difference` (logits) and `weight` of the expert, `_frozen` (scores
        taken from the exact logits) and `_recomputed` (the vector taken from the stream before the norm, in the model's
        dtype, without the hooks that the model carries), and `_gap`, the second less the first.
    """
    expert, boundary = decision.expert, decision.boundary
    frozen = decision.logits - vectors @ decision.readout.T / decision.scale
    chosen, weights, frozen_ranks = choice_of(frozen, decision.router)
    stream = decision.token.at_receiver("hook_resid_mid").float()
    logits, chosen_again, weights_again = decision.token.routed(stream - vectors)
    quantities = {
        "rank": (frozen_ranks[:, expert], ranks(logits)[:, expert]),
        "selected": (chosen[:, expert], chosen_again[:, expert]),
        "logit_difference": tuple(of[:, expert] - of[:, boundary] for of in (frozen, logits)),
        "weight": (weights[:, expert], weights_again[:, expert]),
    }
    columns = {}
    for name, (without, recomputed) in quantities.items():
        columns[f"{name}_frozen"] = without.cpu().numpy()
        columns[f"{name}_recomputed"] = recomputed.cpu().numpy()
        if name != "selected":
            columns[f"{name}_gap"] = (recomputed - without).cpu().numpy()
    return pd.DataFrame(columns)

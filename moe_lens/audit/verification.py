"""Is this the model that transformers runs, and do interventions do what they say? Asked before any result.

Every check compares the hooked model with something it was not made from (transformers' model, or itself
before and after), and can fail.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), whose audit verifies loss, cleared hooks and token-level effect before it measures.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_lens.audit.checks import (
    POSITIONS_NEEDED,
    Check,
    ablated_experts,
    decomposition,
    distinct_losses,
    finite_numbers,
    nothing_left,
    our_run,
    same_model,
    their_run,
)
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import require_all_layers
from moe_lens.model.text import Text
from moe_lens.routing.documents import real_tokens


@dataclass(frozen=True)
class Verification:
    """The checks of one model on one text. A model whose numbers are not finite fails the first check, and the
    others are not run."""

    checks: tuple[Check, ...]
    model_name: str
    dtype: torch.dtype
    n_documents: int
    n_tokens: int

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_frame(self) -> pd.DataFrame:
        """One row per check: `check`, `value`, `rule`, `tolerance`, `unit`, `passed`, `meaning`."""
        names = [field.name for field in fields(Check)]
        rows = [{name: getattr(check, name) for name in names} for check in self.checks]
        frame = pd.DataFrame(rows).rename(columns={"name": "check"})
        frame.insert(5, "passed", [check.passed for check in self.checks])
        return frame

    def __str__(self) -> str:
        rows = [("check", "measured", "must be", "", "what it means")]
        for check in self.checks:
            measured = f"{check.value:.3g} {check.unit}".rstrip()
            bound = f"{check.rule} {check.tolerance:g}"
            rows.append((check.name, measured, bound, "ok" if check.passed else "FAIL", check.meaning))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
            for row in rows
        ]
        n_passed = sum(check.passed for check in self.checks)
        dtype = str(self.dtype).removeprefix("torch.")
        head = (
            f"{self.model_name}, {dtype}, {self.n_tokens} tokens in {self.n_documents} documents: "
            f"{n_passed} of {len(self.checks)} checks passed"
        )
        return "\n".join([head, "", lines[0], "-" * max(map(len, lines)), *lines[1:]])


def load_reference(model: HookedMoE, path_or_hub_id: str | Path) -> nn.Module:
    """The checkpoint as transformers loads it, in the hooked model's dtype and on its device.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    from moe_lens.converters.loading import HUB_WEIGHTS, find_checkpoint

    directory = find_checkpoint(path_or_hub_id, model.cfg.revision, HUB_WEIGHTS)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=model.cfg.dtype, use_safetensors=True, trust_remote_code=False
    )
    return reference.to(model.cfg.device).eval()


@torch.no_grad()
def verify(
    model: HookedMoE,
    reference: nn.Module | str | Path,
    tokens_or_text: Int[Tensor, "batch pos"] | Text,
    *,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Verification:
    """Compare a hooked model with transformers' on the same tokens, and try its interventions.

    Args:
        reference: transformers' model of the same checkpoint and dtype, or the checkpoint (a directory, a hub
            id, `"mini"`), which transformers then loads.
        tokens_or_text: documents as tokens `[batch, pos]` or texts; at least 100 positions with a next token.
        attention_mask: true where tokens are real; for tokens.
        prepend_bos: for texts, as in `model.tokenize`.

    Returns:
        The table of checks. Losses are in nats.

    Raises:
        ValueError: too few tokens; a reference of another dtype, vocabulary or kind; a model all of whose
            experts are always active; a streamed model.

    Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models".
    """
    require_all_layers(model, "a comparison with transformers")
    tokens, mask = model.tokens_and_mask(tokens_or_text, attention_mask, prepend_bos=prepend_bos)
    real = real_tokens(tokens, mask)
    has_next = real[:, :-1] & real[:, 1:]
    if int(has_next.sum()) < POSITIONS_NEEDED:
        raise ValueError(
            f"the text has {int(has_next.sum())} tokens with a next one; verification needs {POSITIONS_NEEDED}"
        )
    if model.cfg.top_k == model.cfg.n_experts:
        raise ValueError(
            f"all {model.cfg.n_experts} experts of {model.cfg.model_name} are always active: nothing is routed"
        )
    if not isinstance(reference, nn.Module):
        reference = load_reference(model, reference)
    _check_reference(model, reference)

    left_on = sum(point.is_listened_to for point in model.hook_dict.values())
    ours = our_run(model, tokens, mask)
    theirs = their_run(model, reference, tokens, real, has_next)

    def verification(checks: list[Check]) -> Verification:
        return Verification(
            checks=tuple(checks),
            model_name=model.cfg.model_name,
            dtype=model.cfg.dtype,
            n_documents=len(tokens),
            n_tokens=int(real.sum()),
        )

    finite = finite_numbers(ours, theirs, real)
    if not finite.passed:
        return verification([finite])
    ablations = list(ablated_experts(model, tokens, real, ours, theirs))
    after = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    left_on = max(left_on, sum(point.is_listened_to for point in model.hook_dict.values()))
    return verification(
        [
            finite,
            *same_model(model, ours, theirs, real, has_next),
            distinct_losses(ours.loss[has_next]),
            *ablations,
            *nothing_left(ours.loss[has_next], after[has_next], left_on),
            *decomposition(model, tokens, mask),
        ]
    )


def _check_reference(model: HookedMoE, reference: Any) -> None:
    dtype, d_vocab = next(reference.parameters()).dtype, reference.get_input_embeddings().weight.shape[0]
    if dtype != model.cfg.dtype or d_vocab != model.cfg.d_vocab:
        raise ValueError(
            f"the reference is {dtype} with {d_vocab} tokens, the hooked model {model.cfg.dtype} with "
            f"{model.cfg.d_vocab}: they cannot be compared"
        )
    for layer in model.cfg.moe_layers:
        if not hasattr(getattr(reference.model.layers[layer], "mlp", None), "gate"):
            raise ValueError(f"layer {layer} of the reference has no router at `mlp.gate`")

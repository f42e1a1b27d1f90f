"""Which heads move names: path patching of indirect-object prompts, beside what the heads say to a router.

In "When Mary and John went to the store, John gave a drink to" the tokens are called IO (Mary), S1 and S2 (John, twice)
and END (to). A head's output at END is replaced by what it is in a sentence about three other people, attention is held
and MLPs are recomputed. Where logit(IO) - logit(S) then falls, the head was working for the right name, and where it
rises, against it. In GPT-2 the former are the name movers, which attend to IO and write what they find there; but a
head that holds S back looks the same in the difference, so the two logits are given apart.

Source: Wang et al. 2023, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small"
(arXiv:2211.00593), section 3.1; "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR
2026), section 6.1 and figure 17.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.corpus import bos_by_default
from moe_lens.indirect_object import IndirectObjectPrompt, corrupted_prompts
from moe_lens.interventions.path_patching import path_patch
from moe_lens.interventions.path_result import PathPatching
from moe_lens.interventions.path_run import Freeze
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import positive_integer
from moe_lens.routing.readout import check_receiver
from moe_lens.routing.score_maps import MeanScoreVarianceMaps, mean_score_variance_maps

HeadMap = Float[np.ndarray, "layer head"]
KEYS = ("S1", "S2", "IO")
"""The tokens that END attends to."""


class NamePositions(NamedTuple):
    """The columns of each prompt's tokens."""

    IO: Int[Tensor, " batch"]
    S1: Int[Tensor, " batch"]
    S2: Int[Tensor, " batch"]
    END: Int[Tensor, " batch"]


class PromptBatch(NamedTuple):
    """Clean and corrupted prompts, token for token.

    Attributes:
        answers: the tokens of the indirect object and of the subject.
    """

    tokens: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    positions: NamePositions
    answers: Int[Tensor, "two batch"]

    def answer_logits(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "two batch"]:
        """logit(IO) and logit(S) at END, each less the mean over the vocabulary: a shift of all logits says nothing."""
        rows = torch.arange(len(logits), device=logits.device)
        at_end = logits[rows, self.positions.END].float()
        return torch.stack([at_end[rows, answer] for answer in self.answers]) - at_end.mean(dim=-1)


@dataclass(frozen=True, eq=False)
class NameMovers:
    """Means over prompts, with their standard errors.

    Attributes:
        effect: of each head: the change of logit(IO) - logit(S) when its output at END is the corrupted run's, in
            logits. Negative: the head works for the right name.
        effect_on_IO, effect_on_S: the two parts of it: changes of the two logits, each less the mean over the
            vocabulary; effect = effect_on_IO - effect_on_S.
        effect_standard_error, effect_on_IO_standard_error, effect_on_S_standard_error: over prompts.
        maps: by key (`S1`, `S2`, `IO`): the variance of scores that each head carries from the key to the router at
            END, and how much END attends to the key.
        router: whose scores these are.
        logit_difference, corrupted_logit_difference: of the prompts and of the corrupted ones (for the same two
            names), in logits.
        share_right: of prompts where logit(IO) > logit(S).
        n_prompts: how many.
        freeze: the rule of path patching.
        null_change: see `PathPatching`.
    """

    effect: HeadMap
    effect_standard_error: HeadMap
    effect_on_IO: HeadMap
    effect_on_IO_standard_error: HeadMap
    effect_on_S: HeadMap
    effect_on_S_standard_error: HeadMap
    maps: dict[str, MeanScoreVarianceMaps]
    router: str
    logit_difference: float
    corrupted_logit_difference: float
    share_right: float
    n_prompts: int
    freeze: str
    null_change: float

    def __repr__(self) -> str:
        first = self.to_frame().iloc[0]
        return (
            f"<NameMovers of {self.n_prompts} prompts at {self.router}: {first['head']} does most, "
            f"{first['effect']:+.3f} of {self.logit_difference:.3f} logits; freeze {self.freeze!r}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for each head, the one that does most first.

        Returns:
            Columns `head`, `layer`, `effect`, `effect_on_IO`, `effect_on_S`, each followed by its `_standard_error`
            (logits); `attention_IO`, `attention_S1`, `attention_S2`; and `variance_IO`, `variance_S1`, `variance_S2`
            (logits², at the router; attention and variance are NaN where the head comes after it).
        """
        n_layers, n_heads = self.effect.shape
        columns: dict[str, object] = {
            "head": [f"A{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)],
            "layer": np.repeat(np.arange(n_layers), n_heads),
        }
        for name in ("effect", "effect_on_IO", "effect_on_S"):
            for column in (name, f"{name}_standard_error"):
                columns[column] = getattr(self, column).ravel()
        for quantity in ("attention", "variance"):
            for key in ("IO", "S1", "S2"):
                columns[f"{quantity}_{key}"] = getattr(self.maps[key], quantity).flatten().numpy()
        frame = pd.DataFrame(columns)
        return frame.sort_values("effect", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def name_movers(
    model: HookedMoE,
    prompts: Sequence[IndirectObjectPrompt],
    *,
    corrupted: Sequence[str] | None = None,
    router: int | None = None,
    freeze: Freeze = "attention",
    batch_size: int = 50,
    verbose: bool = False,
) -> NameMovers:
    """Path patching from every head to the logits at END, and the score variance maps from the names to END.

    Args:
        model: run without gradients, and without hooks of its own.
        prompts: from `indirect_object_prompts`.
        corrupted: of each the corrupted one, of as many tokens; None makes them by `corrupted_prompts`.
        router: an MoE layer, whose scores are mapped; None is the last.
        freeze: what lies between a head and the logits, as in `path_patch`.
        batch_size: how many prompts are run at once.
        verbose: show a progress bar.

    Raises:
        ValueError: no prompts; not one corrupted prompt for each; a prompt that differs from its corrupted one in more
            than three tokens, or another name that is not one token; no such MoE layer.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r} must be prompts of `indirect_object_prompts`")
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, IndirectObjectPrompt):
            raise ValueError(f"{prompt!r} is no prompt of `indirect_object_prompts`")
    corrupted = corrupted_prompts(prompts) if corrupted is None else list(corrupted)
    if not prompts:
        raise ValueError("there are no prompts")
    if len(corrupted) != len(prompts):
        raise ValueError(f"there are {len(corrupted)} corrupted prompts for {len(prompts)} prompts")
    receiver = check_receiver(model, model.cfg.moe_layers[-1] if router is None else router)
    size = positive_integer(batch_size, "batch_size")
    of_answers, clean, other, null_change = [], [], [], 0.0
    batches = list(prompt_batches(model, prompts, corrupted, size))
    for batch in tqdm(batches, disable=not verbose, desc="path patching", unit="batch"):
        patched = [_patched(model, batch, answer, freeze) for answer in range(2)]
        of_answers.append(torch.stack([p.effect.cpu() for p in patched if p.effect is not None]))
        clean.append(torch.stack([p.clean_metric.cpu() for p in patched if p.clean_metric is not None]))
        null_change = max(null_change, *(p.null_change for p in patched))
        with torch.no_grad():
            logits = model(batch.corrupted, attention_mask=batch.mask)
        other.append(batch.answer_logits(logits).cpu())
    shape = (model.cfg.n_layers, model.cfg.attention.n_heads)
    on_io, on_s = (effect.view(*shape, -1) for effect in torch.cat(of_answers, dim=-1).double())
    right, wrong = torch.cat(clean, dim=-1)
    others = torch.cat(other, dim=-1)
    n = len(prompts)

    def error(effect: Float[Tensor, "layer head prompt"]) -> HeadMap:
        if n == 1:
            return np.full(shape, np.nan)
        return (effect.std(dim=-1) / n**0.5).numpy()

    return NameMovers(
        effect=(on_io - on_s).mean(dim=-1).numpy(),
        effect_standard_error=error(on_io - on_s),
        effect_on_IO=on_io.mean(dim=-1).numpy(),
        effect_on_IO_standard_error=error(on_io),
        effect_on_S=on_s.mean(dim=-1).numpy(),
        effect_on_S_standard_error=error(on_s),
        maps={key: mean_score_variance_maps(model, _pairs(batches, key), receiver) for key in KEYS},
        router=f"M{receiver}",
        logit_difference=float((right - wrong).mean()),
        corrupted_logit_difference=float((others[0] - others[1]).mean()),
        share_right=float((right > wrong).float().mean()),
        n_prompts=n,
        freeze=freeze,
        null_change=null_change,
    )


def _patched(model: HookedMoE, batch: PromptBatch, answer: int, freeze: Freeze) -> PathPatching:
    """Every head's effect on the logit of the indirect object (0) or the subject (1)."""
    return path_patch(
        model,
        batch.tokens,
        batch.corrupted,
        "heads",
        freeze=freeze,
        positions=batch.positions.END,
        attention_mask=batch.mask,
        metric=lambda logits: batch.answer_logits(logits)[answer],
    )


def _pairs(batches: Sequence[PromptBatch], key: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """From END to a key, as `mean_score_variance_maps` takes them."""
    for batch in batches:
        yield batch.tokens, batch.mask, batch.positions.END, getattr(batch.positions, key)


def prompt_batches(
    model: HookedMoE, prompts: Sequence[IndirectObjectPrompt], corrupted: Sequence[str], batch_size: int
) -> Iterator[PromptBatch]:
    """Tokens of prompts and corrupted prompts, and where the names are: where the two differ.

    Raises:
        ValueError: see `name_movers`.
    """
    bos = bos_by_default(model)
    for start in range(0, len(prompts), batch_size):
        some, others = prompts[start : start + batch_size], corrupted[start : start + batch_size]
        (tokens, mask), (other, other_mask) = (
            model.tokenize(list(texts), prepend_bos=bos) for texts in ([p.text for p in some], others)
        )
        lengths, other_lengths = mask.sum(dim=1), other_mask.sum(dim=1)
        columns = []
        for row, (prompt, text) in enumerate(zip(some, others, strict=True)):
            n = int(lengths[row])
            same_length = n == int(other_lengths[row])
            differ = (tokens[row, :n] != other[row, :n]).nonzero()[:, 0].tolist() if same_length else []
            if len(differ) != 3:
                raise ValueError(
                    f"{prompt.text!r} and the corrupted {text!r} must differ in three tokens, the names; they are {n} "
                    f"and {int(other_lengths[row])} tokens long"
                    + (f" and differ in {len(differ)}" if same_length else "")
                )
            first, second, third = differ
            io, s1 = (first, second) if prompt.order == "ABBA" else (second, first)
            columns.append((io, s1, third, n - 1))
        positions = NamePositions(*torch.tensor(columns, device=tokens.device).T)
        answers = [
            [model.to_single_token(getattr(p, who)) for p in some] for who in ("indirect_object", "subject")
        ]
        yield PromptBatch(tokens, other, mask, positions, torch.tensor(answers, device=tokens.device))

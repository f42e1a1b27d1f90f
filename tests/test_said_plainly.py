"""What is typed by mistake is answered by what would be right, and results show themselves in a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import interventions
from moe_lens.audit import census
from moe_lens.interventions import (
    Ablate,
    Branches,
    CleanRun,
    LogitDifference,
    activation_patch,
    expert_reference,
    name_movers,
    path_patch,
    replay,
    run_with_interventions,
    single_slots,
)

TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 4].mean()


@pytest.fixture
def model(model_of: Any) -> Any:
    return model_of("olmoe")


def test_everything_exported_is_there() -> None:
    assert all(hasattr(interventions, name) for name in interventions.__all__)


def test_a_tokenizers_output_is_told_what_to_give(model: Any) -> None:
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    for run in (model, lambda tokens: census(model, tokens)):
        with pytest.raises(ValueError, match=r"'input_ids'.*'attention_mask' as attention_mask="):
            run(given)


def test_mistakes(model: Any) -> None:
    with pytest.raises(TypeError, match=r"^'M1E2' is no intervention"):
        run_with_interventions(model, TOKENS, "M1E2")  # type: ignore[arg-type]
    with (
        pytest.raises(TypeError, match=r"several interventions; .* \*specs"),
        model.intervene([Ablate(ranks=1)]),
    ):
        pass
    with pytest.raises(ValueError, match=r"correct=' Mary' is text.*to_single_token\(' Mary'\)"):
        LogitDifference(" Mary", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"clean_cache is what model\.run_with_cache"):
        activation_patch(model, TOKENS, TOKENS, metric, "attn.hook_z", over="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation='z' is no hook point.*nearest are attn\.hook_z$"):
        activation_patch(model, TOKENS, {}, metric, "z", over="layer")
    for given in (TOKENS, "text"):
        with pytest.raises(ValueError, match=r"one document: tokens \[pos\]"):
            CleanRun.of(model, given)  # type: ignore[arg-type]
    for given in (8, ["text"], "text"):
        with pytest.raises(ValueError, match="indirect_object_prompts"):
            name_movers(model, given)  # type: ignore[arg-type]


def test_layers_by_number_or_name(model: Any) -> None:
    assert Ablate(ranks=1, layers="M1") == Ablate(ranks=1, layers=1) == Ablate(ranks=1, layers=np.int64(1))
    one = census(model, TOKENS, layers=1).to_pandas()
    for layers in ("M1", ["M1"], np.int64(1)):
        assert census(model, TOKENS, layers=layers).to_pandas().equals(one)  # type: ignore[arg-type]
    assert census(model, TOKENS, layers=(2, "M0")).layers == (0, 2)
    assert expert_reference(model, TOKENS, layers="M1").layers == (1,)
    other = TOKENS.flip(1)
    named, numbered = (path_patch(model, TOKENS, other, "A0", receiver=at) for at in ("M1", 1))  # type: ignore[arg-type]
    assert named.to_frame().equals(numbered.to_frame())


def test_results_show_themselves_in_a_line(model: Any) -> None:
    clean = CleanRun.of(model, TOKENS[0])
    branches = Branches(1, single_slots(model.cfg.top_k))
    replayed = replay(clean, branches)
    assert torch.equal(replayed.delta_loss[0], replay(clean, [branches]).delta_loss[0])
    patched = path_patch(model, TOKENS, TOKENS.flip(1), "heads", metric=metric)
    for shown, says in (
        (clean, "6 tokens"),
        (replayed, "at 5 positions; loss"),
        (patched, "to logits at 6 positions"),
        (expert_reference(model, TOKENS, layers=1), "of layers 1; up to 16 samples"),
    ):
        assert says in repr(shown)
        assert "\n" not in repr(shown)

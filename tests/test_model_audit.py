"""The audit of a whole model: what its stages give is what they give alone, once, in order, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.audit import audit, census, expert_metrics, progressive, redistribution
from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.metrics import ExpertStatistics, forget_metric, metric
from moe_lens.audit.model_audit import ModelAudit, audit_model
from tests.families import prompts

model_audit_module: Any = import_module("moe_lens.audit.model_audit")
stages_module: Any = import_module("moe_lens.audit.audit_stages")

Loaded = Callable[[str], Any]
N = 24
LENGTH = 24
# A run takes seconds: verification, census, metrics, and two analyses.
pytestmark = pytest.mark.slow

SETTINGS = AuditSettings(
    seed=5, positions=40, progressive_positions=20, metrics=("activation_norm", "random")
)


def documents(seed: int = 0, batch: int = N) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens, of lengths that differ."""
    tokens, _ = prompts(seed=seed, batch=batch, length=LENGTH)
    lengths = torch.randint(
        LENGTH // 2, LENGTH + 1, (batch, 1), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.arange(LENGTH) < lengths
    return list(zip(tokens.split(8), mask.split(8), strict=True))


def run(model: Any, hf: Any, output: Path | None = None, **how: Any) -> ModelAudit:
    settings = how.pop("settings", SETTINGS)
    return audit_model(model, hf, how.pop("batches", documents()), settings=settings, output=output, **how)


def assert_same(a: ModelAudit, b: ModelAudit) -> None:
    assert len(a.audits) == len(b.audits)
    for one, other in zip(a.audits, b.audits, strict=True):
        pd.testing.assert_frame_equal(one.cells, other.cells, check_exact=True)
    assert a.progressive is not None
    assert b.progressive is not None
    pd.testing.assert_frame_equal(a.progressive.rows, b.progressive.rows, check_exact=True)
    assert a.redistribution is not None
    assert b.redistribution is not None
    pd.testing.assert_frame_equal(
        a.redistribution.correlations, b.redistribution.correlations, check_exact=True
    )


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_stages_give_what_they_give_alone(model_of: Loaded, hf: Loaded, variant: str) -> None:
    model, batches = model_of(variant), documents()
    found = run(model, hf(variant))
    assert found.passed
    assert (found.label, found.model_type) == (model.cfg.model_name, model.cfg.model_type)
    asked: dict[str, Any] = dict(seed=5, n=40)
    alone = census(model, batches, predictors="first_order", **asked)
    table = expert_metrics(model, batches, metrics=["activation_norm", "random"], seed=5)
    cells = audit(alone, table, seed=5).cells
    (one,) = found.audits
    pd.testing.assert_frame_equal(one.cells, cells, check_exact=True)
    assert set(one.cells["metric"]) == {"activation_norm", "random", "routing_weight", "first_order"}
    removed = progressive(model, batches, seed=5, n=20)
    assert found.progressive is not None
    pd.testing.assert_frame_equal(found.progressive.rows, removed.rows, check_exact=True)
    moved = redistribution(model, batches, seed=5, census=alone)
    assert found.redistribution is not None
    pd.testing.assert_frame_equal(found.redistribution.correlations, moved.correlations, check_exact=True)
    assert "delta_loss" in found.redistribution.experts


def test_scopes_and_definitions(model_of: Loaded, hf: Loaded) -> None:
    settings = replace(
        SETTINGS,
        scopes=("token", "sequence"),
        as_released=True,
        layers=(1,),
        progressive=False,
        redistribution=False,
    )
    found = run(model_of("olmoe"), hf("olmoe"), settings=settings, batches=documents(batch=16))
    of = [(one.provenance["scope"], one.cells["as_released"].iloc[0]) for one in found.audits]
    assert of == [("token", ""), ("token", "olmoe"), ("sequence", ""), ("sequence", "olmoe")]
    assert found.progressive is None
    assert found.redistribution is None
    for one in found.audits:
        assert set(one.cells["layer"]) == {1}
        metrics = set(one.cells.loc[one.cells["family"] == "metrics", "metric"])
        assert len(metrics) == (4 if one.cells["as_released"].iloc[0] else 2)
    assert not found.audits[0].cells.equals(found.audits[2].cells)


def test_documents_of_their_own(model_of: Loaded, hf: Loaded) -> None:
    model = model_of("olmoe")
    others = {
        name: documents(seed=i + 1, batch=16)
        for i, name in enumerate(("metrics", "progressive", "redistribution"))
    }
    found = run(
        model,
        hf("olmoe"),
        metrics_corpus=others["metrics"],
        progressive_corpus=others["progressive"],
        redistribution_corpus=others["redistribution"],
    )
    assert found.audits[0].provenance["same_corpus"] is False
    table = expert_metrics(model, others["metrics"], metrics="activation_norm", seed=5)
    assert found.audits[0].provenance["metric_table"]["fingerprint"] == table.provenance["fingerprint"]
    removed = progressive(model, others["progressive"], seed=5, n=20)
    assert found.progressive is not None
    pd.testing.assert_frame_equal(found.progressive.rows, removed.rows, check_exact=True)
    moved = redistribution(model, others["redistribution"], seed=5)
    assert found.redistribution is not None
    pd.testing.assert_frame_equal(found.redistribution.correlations, moved.correlations, check_exact=True)
    assert "delta_loss" not in found.redistribution.experts


def test_a_sample_is_of_the_census_alone_where_progressive_removal_has_other_documents(
    model_of: Loaded, hf: Loaded
) -> None:
    settings = replace(SETTINGS, progressive_positions=None, redistribution=False)
    found = run(model_of("olmoe"), hf("olmoe"), settings=settings)
    assert found.progressive is not None
    assert found.progressive.provenance["sample"]["n"] == 40
    found = run(model_of("olmoe"), hf("olmoe"), settings=settings, progressive_corpus=documents(1, 16))
    assert found.progressive is not None
    assert found.progressive.provenance["sample"] is None


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2"])
def test_a_folder_keeps_what_is_done(
    model_of: Loaded, hf: Loaded, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any stage, a run goes on, does nothing twice, and gives the same numbers."""
    folder = tmp_path / "audit"
    whole = run(model_of(variant), hf(variant))
    done: list[str] = []

    def counted(name: str, stops: bool) -> Callable[..., Any]:
        made = getattr(stages_module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            if stops:
                raise KeyboardInterrupt
            return made(*arguments, **named)

        return call

    stages = ("expert_metrics", "progressive", "redistribution")
    for killed in (*stages, None):
        with monkeypatch.context() as patched:
            for name in stages:
                patched.setattr(stages_module, name, counted(name, name == killed))
            if killed is None:
                found = run(model_of(variant), hf(variant), folder)
                assert_same(found, whole)
            else:
                with pytest.raises(KeyboardInterrupt):
                    run(model_of(variant), hf(variant), folder)
    assert done == [
        "expert_metrics",
        "expert_metrics",
        "progressive",
        "progressive",
        "redistribution",
        "redistribution",
    ]
    done.clear()
    with monkeypatch.context() as patched:
        for name in stages:
            patched.setattr(stages_module, name, counted(name, False))
        assert_same(run(model_of(variant), hf(variant), folder), whole)
    assert done == []
    assert {path.name for path in folder.iterdir()} == {
        "census-token",
        "metrics.safetensors",
        "progressive.parquet",
        "redistribution.parquet",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=6), r"census .*is of another run"),
        (dict(metrics=("random",)), r"metrics\.safetensors' is of another run, by its metrics"),
        (dict(progressive_positions=19), r"progressive\.parquet' is of another run, by its n;"),
        (dict(redistribution_layers=(1,)), r"redistribution\.parquet' is of another run, by its layers"),
    ],
)
def test_a_folder_of_another_run(
    model_of: Loaded, hf: Loaded, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    few = documents(batch=16)
    run(model_of("olmoe"), hf("olmoe"), tmp_path, batches=few)
    if "seed" in changes:
        (tmp_path / "metrics.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        run(model_of("olmoe"), hf("olmoe"), tmp_path, batches=few, settings=replace(SETTINGS, **changes))


def test_another_function_of_one_name_is_another_run(model_of: Loaded, hf: Loaded, tmp_path: Path) -> None:
    """A registered metric's code is part of what is kept."""
    settings = replace(SETTINGS, metrics=("mine",), progressive=False, redistribution=False)
    few = documents(batch=16)
    try:

        @metric("mine")
        def first(statistics: ExpertStatistics) -> Any:
            """The norm."""
            return statistics.count * 1.0

        run(model_of("olmoe"), hf("olmoe"), tmp_path, batches=few, settings=settings)

        @metric("mine", replace=True)
        def second(statistics: ExpertStatistics) -> Any:
            """The norm."""
            return statistics.count * -1.0

        with pytest.raises(ValueError, match=r"metrics\.safetensors' is of another run, by its functions"):
            run(model_of("olmoe"), hf("olmoe"), tmp_path, batches=few, settings=settings)
    finally:
        forget_metric("mine")


def test_another_pad_token_is_another_run_of_released_metrics(
    model_of: Loaded, hf: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, as_released=True, progressive=False, redistribution=False)
    few = documents(batch=16)
    model = model_of("olmoe")
    run(model, hf("olmoe"), tmp_path, batches=few, settings=settings)
    # What the batches have is not what is counted.
    wider = [(torch.nn.functional.pad(t, (0, 2)), torch.nn.functional.pad(m, (0, 2))) for t, m in few]
    run(model, hf("olmoe"), tmp_path, batches=wider, settings=settings)
    monkeypatch.setattr(stages_module, "pad_token_of", lambda model, token: 7)
    with pytest.raises(ValueError, match="another run, by its pad_token"):
        run(model, hf("olmoe"), tmp_path, batches=few, settings=settings)


def test_nothing_without_verification(
    model_of: Loaded, hf: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's weights: verification fails, and nothing is measured."""
    wrong = model_of("olmoe")
    for name in ("census", "expert_metrics", "progressive", "redistribution"):
        monkeypatch.setattr(stages_module, name, lambda *a, **k: pytest.fail("measured without verification"))
    weight = wrong.W_U
    with torch.no_grad():
        weight[0] += 1.0
    try:
        found = run(wrong, hf("olmoe"), tmp_path)
    finally:
        with torch.no_grad():
            weight[0] -= 1.0
    assert not found.passed
    assert (found.censuses, found.audits, found.progressive, found.redistribution) == ((), (), None, None)
    assert list(tmp_path.iterdir()) == []


def test_censuses_that_are_there(model_of: Loaded, hf: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_of("olmoe"), documents()
    made = census(model, batches, layers=(0, 1), how="renormalize")
    settings = replace(SETTINGS, positions=None, layers=(0,), how="renormalize")
    found = run(model, hf("olmoe"), censuses=(made,), settings=settings)
    assert found.censuses == (made,)
    cells = found.audits[0].cells
    assert set(cells["how"]) == {"renormalize"}
    assert set(cells["layer"]) == {0}
    assert found.progressive is not None
    assert found.progressive.provenance["how"] == "renormalize"
    monkeypatch.setattr(stages_module, "verify", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=r"how='renormalize', and progressive removal .* of how='zero'"):
        run(model, hf("olmoe"), censuses=(made,), settings=replace(settings, how="zero"))
    with pytest.raises(ValueError, match="the census has no layer 2; it is of layers 0"):
        run(model, hf("olmoe"), censuses=(made,), settings=replace(settings, layers=(2,)))
    assert found.redistribution is not None
    assert "delta_loss" not in found.redistribution.experts  # of zero ablation alone


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(layers=(9,)), "no MoE layer|layer 9"),
    (dict(scopes=()), "scopes must be one or both of token, sequence"),
    (dict(scopes=("token", "token")), "scopes must be one or both"),
    (dict(how="mean"), "how='mean' must be one of zero, renormalize, reroute"),
    (dict(metrics=("nothing",)), "there is no metric 'nothing'"),
    (dict(as_released="gpt"), "the released code has definitions for"),
    (dict(compare=4), "compare=4 needs 8 active routed experts"),
    (dict(n=41), "n=41 positions are wanted for each cell, and the census has 40"),
    (dict(n=0), "n"),
    (dict(positions=10**6), "n=1000000 positions are wanted"),
    (dict(progressive_positions=10**6), "n=1000000 positions are wanted"),
    (dict(progressive_layers=(9,)), "no MoE layer|layer 9"),
    (dict(redistribution_layers=(9,)), "no MoE layer|layer 9"),
    (dict(seed=-1), "seed"),
    (dict(smallest_effect=0.0), "smallest_effect"),
    (dict(alpha=1.0), "alpha"),
    (dict(memory_budget=0), "memory_budget"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(REFUSED)]
)
def test_refused_before_anything_runs(
    model_of: Loaded, hf: Loaded, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "verify", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=message):
        run(model_of("olmoe"), hf("olmoe"), settings=replace(SETTINGS, **changes))


def test_refused_documents_and_folders(
    model_of: Loaded, hf: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "verify", lambda *a, **k: pytest.fail("something ran"))
    model = model_of("olmoe")
    with pytest.raises(ValueError, match="documents of metrics are gone through more than once"):
        run(model, hf("olmoe"), metrics_corpus=iter(documents()))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(model, hf("olmoe"), tmp_path / "none" / "audit")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(model, hf("olmoe"), tmp_path / "file")
    other = census(model_of("olmoe_gqa_clip"), documents(batch=4), layers=(0,))
    with pytest.raises(ValueError, match="both must be the same"):
        run(model, hf("olmoe"), censuses=(other,))
    with model.hooks([("hook_embed", lambda value, hook: None)]), pytest.raises(ValueError, match="hook"):
        run(model, hf("olmoe"))


def test_verification_is_of_the_longest_documents(model_of: Loaded, hf: Loaded) -> None:
    batches = documents()
    found = run(model_of("olmoe"), hf("olmoe"), batches=batches, settings=replace(SETTINGS, layers=(0,)))
    lengths = sorted((int(n) for _, mask in batches for n in mask.sum(dim=1)), reverse=True)
    assert found.verification.n_documents == 8
    assert found.verification.n_tokens == sum(lengths[: found.verification.n_documents])
    assert np.isfinite([check.value for check in found.verification.checks]).all()

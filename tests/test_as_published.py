"""The published settings by name: for the models that the audit has as it has them, and refused for others."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import AutoConfig

from moe_lens.audit.as_published import as_published
from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.config import MoEConfig
from moe_lens.converters.loading import convert_config
from moe_lens.corpus_presets import PRESETS
from tests.families import variant_config
from tests.full_size_configs import FULL_SIZE_CONFIGS

METRICS = ("utilization_rate", "activation_norm", "mean_routing_weight", "activation_std")
OLMOE, QWEN, DEEPSEEK = (
    "allenai/OLMoE-1B-7B-0924",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "deepseek-ai/DeepSeek-V2-Lite",
)
LAYERS = {OLMOE: (0, 4, 7, 11, 15), QWEN: (0, 6, 12, 18, 23), DEEPSEEK: (1, 7, 13, 20, 26)}


def config(name: str) -> MoEConfig:
    """Of a real model by its name on the hub, or of a tiny one."""
    if name not in FULL_SIZE_CONFIGS:
        return convert_config(variant_config(name), name=name, device="cpu")
    values = dict(FULL_SIZE_CONFIGS[name])
    return convert_config(AutoConfig.for_model(values.pop("model_type"), **values), name=name, device="cpu")


@pytest.mark.parametrize("name", LAYERS)
def test_the_audited_models(name: str) -> None:
    """Section 2 and appendices A.3 and C, by hand."""
    settings, corpora = as_published(config(name), AuditSettings())
    assert (settings.layers, settings.metrics, settings.n) == (LAYERS[name], METRICS, 200)
    assert corpora["census"] == "causal-audit"
    assert settings.progressive == ("progressive" in corpora) == (name == OLMOE)
    assert settings.redistribution == ("redistribution" in corpora) == (name != DEEPSEEK)
    assert set(corpora) <= {"census", "progressive", "redistribution"}
    assert set(corpora.values()) <= set(PRESETS)
    if name == OLMOE:
        assert corpora["progressive"] == "causal-audit-progressive"
        assert settings.progressive_layers == (0, 1, 7, 8, 9, 15)
        assert (settings.progressive_positions, settings.per_document, settings.min_context) == (500, 1, 32)
    else:
        assert (settings.progressive_layers, settings.progressive_positions) == (None, None)
        assert (settings.per_document, settings.min_context) == (None, 0)
    if name != DEEPSEEK:
        assert corpora["redistribution"] == "causal-audit-redistribution"
        assert settings.redistribution_layers == (tuple(range(16)) if name == OLMOE else LAYERS[QWEN])


@pytest.mark.parametrize("name", LAYERS)
def test_what_it_does_not_say_stays(name: str) -> None:
    asked = AuditSettings(
        scopes=("token", "sequence"),
        how="renormalize",
        positions=321,
        as_released=True,
        compare=2,
        smallest_effect=0.3,
        alpha=0.01,
        seed=9,
        memory_budget=77,
    )
    settings, _ = as_published(config(name), asked)
    changed = {f.name for f in fields(asked) if getattr(settings, f.name) != getattr(asked, f.name)}
    of_all = {"layers", "metrics", "n"}
    assert (
        changed
        == of_all
        | {
            OLMOE: {
                "progressive_layers",
                "progressive_positions",
                "per_document",
                "min_context",
                "redistribution_layers",
            },
            QWEN: {"progressive", "redistribution_layers"},
            DEEPSEEK: {"progressive", "redistribution"},
        }[name]
    )


CHOSEN: dict[str, Any] = {
    "layers": (3, 5),
    "metrics": ("random",),
    "n": 17,
    "progressive_layers": (2,),
    "progressive_positions": 40,
    "per_document": 3,
    "min_context": 5,
    "redistribution_layers": (6,),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_the_user_says_wins(name: str) -> None:
    """One at a time, and the others are still filled in."""
    everything, _ = as_published(config(OLMOE), AuditSettings())
    settings, _ = as_published(config(OLMOE), replace(AuditSettings(), **{name: CHOSEN[name]}))
    assert settings == replace(everything, **{name: CHOSEN[name]})


def test_what_is_left_out_stays_out() -> None:
    settings, corpora = as_published(config(OLMOE), AuditSettings(progressive=False, redistribution=False))
    assert (settings.progressive, settings.redistribution) == (False, False)
    assert corpora == {"census": "causal-audit"}
    assert settings.progressive_layers is None
    # Nor are layers missed that only they would need.
    settings, _ = as_published(
        config("olmoe"), AuditSettings(layers=(0,), progressive=False, redistribution=False)
    )
    assert settings.layers == (0,)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_family_that_it_has_not(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"the published audit is of olmoe, qwen2_moe, deepseek_v2; {name} is of '{name}'"
    ):
        as_published(config(name), AuditSettings())


TOO_SHALLOW: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {}, r"audit is of layers 0, 4, 7, 11, 15, no layer 4, .* here \(layers=.*; progressive .*; "
     r"redistribution "),
    ("qwen2_moe", {}, r"audit is of layers .*, no layer 6, 12, 18, 23 here"),
    ("deepseek_v2", {}, r"audit is of layers .*, no layer 7, 13, 20, 26 here"),
    # With layers of one's own, the rest is still of layers that are not there.
    ("olmoe", {"layers": (0,)}, r"progressive removal is of .*, no layer .*7, 8, 9, 15 here \(progressive=False"),
    ("olmoe", {"layers": (0,), "progressive": False}, r"redistribution is of layers .* here \(redistribution=False"),
    ("qwen2_moe", {"layers": (0,)}, r"redistribution is of layers .*, no layer 6, 12, 18, 23 here"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), TOO_SHALLOW)
def test_a_model_without_its_layers(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"has MoE layers .*, and of the published runs {message}"):
        as_published(config(name), AuditSettings(**changes))


def test_a_dense_layer_is_no_layer_of_its() -> None:
    """DeepSeek's layer 0 is dense, so the layers begin at 1; with another dense one, layer 1 is not there either."""
    cfg = config(DEEPSEEK)
    assert 0 not in cfg.moe_layers
    with pytest.raises(ValueError, match=r"audit is of layers .*, no layer 1 here"):
        as_published(replace(cfg, moe_layers=cfg.moe_layers[1:]), AuditSettings())

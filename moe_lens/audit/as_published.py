"""The published audit's settings for a model of one of its families, to be run by name."""

from __future__ import annotations

from dataclasses import replace

from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.protocol_presets import (
    AUDIT_PRESETS,
    PROGRESSIVE_PRESET,
    REDISTRIBUTION_PRESETS,
    AuditPreset,
)
from moe_lens.config import MoEConfig
from moe_lens.routing.arguments import few


def as_published(cfg: MoEConfig, settings: AuditSettings) -> tuple[AuditSettings, dict[str, str]]:
    """Settings with what they leave open as the published audit has it, and which corpus each part is of.

    What the published audit did not do with this family (progressive removal with any but OLMoE, redistribution with
    DeepSeek) is left out. Scopes stay as they are: the paper's words are of scope `token`, its released code is of
    scope `sequence`.

    Args:
        cfg: the model's.
        settings: layers, metrics, n and those of progressive removal and redistribution are filled in where they are
            None (`per_document`, `min_context`: where they are as by default).

    Returns:
        The settings; and names of corpus presets: `census`, and `progressive` and `redistribution` where they are
        done. The released code leaves special tokens to the tokenizer: `prepend_bos=None`.

    Raises:
        ValueError: a family that the published audit has not, or a model without its layers.

    Source: see `moe_lens.audit.protocol_presets`.
    """
    family = cfg.model_type
    if family not in AUDIT_PRESETS:
        raise ValueError(
            f"the published audit is of {', '.join(AUDIT_PRESETS)}; {cfg.model_name} is of {family!r}"
        )
    preset = AUDIT_PRESETS[family]
    corpora = {"census": preset.corpus_preset}
    layers = _layers(cfg, preset, "audit") if settings.layers is None else settings.layers
    filled = replace(
        settings,
        layers=layers,
        metrics=preset.metrics if settings.metrics is None else settings.metrics,
        n=preset.n if settings.n is None else settings.n,
    )
    removal = PROGRESSIVE_PRESET
    if settings.progressive and removal.model == preset.model:
        corpora["progressive"] = removal.corpus_preset
        most = settings.progressive_positions
        filled = replace(
            filled,
            progressive_layers=_layers(cfg, removal, "progressive removal")
            if settings.progressive_layers is None
            else settings.progressive_layers,
            progressive_positions=removal.n if most is None else most,
            per_document=removal.per_document if settings.per_document is None else settings.per_document,
            min_context=settings.min_context or removal.min_context,
        )
    else:
        filled = replace(filled, progressive=False)
    moved = REDISTRIBUTION_PRESETS.get(family)
    if settings.redistribution and moved is not None:
        corpora["redistribution"] = moved.corpus_preset
        if settings.redistribution_layers is None:
            filled = replace(filled, redistribution_layers=_layers(cfg, moved, "redistribution"))
    else:
        filled = replace(filled, redistribution=False)
    return filled, corpora


def _layers(cfg: MoEConfig, preset: AuditPreset, what: str) -> tuple[int, ...]:
    missing = [layer for layer in preset.layers if layer not in cfg.moe_layers]
    if missing:
        or_without = "" if what == "audit" else ", or it can be left out"
        raise ValueError(
            f"the published {what} of {preset.model} is of layers {few(preset.layers)}, and {cfg.model_name} has no "
            f"MoE layer {few(missing)}; layers of your own can be named{or_without}"
        )
    return preset.layers

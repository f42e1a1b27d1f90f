"""The published audit's settings for a model of one of its families, to be run by name."""

from __future__ import annotations

from collections.abc import Sequence
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
    preset, removal, moved = AUDIT_PRESETS[family], PROGRESSIVE_PRESET, REDISTRIBUTION_PRESETS.get(family)
    removes = settings.progressive and removal.model == preset.model
    moves = settings.redistribution and moved is not None
    _check_layers(
        cfg,
        [
            ("audit", preset, settings.layers is None, "layers=, --layers: others can be named"),
            (
                "progressive removal",
                removal,
                removes and settings.progressive_layers is None,
                "progressive=False, --no-progressive: it can be left out",
            ),
            (
                "redistribution",
                moved,
                moves and settings.redistribution_layers is None,
                "redistribution=False, --no-redistribution: it can be left out",
            ),
        ],
    )
    corpora = {"census": preset.corpus_preset}
    filled = replace(
        settings,
        layers=preset.layers if settings.layers is None else settings.layers,
        metrics=preset.metrics if settings.metrics is None else settings.metrics,
        n=preset.n if settings.n is None else settings.n,
        progressive=removes,
        redistribution=moves,
    )
    if removes:
        corpora["progressive"] = removal.corpus_preset
        layers, most = settings.progressive_layers, settings.progressive_positions
        filled = replace(
            filled,
            progressive_layers=removal.layers if layers is None else layers,
            progressive_positions=removal.n if most is None else most,
            per_document=removal.per_document if settings.per_document is None else settings.per_document,
            min_context=settings.min_context or removal.min_context,
        )
    if moved is not None and moves:
        corpora["redistribution"] = moved.corpus_preset
        layers = settings.redistribution_layers
        filled = replace(filled, redistribution_layers=moved.layers if layers is None else layers)
    return filled, corpora


def _check_layers(cfg: MoEConfig, parts: Sequence[tuple[str, AuditPreset | None, bool, str]]) -> None:
    """All that is missing at once.

    Args:
        parts: what each is, its published settings, whether their layers are taken, and what else could be done.
    """
    problems = []
    for what, preset, taken, instead in parts:
        if preset is None or not taken:
            continue
        missing = [layer for layer in preset.layers if layer not in cfg.moe_layers]
        if missing:
            problems.append(
                f"{what} is of layers {few(preset.layers)}, no layer {few(missing)} here ({instead})"
            )
    if problems:
        raise ValueError(
            f"{cfg.model_name} has MoE layers {few(cfg.moe_layers)}, and of the published runs {'; '.join(problems)}"
        )

"""The published settings, and the lines that they choose."""

from __future__ import annotations

from moe_lens.audit.metrics import metric_names
from moe_lens.audit.protocol_presets import AUDIT_PRESETS, PROGRESSIVE_PRESET, REDISTRIBUTION_PRESETS, Lines


def test_published_settings() -> None:
    """Section 2 and appendix C: 20 cells a model at n = 200; depths of 16, 24 and 27 layers, of which DeepSeek's first
    is dense."""
    depths = {"olmoe": 16, "qwen2_moe": 24, "deepseek_v2": 27}
    assert AUDIT_PRESETS.keys() == depths.keys()
    for family, preset in AUDIT_PRESETS.items():
        assert len(preset.layers) * len(preset.metrics) == 20
        assert preset.layers[0] == (1 if family == "deepseek_v2" else 0)
        assert preset.layers[-1] == depths[family] - 1
        assert preset.n == 200
        assert set(preset.metrics) <= set(metric_names())
        assert preset.corpus.max_tokens == 512
    assert (PROGRESSIVE_PRESET.n, PROGRESSIVE_PRESET.removed) == (500, (1, 2, 3, 4, 5, 6, 7))
    assert REDISTRIBUTION_PRESETS["qwen2_moe"].layers == AUDIT_PRESETS["qwen2_moe"].layers


def test_lines() -> None:
    lines = ["", " = Title = ", " " + "a" * 50 + " \n", "b" * 51, "c" * 60, "d" * 52]
    assert Lines(50, 2, None, 512).choose(lines) == ["b" * 51, "c" * 60]
    assert Lines(50, None, None, 512).choose(lines) == lines[3:]
    assert Lines(0, 3, None, 256).choose(lines) == lines[1:4]

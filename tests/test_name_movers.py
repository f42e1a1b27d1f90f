"""Name movers of the bundled model: against full runs with hooks, and figures that show their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, plots
from moe_lens.indirect_object import corrupted_prompts, indirect_object_prompts
from moe_lens.interventions.name_movers import NameMovers, name_movers, prompt_batches
from moe_lens.plots import style
from moe_lens.routing.score_maps import score_variance_maps

N = 12


@pytest.fixture(scope="module")
def mini() -> HookedMoE:
    return HookedMoE.from_pretrained("mini", dtype=torch.float32, device="cpu", verbose=False)


@pytest.fixture(scope="module")
def movers(mini: HookedMoE) -> NameMovers:
    return name_movers(mini, indirect_object_prompts(N), batch_size=5)


def test_the_columns_hold_the_names(mini: HookedMoE) -> None:
    prompts = indirect_object_prompts(N, names="all", templates="all")
    corrupted = corrupted_prompts(prompts)
    seen = 0
    for batch in prompt_batches(mini, prompts, corrupted, 5):
        rows = torch.arange(len(batch.tokens))
        for row in rows.tolist():
            prompt = prompts[seen]
            io, s1, s2, end = (int(columns[row]) for columns in batch.positions)
            words = [mini.to_string(int(token)).strip() for token in batch.tokens[row, [io, s1, s2]]]  # type: ignore[union-attr]
            assert words == [prompt.indirect_object.strip(), *[prompt.subject.strip()] * 2]
            assert (io < s1) == (prompt.order == "ABBA")
            assert max(io, s1) < s2 < end
            assert end == int(batch.mask[row].sum()) - 1
            assert mini.to_string(batch.tokens[row, 1 : end + 1]) == prompt.text
            differ = (batch.tokens[row] != batch.corrupted[row]).nonzero()[:, 0].tolist()
            assert differ == sorted([io, s1, s2])
            answers = [mini.to_string(int(answer[row])) for answer in batch.answers]
            assert answers == [prompt.indirect_object, prompt.subject]
            seen += 1
    assert seen == N


def test_heads_against_full_runs(mini: HookedMoE, movers: NameMovers) -> None:
    """A few heads, in full runs with hooks: its z at END the corrupted one, all other attention as it was."""
    prompts = indirect_object_prompts(N)
    (batch,) = prompt_batches(mini, prompts, corrupted_prompts(prompts), N)
    rows, end = torch.arange(N), batch.positions.END
    mask = batch.mask
    with torch.no_grad():
        clean_logits, clean = mini.run_with_cache(batch.tokens, attention_mask=mask)
        other_logits, other = mini.run_with_cache(batch.corrupted, attention_mask=mask)

    def hold(value: Tensor, hook: Any) -> Tensor:
        return clean[hook.name]

    def swap(value: Tensor, hook: Any, layer: int, head: int) -> Tensor:
        z = clean[f"blocks.{layer}.attn.hook_z"].clone()
        z[rows, end, head] = other[f"blocks.{layer}.attn.hook_z"][rows, end, head]
        return z

    def answers(logits: Tensor) -> Tensor:
        at_end = logits[rows, end]
        return torch.stack([at_end[rows, answer] for answer in batch.answers]) - at_end.mean(dim=-1)

    before = answers(clean_logits)
    for layer, head in ((1, 3), (4, 1), (7, 1), (7, 2)):
        hooks = [(f"blocks.{i}.hook_attn_out", hold) for i in range(8) if i != layer]
        hooks.append((f"blocks.{layer}.attn.hook_z", partial(swap, layer=layer, head=head)))
        with torch.no_grad():
            changes = (
                answers(mini.run_with_hooks(batch.tokens, attention_mask=mask, fwd_hooks=hooks)) - before
            )
        per_prompt = {
            "effect": changes[0] - changes[1],
            "effect_on_IO": changes[0],
            "effect_on_S": changes[1],
        }
        for name, values in per_prompt.items():
            assert getattr(movers, name)[layer, head] == pytest.approx(float(values.mean()), abs=2e-4)
            error = getattr(movers, f"{name}_standard_error")[layer, head]
            assert error == pytest.approx(float(values.std() / N**0.5), rel=1e-3)
    assert movers.logit_difference == pytest.approx(float((before[0] - before[1]).mean()), abs=1e-4)
    assert movers.share_right == pytest.approx(float((before[0] > before[1]).float().mean()))
    corrupted = answers(other_logits)
    assert movers.corrupted_logit_difference == pytest.approx(
        float((corrupted[0] - corrupted[1]).mean()), abs=1e-4
    )
    assert movers.n_prompts == N


def test_maps_are_the_score_variance_maps(mini: HookedMoE, movers: NameMovers) -> None:
    prompts = indirect_object_prompts(N)
    (batch,) = prompt_batches(mini, prompts, corrupted_prompts(prompts), N)
    assert movers.router == "M7"
    for key in ("IO", "S1", "S2"):
        alone = []
        for row in range(N):
            end, column = int(batch.positions.END[row]), int(getattr(batch.positions, key)[row])
            alone.append(score_variance_maps(mini, batch.tokens[row : row + 1, : end + 1], end, column, 7))
        maps = movers.maps[key]
        torch.testing.assert_close(
            maps.variance.float(), torch.stack([m.variance for m in alone]).mean(0), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            maps.attention.float(), torch.stack([m.attention for m in alone]).mean(0), rtol=1e-3, atol=1e-6
        )


def test_repr_is_a_line(movers: NameMovers) -> None:
    first = movers.to_frame().iloc[0]
    assert f"{N} prompts at {movers.router}: {first['head']} does most, {first['effect']:+.3f} of" in repr(
        movers
    )
    assert "\n" not in repr(movers)


def test_frame(movers: NameMovers) -> None:
    frame = movers.to_frame()
    assert len(frame) == 40
    assert frame.effect.abs().is_monotonic_decreasing
    np.testing.assert_allclose(frame.effect, frame.effect_on_IO - frame.effect_on_S, atol=1e-9)
    row = frame.set_index("head").loc["A7H1"]
    assert row.effect_on_S == movers.effect_on_S[7, 1]
    assert row.effect_on_S_standard_error == movers.effect_on_S_standard_error[7, 1]
    assert row.attention_S2 == float(movers.maps["S2"].attention[7, 1])
    assert row.variance_IO == float(movers.maps["IO"].variance[7, 1])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["heldout", "train"])
def test_what_the_bundled_model_does(mini: HookedMoE, part: Any) -> None:
    """Two heads read S2 and hold the subject back: they make the difference. Others read both names and raise both."""
    found = name_movers(mini, indirect_object_prompts(60, names=part, templates=part, seed=3))
    assert found.share_right > 0.8
    frame = found.to_frame().set_index("head")
    assert list(frame.index[:2]) == ["A1H3", "A7H1"]
    for head in ("A1H3", "A7H1"):
        assert frame.attention_S2[head] > 0.9
        assert frame.effect[head] < -5 * frame.effect_standard_error[head]
        assert frame.effect_on_S[head] > 5 * frame.effect_on_S_standard_error[head]
    for head in ("A7H2", "A6H3", "A4H1"):
        assert min(frame.attention_IO[head], frame.attention_S1[head]) > 0.3
        assert frame.effect_on_IO[head] < -3 * frame.effect_on_IO_standard_error[head]
        assert frame.effect_on_S[head] < -3 * frame.effect_on_S_standard_error[head]


def test_one_prompt_another_router_and_rule(mini: HookedMoE) -> None:
    (prompt,) = indirect_object_prompts(1)
    one = name_movers(mini, [prompt], corrupted=corrupted_prompts([prompt], seed=9), router=3, freeze="all")
    assert one.router == "M3"
    assert one.freeze == "all"
    assert np.isnan(one.effect_standard_error).all()
    assert bool(one.maps["IO"].variance[4:].isnan().all())
    assert bool(one.maps["IO"].variance[:4].isfinite().all())


def test_bad_input(mini: HookedMoE, model_of: Callable[[str], Any]) -> None:
    prompts = indirect_object_prompts(2)
    with pytest.raises(ValueError, match="there are no prompts"):
        name_movers(mini, [])
    with pytest.raises(ValueError, match="there are 1 corrupted prompts for 2 prompts"):
        name_movers(mini, prompts, corrupted=[prompts[0].text])
    with pytest.raises(ValueError, match=r"must differ in three tokens.* and differ in 0"):
        name_movers(mini, prompts, corrupted=[p.text for p in prompts])
    with pytest.raises(ValueError, match="must differ in three tokens"):
        name_movers(mini, prompts, corrupted=[p.text + " the" for p in prompts])
    with pytest.raises(ValueError, match="receiver 8 is no MoE layer"):
        name_movers(mini, prompts, router=8)
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        name_movers(mini, prompts, batch_size=0)
    # Its tokenizer divides names.
    with pytest.raises(ValueError, match="must differ in three tokens"):
        name_movers(model_of("olmoe"), prompts)


# ---- the figure ----


def test_the_figure_shows_the_numbers(movers: NameMovers) -> None:
    figure = plots.name_mover_maps(movers)
    panels: Any = {trace.name: trace for trace in figure.data}
    expected = {
        "Patched: logit(IO) − logit(S)": (movers.effect, movers.effect_standard_error),
        "Patched: logit(IO)": (movers.effect_on_IO, movers.effect_on_IO_standard_error),
    }
    for key in ("S1", "S2", "IO"):
        maps = movers.maps[key]
        expected[f"(END, {key}): variance of scores"] = (maps.variance, maps.variance_standard_error)
        expected[f"(END, {key}): attention"] = (maps.attention, maps.attention_standard_error)
    assert set(panels) == set(expected)
    for name, (values, errors) in expected.items():
        np.testing.assert_array_equal(panels[name].z, values)
        np.testing.assert_array_equal(panels[name].customdata, errors)
        assert list(panels[name].y) == [f"A{layer}" for layer in range(8)]
        assert list(panels[name].x) == [f"H{head}" for head in range(5)]
        assert panels[name].zmin <= np.nanmin(values)
        assert panels[name].zmax >= np.nanmax(values)
    for names in (
        [name for name in panels if name.startswith("Patched")],
        [name for name in panels if "variance" in name],
        [name for name in panels if "attention" in name],
    ):
        assert len({(panels[name].zmin, panels[name].zmax) for name in names}) == 1
        assert sum(panels[name].showscale for name in names) == 1
    assert panels["Patched: logit(IO)"].zmid == 0
    heading: Any = style.layout_of(figure).title
    assert "12 prompts" in heading.subtitle.text
    assert "held: attention)" in heading.subtitle.text
    assert "router of M7" in heading.subtitle.text


def test_panels_do_not_overlap(movers: NameMovers) -> None:
    layout = style.layout_of(plots.name_mover_maps(replace(movers, freeze="all", router="<b>M7")))
    assert "&lt;b&gt;M7" in layout.title.subtitle.text
    assert "held: attention and MLPs" in layout.title.subtitle.text
    boxes = []
    for panel in range(8):
        number = "" if panel == 0 else panel + 1
        boxes.append((layout[f"xaxis{number}"].domain, layout[f"yaxis{number}"].domain))
    for i, (x, y) in enumerate(boxes):
        assert 0 <= x[0] < x[1] <= 1
        for other_x, other_y in boxes[:i]:
            assert x[1] <= other_x[0] or other_x[1] <= x[0] or y[1] <= other_y[0] or other_y[1] <= y[0]

"""Names of senders: made when asked for, found again, and equal to the slow reference's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.config import MoEConfig
from moe_lens.routing.senders import GRANULARITIES, Names, Senders, check_granularity, senders_before
from tests.reference import reference_run
from tests.reference_routing import sender_hooks, sender_vectors
from tests.routing_cases import VARIANTS, corpus

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def large(hooked: Load) -> MoEConfig:
    """16 layers of 64 experts of 1,024 neurons, with shared experts, a dense layer and output biases."""
    cfg = hooked("deepseek_v2_two_dense").cfg
    router = replace(cfg.router, n_experts=64)
    layers = tuple(range(2, 16))
    return replace(cfg, n_layers=16, router=router, moe_layers=layers, d_expert=1024, d_mlp=4096)


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_the_reference_s(hf: Load, hooked: Load, variant: str, by: str) -> None:
    cfg = hooked(variant).cfg
    tokens, mask = corpus()[0]
    with torch.no_grad():
        _, values = reference_run(hf(variant), tokens, mask)
    for receiver in cfg.moe_layers:
        senders = senders_before(cfg, receiver, by, n_sources=tokens.shape[1])
        assert list(senders) == list(sender_vectors(hf(variant), values, receiver, by))
        components = {g.component: g.written_at for g in senders.groups}
        assert components == sender_hooks(cfg.n_layers, receiver)


@pytest.mark.parametrize("axis", ["position", "offset"])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_a_large_model_s_names_go_there_and_back(large: MoEConfig, by: str, axis: Any) -> None:
    started = time.perf_counter()
    senders = senders_before(large, 15, by, n_sources=4096, source_axis=axis)
    expected = {
        "layer": 1 + 16 + 15,
        "head": 1 + 16 * 5 + 15,
        "source": 1 + 16 * (4 * 4096 + 1) + 15,
        "expert": 1 + 16 + 2 + 13 * 65,
        "neuron": 1 + 16 + 2 * 4096 + 13 * (64 * 1024 + large.shared.d_shared),
    }
    assert len(senders) == expected[by]
    some = {*range(0, len(senders), max(1, len(senders) // 500)), len(senders) - 1}
    for index in some:
        name = senders[index]
        assert senders.index(name) == index
        assert name in senders
        group = senders.group_of(index)
        lies_in = senders.slice_of(group.component)
        assert lies_in.start <= index < lies_in.stop
        assert name.startswith(group.component)
        assert senders[index - len(senders)] == name
        places = senders.coordinates(index)
        assert name.endswith("".join(f"{label}{place}" for label, place in places.items()))
    assert repr(senders).startswith(f"<{len(senders)} senders: embed, ")
    assert time.perf_counter() - started < 5


def test_equality_of_large_ones_makes_no_names(large: MoEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = senders_before(large, 15, "neuron"), senders_before(large, 15, "neuron")
    monkeypatch.setattr(Names, "name", lambda self, index: pytest.fail("a name was made"))
    assert one == other
    assert one != senders_before(large, 14, "neuron")
    assert len(one) > 800_000


def test_iteration_slices_and_groups_agree(large: MoEConfig) -> None:
    for by in GRANULARITIES:
        senders = senders_before(replace(large, d_expert=5, d_mlp=7), 3, by, n_sources=3)
        names = list(senders)
        assert len(set(names)) == len(names) == len(senders)
        assert senders[:] == names
        assert senders[2:9:3] == names[2:9:3]
        assert senders[::-1] == names[::-1] == list(reversed(senders))
        assert [senders[i] for i in range(len(names))] == names
        covered = [name for g in senders.groups for name in senders[senders.slice_of(g.component)]]
        assert covered == names
        assert [senders.group_of(i).component for i in range(len(names))] == [
            g.component for g in senders.groups for _ in range(len(g))
        ]


def test_coordinates(large: MoEConfig) -> None:
    def at(by: str, name: str, **settings: Any) -> dict[str, int]:
        senders = senders_before(large, 5, by, n_sources=9, **settings)
        return senders.coordinates(senders.index(name))

    assert at("layer", "A3") == {}
    assert at("head", "A3H2") == {"H": 2}
    assert at("head", "A3bias") == {}
    assert at("source", "A3H2<-8") == {"H": 2, "<-": 8}
    assert at("source", "A3H2<-q-8", source_axis="offset") == {"H": 2, "<-q-": 8}
    assert at("expert", "M3E63") == {"E": 63}
    assert at("expert", "M3S") == {}
    assert at("neuron", "M3E63N1023") == {"E": 63, "N": 1023}
    assert at("neuron", "M3SN5") == {"N": 5}
    assert at("neuron", "M1N4095") == {"N": 4095}


def test_a_sender_equals_its_names_and_nothing_else(large: MoEConfig) -> None:
    senders = senders_before(large, 1, "layer")
    names = ["embed", "A0", "M0", "A1"]
    assert senders == names
    assert senders == tuple(names)
    assert senders != names[:-1]
    assert senders != ["embed", "A0", "M0", "A2"]
    assert senders != 4
    assert senders != [1, 2, 3, 4]
    assert senders != [None] * 4


@pytest.mark.parametrize(
    "name", ["", "A", "A3H4", "A3H02", "A3H-1", "A16H0", "A3H2 ", "A3", "M15", "a3h2", "A3H2<-0", "embed0"]
)
def test_what_is_no_sender_is_not_found(large: MoEConfig, name: str) -> None:
    senders = senders_before(large, 15, "head")
    assert name not in senders
    with pytest.raises(ValueError, match=rf"there is no sender '{name}'; there are embed, A0H0, A0bias"):
        senders.index(name)


def test_clear_errors(large: MoEConfig) -> None:
    senders = senders_before(large, 2, "head")
    assert 3 not in senders
    with pytest.raises(ValueError, match=r"there is no component 'A7'; there are embed, A0, M0, A1, M1, A2"):
        senders.slice_of("A7")
    for wrong in (len(senders), -len(senders) - 1):
        for read in (senders.__getitem__, senders.coordinates, senders.group_of):
            with pytest.raises(IndexError):
                read(wrong)
    with pytest.raises(ValueError, match=r"by='heads' is no granularity; available: 'layer', 'head'"):
        check_granularity("heads")
    with pytest.raises(ValueError, match=r"source_axis='distance' must be one of 'position', 'offset'"):
        senders_before(large, 2, "source", source_axis="distance")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=3), data=st.data())
def test_names_find_what_they_name(lengths: list[int], data: st.DataObject) -> None:
    names = Names("M1", tuple(zip("EHN", lengths, strict=False)))
    index = data.draw(st.integers(0, names.count - 1))
    assert names.find(names.name(index)) == index
    assert names.find(names.name(index) + "N") is None


def test_no_senders_are_an_empty_sequence() -> None:
    assert len(Senders([])) == 0
    assert list(Senders([])) == []
    assert "embed" not in Senders([])

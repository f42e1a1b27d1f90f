"""Long runs: killed at any batch and gone on with, in several passes, added together, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lens import HookedMoE
from moe_lens.corpus import Document, TokenBatches, token_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.runs import Plan
from moe_lens.routing.senders import GRANULARITIES
from tests.conftest import leftover_hooks
from tests.families import BOS, prompts
from tests.routing_cases import (
    Batch,
    assert_close_results,
    assert_same_results,
    corpus,
)

Load = Callable[[str], Any]
SEVERAL = ("layer", "neuron", "source")


class Killed(KeyboardInterrupt):
    """Somebody pressed Ctrl-C."""


class DiesAt:
    """The batches, and Ctrl-C instead of the n-th."""

    def __init__(self, batches: Sequence[Batch], n: int):
        self.batches, self.n = batches, n

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            if i == self.n:
                raise Killed
            yield batch


def five_batches() -> list[Batch]:
    """Of unlike lengths; an expert may be chosen in some only."""
    return [
        prompts(("left", "right", "none")[seed % 3], seed=seed, batch=1 + seed % 3, length=4 + seed)
        for seed in range(5)
    ]


def dies_in_forward(model: HookedMoE, n: int, point: str = "hook_embed") -> Any:
    """A hook that raises in the n-th forward pass, in the middle of it."""
    seen = []

    def hook(value: Any, hook: Any) -> None:
        seen.append(1)
        if len(seen) > n:
            raise Killed

    return model.hooks([(point, hook)])


def smallest_budget(model: HookedMoE, by: Sequence[str], n_sources: int) -> int:
    """The least memory under which a run can be made: as much as its last receiver needs."""
    return Plan.make(model, by, model.cfg.moe_layers[-1:], 2**40, False, n_sources).bytes_needed


# By these, the smallest budget takes two passes, and three: a receiver of neurons has twice those before it.
IN_PASSES = {2: SEVERAL, 3: ("head", "source", "layer")}


# ---- killed and gone on with ----


@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "deepseek_v2_bias"])
def test_killed_at_any_batch(model_of: Load, variant: str, tmp_path: Path) -> None:
    model, batches = model_of(variant), five_batches()
    how = dict(by=SEVERAL, max_positions=8)
    whole = routing_contributions(model, batches, **how)
    for n in range(len(batches)):
        state = tmp_path / f"state{n}"
        with pytest.raises(Killed):
            routing_contributions(model, DiesAt(batches, n), state=state, save_every=0, **how)
        assert state.exists() == (n > 0)
        again = routing_contributions(model, batches, state=state, save_every=0, **how)
        assert list(again) == list(whole)
        for by in SEVERAL:
            assert_same_results(again[by], whole[by])
            assert again[by].provenance == whole[by].provenance
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"state{n}" for n in range(5)]


def test_killed_again_and_again_in_the_middle_of_a_forward(model_of: Load, tmp_path: Path) -> None:
    """Each run gets one batch further; the last one has nothing left to do but to read."""
    model, batches, state = model_of("olmoe"), five_batches(), tmp_path / "state"
    how = dict(by=SEVERAL, max_positions=8, rank_shift=False, experts="selected")
    whole = routing_contributions(model, batches, **how)
    for _ in range(len(batches) - 1):
        with dies_in_forward(model, 1), pytest.raises(Killed):
            routing_contributions(model, batches, state=state, save_every=0, **how)
        assert len(leftover_hooks(model)) == 0
    for n_forwards in (1, 0, 0):
        with dies_in_forward(model, n_forwards):
            got = routing_contributions(model, batches, state=state, save_every=0, **how)
        for by in SEVERAL:
            assert_same_results(got[by], whole[by])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_killed_in_token_batches_with_rank_shift(
    checkpoint: Load, tmp_path: Path, precision: torch.dtype
) -> None:
    model = HookedMoE.from_pretrained(
        checkpoint("deepseek_v2_groups"), dtype=precision, device="cpu", verbose=False
    )
    texts = [Document(f"d{i}", "", "the router " * (i + 1)) for i in range(4)]
    batches = token_batches(model, texts, batch_size=1, truncate=True, max_length=8)
    how = dict(by=("head", "expert"), rank_shift=True, receivers=[1, 2])
    whole = routing_contributions(model, batches, **how)
    with dies_in_forward(model, 2), pytest.raises(Killed):
        routing_contributions(model, batches, state=tmp_path / "state", save_every=0, **how)
    again = routing_contributions(model, batches, state=tmp_path / "state", **how)
    for by in whole:
        assert_same_results(again[by], whole[by])
        assert again[by].provenance == whole[by].provenance
        assert again[by].provenance["fingerprints"] == [batches.fingerprint]


def test_a_run_may_begin_with_nothing_to_count(model_of: Load, tmp_path: Path) -> None:
    """A first batch of nothing but BOS, which is left out: its state can be kept all the same."""
    model = model_of("olmoe")
    batches = [(torch.full((1, 1), BOS), None), (prompts()[0], None)]
    whole = routing_contributions(model, batches, bos_is_lead=False)
    how = dict(bos_is_lead=False, state=tmp_path / "state", save_every=0)
    with dies_in_forward(model, 1), pytest.raises(Killed):
        routing_contributions(model, batches, **how)
    assert_same_results(routing_contributions(model, batches, **how), whole)


def test_a_longer_corpus_goes_on_from_a_shorter_one(model_of: Load, tmp_path: Path) -> None:
    model, batches, state = model_of("mixtral"), five_batches(), tmp_path / "state"
    routing_contributions(model, batches[:3], by="expert", state=state)
    with dies_in_forward(model, 2):  # the last two are run, no others
        longer = routing_contributions(model, batches, by="expert", state=state)
    assert_same_results(longer, routing_contributions(model, batches, by="expert"))


def test_an_iterator_can_be_gone_on_with(model_of: Load, tmp_path: Path) -> None:
    model, batches, state = model_of("mixtral"), five_batches(), tmp_path / "state"
    with pytest.raises(Killed):
        routing_contributions(model, iter(DiesAt(batches, 3)), state=state, save_every=0)
    again = routing_contributions(model, (batch for batch in batches), state=state)
    assert_same_results(again, routing_contributions(model, batches))


def test_the_state_is_kept_no_oftener_than_asked(
    model_of: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lens.routing import runs

    written: list[Path] = []
    true_write = runs.write_atomically

    def count(path: Path, *args: Any) -> Path:
        written.append(Path(path))
        return true_write(path, *args)

    monkeypatch.setattr(runs, "write_atomically", count)
    model, batches = model_of("mixtral"), five_batches()
    routing_contributions(model, batches, state=tmp_path / "seldom", save_every=3600)
    assert len(written) == 1  # at the end
    written.clear()
    routing_contributions(model, batches, state=tmp_path / "often", save_every=0)
    assert len(written) >= 5
    written.clear()
    routing_contributions(model, batches)
    assert not written


# ---- several passes ----


@pytest.mark.parametrize("n_passes", [2, 3])
@pytest.mark.parametrize("variant", ["olmoe_bias_odd_width", "qwen2_moe"])
def test_several_passes_are_one(model_of: Load, variant: str, n_passes: int) -> None:
    """But for the order in which a matrix product of other columns adds up."""
    model, batches, by = model_of(variant), five_batches(), IN_PASSES[n_passes]
    how = dict(by=by, max_positions=8)
    whole = routing_contributions(model, batches, **how)
    budget = smallest_budget(model, by, 8)
    with dies_in_forward(model, n_passes * len(batches)):
        several = routing_contributions(model, batches, memory_budget=budget, **how)
    for name in by:
        assert_close_results(several[name], whole[name], rtol=1e-5, atol=1e-6)
        assert several[name].firsts == whole[name].firsts
        assert several[name].completeness_error == pytest.approx(whole[name].completeness_error, abs=2e-7)
        assert several[name].provenance == whole[name].provenance
        assert (
            several[name]
            .to_frame()[["position", "sender", "receiver"]]
            .equals(whole[name].to_frame()[["position", "sender", "receiver"]])
        )


@pytest.mark.parametrize("n_passes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_passes_killed_at_any_forward(
    checkpoint: Load, tmp_path: Path, dtype: torch.dtype, n_passes: int
) -> None:
    model = HookedMoE.from_pretrained(checkpoint("qwen2_moe"), dtype=dtype, device="cpu", verbose=False)
    batches, by = five_batches()[:3], IN_PASSES[n_passes]
    how = dict(by=by, max_positions=6, memory_budget=smallest_budget(model, by, 6))
    whole = routing_contributions(model, batches, **how)
    n_forwards = n_passes * len(batches)
    everywhere = dtype == torch.float32  # in half precision a forward takes longer
    for n in range(n_forwards) if everywhere else (1, n_forwards - 1):
        state = tmp_path / f"{n}" / "state"
        state.parent.mkdir()
        with dies_in_forward(model, n), pytest.raises(Killed):
            routing_contributions(model, batches, state=state, save_every=0, **how)
        with dies_in_forward(model, n_forwards - n):  # nothing is run twice
            again = routing_contributions(model, batches, state=state, save_every=0, **how)
        for name in by:
            assert_same_results(again[name], whole[name])
        expected = {f"state.{i}-of-{n_passes}" for i in range(1, n_passes + 1)}
        assert {p.name for p in state.parent.iterdir()} == expected


def test_the_plan(model_of: Load, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = model_of("olmoe"), five_batches()
    small = smallest_budget(model, ["head"], 0)
    with pytest.raises(ValueError, match=r"one receiver, M2, needs [\d,]+ bytes .*over memory_budget=[\d,]+"):
        routing_contributions(model, batches, by="head", memory_budget=small - 1)
    with pytest.raises(ValueError, match="one receiver, M0, needs"):
        routing_contributions(model, batches, memory_budget=0)

    started = []
    with (
        model.hooks([("hook_embed", lambda value, hook: started.append(1))]),
        pytest.raises(
            ValueError, match=r"must be passed 3 times; give a list or TokenBatches rather than an it"
        ),
    ):
        routing_contributions(model, iter(batches), by="head", memory_budget=small)
    assert not started

    routing_contributions(model, batches, by="head", memory_budget=small, verbose=True)
    printed = capsys.readouterr().out
    assert "corpus: batches of tokens given by the caller" in printed
    assert "plan: 3 pass(es) over 5 batches" in printed
    routing_contributions(model, iter(batches), verbose=True)
    assert "plan: 1 pass(es) over an unknown number of batches" in capsys.readouterr().out
    routing_contributions(model, batches)
    assert not capsys.readouterr().out


def test_a_plan_keeps_to_its_budget(model_of: Load) -> None:
    """What it says is no less than what the accumulators take."""
    model = model_of("qwen2_moe")
    for by in GRANULARITIES:
        plan = Plan.make(model, [by], None, 2**40, False, 8)
        got = routing_contributions(model, five_batches(), by=by, max_positions=8)
        kept = sum(
            t.numel() * 8 for groups in got.moments.values() for m in groups for t in (m.mean, m.squares)
        )
        assert kept <= plan.bytes_needed <= 3 * kept
        assert plan.largest == plan.bytes_needed


# ---- states of other runs ----


def test_a_state_of_another_run_raises(model_of: Load, hooked: Load, tmp_path: Path) -> None:
    model, batches, state = model_of("olmoe"), five_batches(), tmp_path / "state"
    how: dict[str, Any] = dict(by=["layer", "source"], max_positions=8)
    routing_contributions(model, batches[:3], state=state, **how)
    before = state.read_bytes()

    def other(message: str, given: Any = batches, of: Any = model, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            routing_contributions(of, given, state=state, **{**how, **settings})
        assert "is of another run" in str(raised.value)
        assert "name another file, or delete this one" in str(raised.value)
        assert str(state) in str(raised.value)
        assert state.read_bytes() == before

    with dies_in_forward(model, 0):  # before anything is run
        other("by was", by=["source", "layer"])
        other("by was", by="layer")
        other("experts was 'all' and is 'selected'", experts="selected")
        other(r"experts was 'all' and is \[1, 2\]", experts=[1, 2])
        other("rank_shift was False and is True", rank_shift=True)
        other("source_axis was 'position' and is 'offset'", source_axis="offset")
        other("max_positions was 8 and is 9", max_positions=9)
        other(f"left_out was None and is {BOS}", bos_is_lead=False)
        other(r"receivers was \[0, 1, 2\] and is \[1, 2\]", receivers=[1, 2])
        other("its tokens were others", [batches[0], batches[1], batches[3], batches[4]])
        tokens, mask = batches[2]
        changed = tokens.clone()
        changed[0, int(mask[0].argmax())] += 1
        other("its tokens were others", [*batches[:2], (changed, mask)])
        longer = mask.clone()
        longer[0] = 1
        if not torch.equal(longer, mask):
            other("its tokens were others", [*batches[:2], (tokens, longer)])
        other("it had seen 3 batches, and now there are 2", batches[:2])
        other("it had seen 3 batches, and now there are 2", iter(batches[:2]))
    other("model was .*", of=hooked("qwen2_moe"))
    assert leftover_hooks(model) == []
    routing_contributions(model, batches, state=state, **how)


def test_a_state_of_other_weights_raises(checkpoint: Load, tmp_path: Path) -> None:
    """The same name and settings; one number of one parameter is another."""
    model = HookedMoE.from_pretrained(checkpoint("mixtral"), dtype=torch.float32, device="cpu", verbose=False)
    batches, state = five_batches(), tmp_path / "state"
    routing_contributions(model, batches[:2], state=state)
    with torch.no_grad():
        model.blocks[1].mlp.router.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"weights was .* and is"):
        routing_contributions(model, batches, state=state)
    with torch.no_grad():
        model.blocks[1].mlp.router.weight[0, 0] -= 1


def test_what_padding_holds_is_no_other_run(model_of: Load, tmp_path: Path) -> None:
    model, state = model_of("mixtral"), tmp_path / "state"
    tokens, mask = prompts("right")
    first = routing_contributions(model, [(tokens, mask)], state=state)
    other = tokens.masked_fill(mask == 0, 77)
    with dies_in_forward(model, 0):
        again = routing_contributions(model, [(other, mask.bool())], state=state)
    assert_same_results(again, first)


def test_unfinished_and_spoilt_files(model_of: Load, tmp_path: Path) -> None:
    model, batches, state = model_of("mixtral"), five_batches(), tmp_path / "state"
    whole = routing_contributions(model, batches)
    # What a run that was killed while it wrote has left.
    for name in (".state.unfinished", "state.unfinished", "state.tmp"):
        (tmp_path / name).write_bytes(b"half of a fi")
    assert_same_results(routing_contributions(model, batches, state=state, save_every=0), whole)
    assert_same_results(routing_contributions(model, batches, state=state, save_every=0), whole)

    good = state.read_bytes()
    for garbage in (b"", b"garbage", b"\0" * 1000, good[:-10], good[: len(good) // 2]):
        state.write_bytes(garbage)
        with pytest.raises(ValueError, match="state is no file of routing contributions"):
            routing_contributions(model, batches, state=state)
        assert state.read_bytes() == garbage
    whole.save(state)  # a result, not a state
    with pytest.raises(ValueError, match="state"):
        routing_contributions(model, batches, state=state)
    save_file({"a": torch.zeros(1)}, state)
    with pytest.raises(ValueError, match="no file of routing contributions"):
        routing_contributions(model, batches, state=state)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        routing_contributions(model, batches, state=tmp_path / "nowhere" / "state")


# ---- added together ----


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_two_halves_are_the_whole(model_of: Load, by: str, cut: int) -> None:
    """Including experts that are chosen, and source positions that exist, in one half only."""
    model, batches = model_of("qwen2_moe_no_bias"), five_batches()
    how = dict(by=by, max_positions=8 if by == "source" else None, rank_shift=by in ("layer", "expert"))
    whole = routing_contributions(model, batches, **how)
    first = routing_contributions(model, batches[:cut], **how)
    second = routing_contributions(model, batches[cut:], **how)
    for one, other in ((first, second), (second, first)):
        got = one + other
        assert_close_results(got, whole, rtol=1e-10, atol=1e-12)
        assert got.completeness_error == max(one.completeness_error, other.completeness_error)
        assert got.rounding_ratio is None
        assert got.provenance["fingerprints"] == [
            *one.provenance["fingerprints"],
            *other.provenance["fingerprints"],
        ]
        assert got.provenance["corpus"] == [*one.provenance["corpus"], *other.provenance["corpus"]]
    if by in ("expert", "neuron", "source") and cut == 1:
        active = first.documents_with("rest", when_active=True)
        assert ((active == 0) & (second.documents_with("rest", when_active=True) > 0)).any()


def test_adding_changes_neither(model_of: Load) -> None:
    model, batches = model_of("olmoe"), five_batches()
    first, second = (routing_contributions(model, some, by="expert") for some in (batches[:2], batches[2:]))
    arrays = [{k: v.clone() for k, v in r.to_arrays()[0].items()} for r in (first, second)]
    facts = [json.dumps(r.to_arrays()[1]) for r in (first, second)]
    _ = first + second
    for result, array, fact in zip((first, second), arrays, facts, strict=True):
        now, facts_now = result.to_arrays()
        assert all(torch.equal(now[name], array[name]) for name in array)
        assert json.dumps(facts_now) == fact


def test_three_parts_in_any_order(model_of: Load) -> None:
    model, batches = model_of("olmoe"), five_batches()
    a, b, c = (
        routing_contributions(model, some, by="expert") for some in (batches[:1], batches[1:3], batches[3:])
    )
    whole = routing_contributions(model, batches, by="expert")
    for got in ((a + b) + c, a + (b + c), c + a + b):
        assert_close_results(got, whole, rtol=1e-10, atol=1e-12)


def test_half_precision_parts_keep_the_larger_ratio(checkpoint: Load) -> None:
    model = HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16, device="cpu", verbose=False)
    one, other = (routing_contributions(model, [batch]) for batch in corpus())
    assert one.rounding_ratio is not None
    assert other.rounding_ratio is not None
    assert (one + other).rounding_ratio == max(one.rounding_ratio, other.rounding_ratio)


def test_what_cannot_be_added(model_of: Load, hooked: Load) -> None:
    model, batches = model_of("olmoe"), five_batches()
    a = routing_contributions(model, batches[:2])
    with pytest.raises(ValueError, match="both hold the same tokens, which would be counted twice"):
        a + a
    again = routing_contributions(model, batches[:2])
    with pytest.raises(ValueError, match="same tokens"):
        a + again
    with pytest.raises(ValueError, match="same tokens"):
        (a + routing_contributions(model, batches[2:3])) + again

    def other(message: str, of: Any = model, **settings: Any) -> None:
        b = routing_contributions(of, batches[2:], **settings)
        for one, two in ((a, b), (b, a)):
            with pytest.raises(
                ValueError, match=rf"these cannot be added: {message} is .* here and .* there"
            ):
                one + two

    other("by", by="head")
    other("senders", receivers=[1])
    other("receivers", receivers=[0, 2])
    other("measures", rank_shift=True)
    other("experts", experts="selected")
    other("experts", experts=[0, 1])
    other("lead_token", bos_is_lead=False)
    other("model", of=hooked("qwen3_moe"))
    sources = [
        routing_contributions(model, some, by="source", max_positions=8, source_axis=axis)
        for some, axis in ((batches[:2], "position"), (batches[2:], "offset"))
    ]
    with pytest.raises(ValueError, match="these cannot be added: senders is"):
        sources[0] + sources[1]
    for name in ("moe_lens", "revision", "dtype"):
        b = routing_contributions(model, batches[2:])
        b = replace(b, provenance={**b.provenance, name: "another"})
        with pytest.raises(ValueError, match=f"these cannot be added: {name} is .* here and 'another' there"):
            a + b


# ---- on disk ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_saved_and_loaded(checkpoint: Load, tmp_path: Path, by: str, dtype: torch.dtype) -> None:
    model = HookedMoE.from_pretrained(
        checkpoint("deepseek_v2_bias"), dtype=dtype, device="cpu", verbose=False
    )
    for experts, rank_shift in (("selected", True), ([3, 1], False)):
        result = routing_contributions(
            model, corpus(), by=by, experts=experts, rank_shift=rank_shift, source_axis="offset"
        )
        path = result.save(tmp_path / "result")
        assert path == tmp_path / "result"
        loaded = RoutingContributions.load(path)
        assert_same_results(loaded, result)
        assert loaded.provenance == result.provenance
        assert loaded.senders == result.senders
        assert loaded.senders.slice_of("A1") == result.senders.slice_of("A1")
        assert loaded.to_frame().equals(result.to_frame())
        more = routing_contributions(
            model, five_batches(), by=by, experts=experts, rank_shift=rank_shift,
            source_axis="offset", max_positions=10 if by == "source" else None,
        )  # fmt: skip
        if by != "source":
            assert_same_results(loaded + more, result + more)
        assert list(tmp_path.iterdir()) == [path]


def test_what_is_saved_is_plain(model_of: Load, tmp_path: Path) -> None:
    """No pickle, and nothing but tensors and JSON."""
    result = routing_contributions(model_of("olmoe"), corpus(), state=tmp_path / "state")
    result.save(tmp_path / "result")
    for path in tmp_path.iterdir():
        # A safetensors file is the length of its JSON header, the header, and numbers.
        data = path.read_bytes()
        assert "__metadata__" in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert load_file(path)
        with safe_open(path, framework="pt") as file:
            assert sorted(file.metadata()) == ["checksums", "facts"]
            assert isinstance(json.loads(file.metadata()["facts"]), dict)
    # A server's answers are pickled; these two measure them, and read them as plain values alone.
    protocol = [Path("moe_lens/interop/nnsight") / name for name in ("jobs.py", "received.py")]
    assert all(path.is_file() for path in protocol)
    source = "".join(p.read_text() for p in Path("moe_lens").rglob("*.py") if p not in protocol)
    assert not any(name in source for name in ("import pickle", "torch.load", "torch.save", "np.load"))


def test_a_killed_save_leaves_the_old_file(
    model_of: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lens.routing import storage

    model = model_of("olmoe")
    old, new = (routing_contributions(model, [batch]) for batch in corpus())
    path = old.save(tmp_path / "result")

    def half_a_save(tensors: Any, filename: Any, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", half_a_save)
        with pytest.raises(Killed):
            new.save(path)
    assert_same_results(RoutingContributions.load(path), old)
    new.save(path)
    assert_same_results(RoutingContributions.load(path), new)
    assert list(tmp_path.iterdir()) == [path]


def test_loading_something_else(model_of: Load, tmp_path: Path) -> None:
    model, path = model_of("olmoe"), tmp_path / "file"
    result = routing_contributions(model, corpus(), state=tmp_path / "state")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        RoutingContributions.load(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        result.save(tmp_path / "nowhere" / "file")
    result.save(path)
    good = path.read_bytes()
    for garbage in (b"", b"garbage", good[:-1], good[:100]):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match="file is no file of routing contributions"):
            RoutingContributions.load(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of routing contributions"):
        RoutingContributions.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of routing contributions"):
        RoutingContributions.load(path)
    with pytest.raises(ValueError, match="holds no routing contributions of format 1"):
        RoutingContributions.load(tmp_path / "state")
    arrays, facts = result.to_arrays()
    save_file(arrays, path, metadata={"facts": json.dumps({**facts, "format": 0})})
    with pytest.raises(ValueError, match="holds no routing contributions of format 1"):
        RoutingContributions.load(path)
    lacking = {name: fact for name, fact in facts.items() if name != "model_logit_difference"}
    save_file(arrays, path, metadata={"facts": json.dumps(lacking)})
    with pytest.raises(ValueError, match=r"lacks 'model_logit_difference'.*another version"):
        RoutingContributions.load(path)
    del arrays["rest/active/2/mean"]
    save_file(arrays, path, metadata={"facts": json.dumps(facts)})
    with pytest.raises(ValueError, match=r"lacks 'rest/active/2/mean'"):
        RoutingContributions.load(path)


def test_token_batches_are_one_corpus_however_batched(model_of: Load) -> None:
    """The fingerprint is of the documents, so the same ones batched otherwise are not added twice."""
    model = model_of("olmoe")
    documents = [Document(f"d{i}", "", text) for i, text in enumerate(("one two", "three", "four five six"))]

    def result(batch_size: int) -> RoutingContributions:
        batches = token_batches(model, documents, batch_size=batch_size)
        assert isinstance(batches, TokenBatches)
        return routing_contributions(model, batches)

    one, other = result(1), result(3)
    assert_close_results(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="same tokens"):
        one + other
    assert np.isfinite(one.variance["rest"][0]).all()

"""The census against the reference census; what it takes, refuses and says of itself."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.audit import census
from moe_lens.audit.census_plan import Documents
from moe_lens.audit.census_table import COLUMNS, Census
from moe_lens.converters.errors import NotEnoughMemory
from moe_lens.corpus import Document, token_batches
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.interventions.outcomes import LogitDifference
from moe_lens.interventions.spec import Ablate
from moe_lens.model.block import Block
from moe_lens.routing.contributions import corpus_of
from moe_lens.routing.provenance import weights_fingerprint
from tests.census_cases import (
    SEED,
    VARIANTS,
    WITH_SHARED,
    batch,
    close,
    reference_of,
    rows_of_transformers,
    same_rows,
)
from tests.checkpoints import change_config
from tests.families import prompts
from tests.reference_census import Row, census_rows, direct_rows, first_order_rows

HOWS = ("zero", "renormalize", "reroute", "mean", "resample")
KEY = ["document", "layer", "position", "rank"]
MEASURED = {name: name for name in ("routing_weight", "gap_norm", "loss", "delta_loss")}
ALL = {**MEASURED, "kl": "kl", "delta_later_loss": "later_loss"}


def records(of: Census) -> list[dict[str, Any]]:
    return of.to_pandas().to_dict("records")  # type: ignore[return-value]


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: [row[name] for name in KEY])


def assert_same(one: Census, other: Census) -> None:
    """Bit for bit."""
    assert one.columns == other.columns
    for name, values in one.to_pandas().items():
        assert values.to_numpy().tobytes() == other.to_pandas()[name].to_numpy().tobytes(), name


# --- rows ---------------------------------------------------------------------------------------------------


def check_against_transformers(
    hf: Any, hooked: Any, variant: str, padding: str, how: str, scope: str, layers: Any, shared: bool
) -> None:
    expected = rows_of_transformers(hf, hooked, variant, padding, how, scope, layers, shared)
    tokens, mask = batch(padding)
    reads = how in ("mean", "resample")
    made = census(
        hooked(variant),
        tokens,
        attention_mask=mask,
        layers=layers,
        how=how,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        reference=reference_of(hooked, variant) if reads else None,
        seed=SEED,
        shared=shared,
        outcome=["kl", "later_loss"] if scope == "token" else "kl",
    )
    names = ALL if scope == "token" else {**MEASURED, "kl": "kl"}
    assert set(made.columns) == {*COLUMNS, *names}
    same_rows(records(made), in_order(expected), names)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_those_of_the_reference(
    hf: Any, model_of: Any, hooked: Any, variant: str, scope: str
) -> None:
    """Every column of every row; the shared experts too where there are any."""
    model = model_of(variant)
    layers = tuple(model.cfg.moe_layers) if scope == "token" else (model.cfg.moe_layers[0],)
    check_against_transformers(hf, hooked, variant, "left", "zero", scope, layers, variant in WITH_SHARED)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("how", HOWS[1:])
@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "deepseek_v2_groups"])
def test_ways_of_changing(hf: Any, model_of: Any, hooked: Any, variant: str, how: str, scope: str) -> None:
    """The rows that the tests of replay and of sequence scope have made too."""
    layers, shared = (model_of(variant).cfg.moe_layers[0],), how in ("mean", "resample")
    padding = "right" if scope == "token" else "left"
    check_against_transformers(hf, hooked, variant, padding, how, scope, layers, shared)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "olmoe_gqa_clip"])
def test_predictors_and_logit_differences(hf: Any, model_of: Any, variant: str, scope: str) -> None:
    model, (tokens, mask) = model_of(variant), batch("right")
    shared, layers = variant in WITH_SHARED, model.cfg.moe_layers[:2]
    made = census(
        model,
        tokens,
        attention_mask=mask,
        layers=layers,
        scope=scope,  # type: ignore[arg-type]
        shared=shared,
        outcome=(LogitDifference(9, 4), LogitDifference(3, 5, name="other")),
        predictors=("direct", "first_order"),
    )
    extra = ["delta_logit_difference", "delta_other", "direct", "first_order"]
    assert list(made.columns) == [*COLUMNS, *extra]
    for rows_of, name in ((first_order_rows, "first_order"), (direct_rows, "direct")):
        expected = in_order(rows_of(hf(variant), tokens, mask, layers=layers, shared=shared))
        same_rows(records(made), expected, {name: name})

    def difference(tokens: Any, mask: Any, row: int, column: int, pair: tuple[int, int]) -> float:
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask)[row, column]
        return float(logits[pair[0]] - logits[pair[1]])

    for row in records(made)[::7]:
        name = f"M{row['layer']}S" if row["expert"] == -1 else f"M{row['layer']}E{row['expert']}"
        for column, pair in (("delta_logit_difference", (9, 4)), ("delta_other", (3, 5))):
            place = (row["document"], row["position"], pair)
            pos = None if scope == "sequence" else torch.zeros_like(mask)
            if pos is not None:
                pos[row["document"], row["position"]] = True
            before = difference(tokens, mask, *place)
            with model.intervene(Ablate(name, pos=pos)):
                after = difference(tokens, mask, *place)
            close(row[column], after - before, f"{column} of {name} at {place}")


def test_one_of_each_may_be_given_alone(model_of: Any) -> None:
    model, (tokens, mask) = model_of("mixtral"), batch("left")
    alone = census(model, tokens, attention_mask=mask, layers=1, outcome="kl", predictors="direct")
    listed = census(model, tokens, attention_mask=mask, layers=[1], outcome=["kl"], predictors=["direct"])
    assert_same(alone, listed)
    assert alone.layers == (1,)
    difference = census(model, tokens, attention_mask=mask, outcome=LogitDifference(4, 5))
    assert difference.columns == (*COLUMNS, "delta_logit_difference")


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2)])
def test_some_layers(model_of: Any, layers: tuple[int, ...]) -> None:
    model, (tokens, mask) = model_of("qwen3_moe"), batch("left")
    whole = census(model, tokens, attention_mask=mask).to_pandas()
    part = census(model, tokens, attention_mask=mask, layers=layers).to_pandas()
    expected = whole[whole.layer.isin(layers)].reset_index(drop=True)
    assert set(part.layer) == set(layers)
    pd.testing.assert_frame_equal(part, expected, rtol=0, atol=1e-5)


# --- documents ----------------------------------------------------------------------------------------------


def test_which_positions(model_of: Any) -> None:
    """Padding anywhere, documents of one token, holes: counted on fingers."""
    model = model_of("mixtral")
    tokens = prompts(batch=5, length=6)[0]
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0]]
    )
    frame = census(model, tokens, attention_mask=mask).to_pandas()
    places = {0: [2, 3, 4], 1: [0, 1], 3: [0, 3]}
    expected = [
        (document, layer, position, rank)
        for document, positions in places.items()
        for layer in (0, 1)
        for position in positions
        for rank in (1, 2)
    ]
    assert list(frame[KEY].itertuples(index=False, name=None)) == expected
    with torch.no_grad():
        losses = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    for row in frame.itertuples():
        close(row.loss, float(losses[row.document, row.position]), str(row))
    made = census(model, tokens, attention_mask=mask)
    assert (made.n_documents, made.finished) == (5, True)
    one = census(model, tokens[2:4], attention_mask=mask[2:4])
    assert (one.n_documents, set(one.to_pandas().document)) == (2, {1})


def test_tokens_come_in_any_form(model_of: Any) -> None:
    """Texts, documents in batches, tensors: the same numbers; in any batches the same bits."""
    model = model_of("olmoe")
    texts = ["The router sends every token", "When Mary and John went", "Each expert"]
    of_texts = census(model, texts, layers=1)
    documents = [Document(f"d{i}", "", text) for i, text in enumerate(texts)]
    for batch_size in (1, 2, 3):
        batches = token_batches(model, documents, batch_size=batch_size)
        of_batches = census(model, batches, layers=1)
        if len(of_texts) == len(of_batches):
            assert_same(of_texts, of_batches)
        assert of_batches.identity["documents"] == ["d0", "d1", "d2"]
        assert of_batches.identity["corpus"] == batches.description
        assert of_batches.identity["tokens"] == batches.fingerprint
        of_pairs = census(model, ((part.tokens, part.mask) for part in batches), layers=1)
        assert_same(of_pairs, of_batches)
        assert of_pairs.identity["documents"] is None
    (whole,) = token_batches(model, documents, batch_size=3)
    for batch_size in (1, 2, 8):
        of_tensor = census(model, whole.tokens, attention_mask=whole.mask, layers=1, batch_size=batch_size)
        assert_same(of_tensor, of_batches)
        assert of_tensor.identity["tokens"] == of_batches.identity["tokens"]
        assert of_tensor.identity["columns"] == of_batches.identity["columns"]
    alone = census(model, texts[0], layers=1)
    first = of_texts.to_pandas()
    pd.testing.assert_frame_equal(alone.to_pandas(), first[first.document == 0])


def test_padding_moves_positions_only(model_of: Any) -> None:
    model, tokens = model_of("deepseek_v2_groups"), prompts(batch=2, length=7)[0]
    padded = torch.cat((tokens.new_full((2, 3), 5), tokens, tokens.new_full((2, 2), 6)), dim=1)
    mask = torch.zeros_like(padded)
    mask[:, 3:10] = 1
    plain = census(model, tokens).to_pandas()
    moved = census(model, padded, attention_mask=mask).to_pandas()
    moved["position"] -= 3
    pd.testing.assert_frame_equal(moved, plain, rtol=1e-4, atol=1e-5)


# --- a sample -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_sample_is_of_the_rows_of_all(model_of: Any, scope: str) -> None:
    model = model_of("qwen2_moe_no_bias")
    tokens, mask = prompts("left", batch=4, length=9)
    arguments: dict[str, Any] = dict(
        attention_mask=mask,
        scope=scope,
        shared=True,
        layers=[2],
        outcome=["kl", "later_loss"] if scope == "token" else "kl",
        predictors=["first_order", "direct"],
    )
    whole = census(model, tokens, **arguments).to_pandas()
    places = ["document", "position"]
    total = len(whole[places].drop_duplicates())
    seen = []
    for seed in (0, 0, 1, 2):
        part = census(model, tokens, n=5, seed=seed, **arguments).to_pandas()
        chosen = part[places].drop_duplicates()
        assert len(chosen) == 5
        expected = whole.merge(chosen, on=places)  # in the order of the whole
        assert len(part) == len(expected) == 5 * (model.cfg.top_k + 1)
        pd.testing.assert_frame_equal(part, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
        seen.append(frozenset(chosen.itertuples(index=False, name=None)))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    everything = census(model, tokens, n=total, **arguments).to_pandas()
    pd.testing.assert_frame_equal(everything, whole, rtol=0, atol=1e-6)


def test_a_sample_is_uniform(model_of: Any) -> None:
    """Over positions, not over documents: each of 3 + 7 + 1 as often."""
    model = model_of("mixtral")
    tokens, mask = prompts(batch=3, length=9)[0], torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:], mask[1, 0], mask[2, :7] = 0, 0, 0
    documents = Documents.of(model, corpus_of(model, tokens, mask, 8))
    counts = np.zeros((3, 8))
    for seed in range(2000):
        chosen = documents.sampled(4, seed)
        assert sum(map(len, chosen)) == 4
        for document, places in enumerate(chosen):
            assert places.tolist() == sorted(set(places.tolist()))
            counts[document, places.numpy()] += 1
    of_places = np.concatenate([counts[0, :3], counts[1, :7], counts[2, :1]])
    assert of_places.sum() == counts.sum() == 8000
    expected = 2000 * 4 / 11
    assert np.abs(of_places - expected).max() < 5 * np.sqrt(2000 * 4 / 11 * 7 / 11)


# --- what it says of itself ---------------------------------------------------------------------------------


def test_identity(model_of: Any, hooked: Any, tmp_path: Path) -> None:
    model, (tokens, mask) = model_of("qwen2_moe_no_bias"), batch("left")
    made = census(
        model,
        tokens,
        attention_mask=mask,
        layers=[0],
        how="resample",
        reference=reference_of(hooked, "qwen2_moe_no_bias"),
        seed=7,
        shared=True,
        n=3,
        outcome=["later_loss", LogitDifference(4, 5), "kl"],
        predictors="direct",
        output=tmp_path / "census",
        memory_budget=2**20,
    )
    identity = dict(made.identity)
    versions = identity.pop("versions")
    assert versions.keys() == {"moe-lens", "torch", "transformers"}
    assert versions["torch"] == torch.__version__
    assert len(identity.pop("tokens")) == len(identity.pop("columns")) == 64
    assert identity == {
        "kind": "census",
        "model": model.cfg.model_name,
        "revision": model.cfg.revision,
        "dtype": "float32",
        "weights": weights_fingerprint(model),
        "how": "resample",
        "reference": reference_of(hooked, "qwen2_moe_no_bias").fingerprint,
        "seed": 7,
        "scope": "token",
        "layers": [0],
        "shared": True,
        "outcomes": ["later_loss", {"correct": 4, "incorrect": 5, "name": "logit_difference"}, "kl"],
        "predictors": ["direct"],
        "corpus": "2 rows of tokens given by the caller",
        "documents": None,
        "sample": {"n": 3, "seed": 7},
        "memory_budget": 2**20,
        "noise_samples": 0,
        "extra_columns": ["delta_logit_difference", "kl", "delta_later_loss", "direct"],
    }
    assert made.facts["noise_floor"] is None
    assert 0 < made.facts["seconds"] < 100
    assert json.loads(json.dumps(made.provenance)) == made.provenance
    loaded = Census.load(tmp_path / "census")
    assert_same(loaded, made)
    assert (loaded.identity, loaded.facts) == (made.identity, made.facts)


def test_a_second_call_computes_nothing(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (tokens, mask) = model_of("mixtral"), batch("left")
    first = census(model, tokens, attention_mask=mask, output=tmp_path / "census")
    monkeypatch.setattr(Block, "forward", lambda *_: pytest.fail("a layer was run"))
    second = census(model, tokens, attention_mask=mask, output=tmp_path / "census")
    assert_same(first, second)
    assert second.facts == first.facts


def test_on_disk_as_in_memory_and_again(model_of: Any, tmp_path: Path) -> None:
    model, (tokens, mask) = model_of("qwen3_moe"), batch("left")
    arguments: dict[str, Any] = dict(attention_mask=mask, outcome="kl", predictors="first_order")
    first = census(model, tokens, **arguments)
    assert_same(census(model, tokens, **arguments), first)
    assert_same(census(model, tokens, output=tmp_path / "census", save_every=0, **arguments), first)
    with torch.no_grad():
        assert_same(census(model, tokens, **arguments), first)
    assert len(list((tmp_path / "census").glob("rows-*"))) == 2


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_any_memory_budget(model_of: Any, scope: str) -> None:
    model = model_of("deepseek_v2_groups")
    tokens, mask = prompts("left", length=9)
    arguments: dict[str, Any] = dict(
        attention_mask=mask, scope=scope, shared=True, outcome="kl", predictors=["first_order"]
    )
    expected = census(model, tokens, **arguments).to_pandas()
    for budget in (1, 300_000):
        frame = census(model, tokens, memory_budget=budget, **arguments).to_pandas()
        pd.testing.assert_frame_equal(frame, expected, rtol=1e-4, atol=1e-5)


def test_verbose_says_the_plan_first(model_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, (tokens, mask) = model_of("mixtral"), batch("left")
    census(model, tokens, attention_mask=mask)
    assert capsys.readouterr() == ("", "")
    census(model, tokens, attention_mask=mask, verbose=True, scope="sequence")
    out, err = capsys.readouterr()
    assert "2 rows of tokens given by the caller" in out
    assert "plan: 24 ablations (zero, scope sequence) at 2 layers" in out
    assert "up to 24 suffix passes, one per (document, layer, expert)" in out
    assert "24.0/24.0" in err


# --- refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "forward", lambda *_: pytest.fail("a layer was run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(how="drop"), "how='drop' must be one of 'zero', 'renormalize'"),
        (dict(how="mean"), "how='mean' needs reference="),
        (dict(scope="document"), "scope='document' must be one of 'token', 'sequence'"),
        (dict(outcome="accuracy"), "outcome 'accuracy' must be 'kl', 'later_loss' or a LogitDifference"),
        (dict(outcome=[5]), "outcome 5 must be"),
        (dict(outcome=LogitDifference(4, 128)), r"token 128 is not in the vocabulary, 0\.\.127"),
        (dict(outcome=LogitDifference(4, 4)), "compares a token with itself"),
        (dict(outcome=[LogitDifference(4, 5), LogitDifference(4, 6)]), "would be named alike"),
        (dict(outcome=["kl", "kl"]), "would be named alike"),
        (dict(outcome=["kl", LogitDifference(4, 5, name="kl")]), "would be named alike"),
        (dict(outcome=LogitDifference(4, 5, name="loss")), "named alike"),
        (dict(outcome=["later_loss", LogitDifference(4, 5, name="later_loss")]), "would be named alike"),
        (dict(outcome="later_loss", scope="sequence"), "later_loss is of a change at one token"),
        (dict(predictors="saliency"), "predictor 'saliency' must be one of 'first_order', 'direct'"),
        (dict(predictors=["direct", "direct"]), "would be named alike"),
        (dict(layers=[1]), "layer 1 has no experts; MoE layers are 0, 2"),
        (dict(layers=[0, 0]), "layers=.* has one twice"),
        (dict(layers=[]), "layers is empty"),
        (dict(layers="A2"), "layers='A2' must be an integer or a name"),
        (dict(outcome=("kl", " Mary")), "outcome ' Mary' must be"),
        (dict(layers=7), "7"),
        (dict(shared=True, how="renormalize"), "shared experts take 'zero', 'mean' or 'resample'"),
        (dict(shared=True, how="reroute"), "shared experts take 'zero', 'mean' or 'resample'"),
        (dict(n=0), "n=0 must be positive"),
        (dict(n=11), "n=11 positions are wanted, and the corpus has 10 with a next token"),
        (dict(memory_budget=0), "memory_budget=0 must be positive"),
        (dict(batch_size=0), "batch_size=0 must be positive"),
        (dict(noise_samples=-1), "noise_samples=-1 must be 0 or more"),
        (dict(seed=-1), "seed=-1 must be 0 or more"),
        (dict(output="nowhere/census"), "there is no folder"),
        (dict(attention_mask=torch.ones(2, 5)), "must have the tokens' shape"),
        (dict(attention_mask=torch.tensor([[1] * 6, [0] * 6])), "row 1 of attention_mask has no real token"),
        (dict(attention_mask=torch.eye(2, 6)), "no position has a next token"),
    ],
)
def test_what_makes_no_sense(
    model_of: Any, nothing_runs: None, arguments: dict[str, Any], message: str
) -> None:
    """Before anything runs."""
    model, tokens = model_of("qwen2_moe_no_bias"), prompts(length=6)[0]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        census(model, tokens, **arguments)


@pytest.mark.parametrize("name", ["n", "memory_budget", "noise_samples", "seed"])
def test_numbers_of_no_sense(model_of: Any, nothing_runs: None, name: str) -> None:
    for value in (1.5, "3", True):
        with pytest.raises(TypeError, match=f"{name}={value!r} must be a"):
            census(model_of("mixtral"), prompts()[0], **{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((1, 4), 128), "beyond the vocabulary"),
        (torch.ones(1, 4), "tokens must be integers"),
        (torch.ones(0, 4).long(), "there are no"),
        ([], "there are no documents|no documents"),
        ("", "."),
        (5, "texts, tokens or batches of tokens are wanted"),
        (torch.ones(5).long(), r"tokens must be \[batch, pos\]"),
        (torch.ones(3, 1).long(), "no position has a next token"),
    ],
)
def test_tokens_that_make_no_sense(model_of: Any, nothing_runs: None, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        census(model_of("mixtral"), given)


def test_what_a_model_cannot(
    model_of: Any, hooked: Any, nothing_runs: None, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tokens = prompts()[0]
    with pytest.raises(ValueError, match="has no shared experts"):
        census(model_of("olmoe"), tokens, shared=True)
    for variant, change, arguments, message in (
        ("mixtral", dict(num_experts_per_tok=1), dict(how="renormalize"), "renormalize needs an expert that"),
        ("mixtral", dict(num_experts_per_tok=8), dict(how="reroute"), "choose all 8 that they may"),
        (
            "deepseek_v2_groups",
            dict(topk_group=1, num_experts_per_tok=2),
            dict(how="reroute"),
            "choose all 2",
        ),
    ):
        copied = shutil.copytree(checkpoint(variant), tmp_path / variant, dirs_exist_ok=True)
        change_config(copied, **change)
        model = HookedMoE.from_pretrained(copied, dtype=torch.float32, device="cpu", verbose=False)
        with pytest.raises(ValueError, match=message):
            census(model, tokens, **arguments)  # type: ignore[arg-type]


def test_first_order_without_gradients(model_of: Any, nothing_runs: None) -> None:
    model = model_of("mixtral")  # not in there, for other tests take it too
    with torch.inference_mode(), pytest.raises(ValueError, match=r"first_order needs gradients"):
        census(model, prompts()[0], predictors="first_order")


def test_references_of_others(model_of: Any, hooked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_reference, tokens = reference_of(hooked, "olmoe_gqa_clip"), prompts()[0]
    monkeypatch.setattr(Block, "forward", lambda *_: pytest.fail("a layer was run"))
    with pytest.raises(ValueError, match="the reference is of other weights"):
        census(model_of("qwen3_moe"), tokens, how="mean", reference=with_reference)
    part = replace(with_reference, layers=(0,))
    with pytest.raises(ValueError, match=r"the reference lacks layers \[1, 2\]"):
        census(model_of("olmoe_gqa_clip"), tokens, how="resample", reference=part)
    with pytest.raises(ValueError, match="how='zero' reads no reference"):
        census(model_of("olmoe_gqa_clip"), tokens, reference=with_reference)


def test_an_expert_that_the_reference_never_met(model_of: Any, hooked: Any) -> None:
    """It is named, with the document."""
    model, tokens = model_of("mixtral"), prompts(length=12)[0]
    reference = expert_reference(model, tokens[:1, :3])
    with pytest.raises(ValueError, match=r"document 0: M\dE\d was never active in the reference"):
        census(model, tokens, how="mean", reference=reference)


def test_models_with_hooks(model_of: Any, nothing_runs: None, tmp_path: Path) -> None:
    model, tokens, folder = model_of("mixtral"), prompts()[0], tmp_path / "census"
    with (
        model.hooks([("blocks.1.mlp.hook_expert_contrib", lambda value, hook: value * 0)]),
        pytest.raises(ValueError, match=r"without hooks.*blocks\.1\.mlp\.hook_expert_contrib"),
    ):
        census(model, tokens, output=folder)
    with pytest.raises(ValueError, match="an open intervene"), model.intervene(Ablate("M1E2")):
        census(model, tokens, output=folder)
    assert not folder.exists()


# --- NaN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_nan_says_where(hooked: Any, scope: str, tmp_path: Path) -> None:
    """Document, position, layer and expert; the documents before it are kept."""
    model = copy.deepcopy(hooked("mixtral"))
    tokens, mask = prompts("left", batch=6, length=8, seed=3)
    runs = [CleanRun.of(model, *document).moe(1) for document in zip(tokens, mask, strict=True)]
    used = [set(values.indices.unique().tolist()) for values in runs]
    document, expert = next(
        (d, e) for d in range(1, 6) for e in sorted(used[d]) if all(e not in before for before in used[:d])
    )
    row = int((runs[document].indices == expert).any(dim=1).nonzero()[0])
    column = int(mask[document].nonzero()[row])
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_gate_up[expert, 3] = torch.nan
    message = (
        rf"document {document}: the clean loss .* is nan \(from M1E{expert} of layer 1, position {column}\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        census(model, tokens, attention_mask=mask, layers=1, scope=scope, output=tmp_path / "census")  # type: ignore[arg-type]
    kept = Census.load(tmp_path / "census", allow_unfinished=True)
    assert kept.n_documents == document
    assert kept.to_pandas().delta_loss.notna().all()


def test_nan_under_rerouting_says_what_was_changed(hooked: Any) -> None:
    model = copy.deepcopy(hooked("mixtral"))
    for seed in range(50):
        tokens = prompts(batch=2, length=4, seed=seed)[0]
        runs = [CleanRun.of(model, document).moe(1) for document in tokens]
        third = [values.probabilities.argsort(dim=-1, descending=True)[:3, 2] for values in runs]
        expert = int(third[1][2])
        chosen = any((values.indices == expert).any() for values in runs)
        if not chosen and torch.cat(third).tolist().count(expert) == 1:
            break
    else:
        pytest.fail("no such document")
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_down[expert] = torch.inf
    first = int(runs[1].indices[2, 0])
    message = rf"document 1: loss is nan at position 2 after the change of M1E{first} at layer 1"
    with pytest.raises(FloatingPointError, match=message):
        census(model, tokens, layers=1, how="reroute")
    with pytest.raises(
        FloatingPointError, match=r"document 1: loss is nan at position \d after .* M1E\d at every"
    ):
        census(model, tokens, layers=1, how="reroute", scope="sequence")


# --- half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_half_precision(hooked: Any, dtype: torch.dtype, scope: str) -> None:
    """Changes are counted from the null branch, whose own change is a column; the noise floor is kept."""
    exact = hooked("qwen2_moe_no_bias")
    model = copy.deepcopy(exact).to(dtype)
    tokens, mask = prompts("left", batch=3, length=10)
    arguments: dict[str, Any] = dict(
        attention_mask=mask,
        scope=scope,
        shared=True,
        outcome=[LogitDifference(4, 5), *(["later_loss"] if scope == "token" else [])],
    )
    made = census(model, tokens, noise_samples=12, **arguments)
    frame = made.to_pandas()
    full = census(exact, tokens, **arguments).to_pandas()
    assert [*full.columns, "null_delta_loss"] == list(frame.columns)
    assert frame.null_delta_loss.abs().max() < 0.2
    places = ["document", "layer", "position"]
    assert (frame.groupby(places).null_delta_loss.nunique() == 1).all()
    both = frame.merge(full, on=[*places, "expert"], suffixes=("", "_full"))
    assert len(both) > 0.9 * len(full)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    for name in ("delta_loss", "delta_logit_difference", *(["delta_later_loss"] if scope == "token" else [])):
        error = (both[name] - both[name + "_full"]).abs().median()
        assert 0 < error < tolerance, name
        assert error < 0.3 * both[name + "_full"].abs().median(), name
    floor = made.facts["noise_floor"]
    assert floor["n_samples"] + floor["n_routed_otherwise"] == 12
    assert 0 < floor["replay_error"] < tolerance < floor["median_effect"] * 10
    assert 0 < floor["hooked_error"] < tolerance
    assert made.identity["noise_samples"] == 12
    assert made.identity["dtype"] == str(dtype).removeprefix("torch.")
    again = census(model, tokens, noise_samples=12, **arguments)
    assert_same(made, again)
    assert again.facts["noise_floor"] == floor
    without = census(model, tokens, noise_samples=0, **arguments)
    assert without.facts["noise_floor"] is None
    assert_same(without, made)


def test_half_precision_counts_from_the_null_branch(hooked: Any) -> None:
    """A layer's last experts: what is left of a change that is none, is none."""
    model = copy.deepcopy(hooked("qwen3_moe")).to(torch.bfloat16)
    with torch.no_grad():
        model.blocks[2].mlp.experts.W_down.zero_()
    tokens = prompts(length=9)[0]
    for scope in ("token", "sequence"):
        frame = census(model, tokens, layers=[0, 2], scope=scope, noise_samples=0).to_pandas()  # type: ignore[arg-type]
        last = frame[frame.layer == 2]
        assert (last.gap_norm == 0).all()
        assert (last.delta_loss == 0).all()
        assert (frame[frame.layer == 0].delta_loss != 0).mean() > 0.9
    later = census(model, tokens, layers=2, outcome=["later_loss"], noise_samples=0).to_pandas()
    assert (later.delta_later_loss.dropna() == 0).all()
    assert later.delta_later_loss.isna().sum() == 2 * 4


@pytest.mark.slow
def test_noise_floor_is_that_of_the_rows(hooked: Any) -> None:
    """Its medians over a sample are those of the census's own rows against float32's, as near as a sample can be."""
    exact = hooked("qwen3_moe")
    model, (tokens, mask) = copy.deepcopy(exact).to(torch.bfloat16), prompts("left", length=24)
    made = census(model, tokens, attention_mask=mask, layers=1, noise_samples=150)
    full = census(exact, tokens, attention_mask=mask, layers=1).to_pandas()
    both = made.to_pandas().merge(full, on=["document", "position", "expert"], suffixes=("", "_full"))
    floor = made.facts["noise_floor"]
    for name, values in (
        ("median_effect", both.delta_loss_full),
        ("replay_error", both.delta_loss - both.delta_loss_full),
        ("replay_error_without_null", both.delta_loss + both.null_delta_loss - both.delta_loss_full),
    ):
        assert floor[name] == pytest.approx(values.abs().median(), rel=0.3), name
    assert 0 < floor["null_error"] < 3 * both.null_delta_loss.abs().median()
    assert 0.5 * floor["replay_error"] < floor["hooked_error"] < 2 * floor["replay_error"]


def test_noise_floor_that_finds_nothing(hooked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every drawn expert is routed otherwise, the census is finished all the same."""
    model = copy.deepcopy(hooked("mixtral")).to(torch.bfloat16)
    module = importlib.import_module("moe_lens.audit.noise")
    run = module.run_with_interventions

    def otherwise(*args: Any, **kwargs: Any) -> Any:
        out, receipt = run(*args, **kwargs)
        receipt.restore((1, {}))
        return out, receipt

    monkeypatch.setattr(module, "run_with_interventions", otherwise)
    made = census(model, prompts(length=5)[0], layers=1, noise_samples=4)
    floor = made.facts["noise_floor"]
    assert (floor["n_samples"], floor["n_routed_otherwise"]) == (0, 4)
    assert np.isnan(floor["replay_error"])


def test_no_room_for_the_noise_floor(
    hooked: Any, nothing_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = importlib.import_module("moe_lens.converters.loading")
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    model = copy.deepcopy(hooked("mixtral")).to(torch.bfloat16)
    with pytest.raises(NotEnoughMemory, match="noise_samples=0 leaves it out"):
        census(model, prompts()[0])


def test_reference_of_one_document(hf: Any, model_of: Any) -> None:
    """A document measured alone is the document measured among others."""
    model, (tokens, mask) = model_of("qwen3_moe"), prompts("right", batch=3, length=6)
    made = census(model, tokens[1:2], attention_mask=mask[1:2], layers=1)
    expected = census_rows(hf("qwen3_moe"), tokens[1:2], mask[1:2], layers=[1])
    same_rows(records(made), in_order(expected), MEASURED)
    whole = census(model, tokens, attention_mask=mask, layers=1).to_pandas()
    part = whole[whole.document == 1].reset_index(drop=True)
    part["document"] = part["document"] - 1
    assert (part.to_numpy() == made.to_pandas().to_numpy()).all()

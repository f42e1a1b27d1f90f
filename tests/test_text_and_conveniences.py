"""Text and tokens, the routing table, logit differences, losses, partial runs, and what wrong input says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from moe_lens import HookedMoE
from tests.families import BOS, EOS, PAD, PLAIN_VARIANTS, VOCABULARY, prompts
from tests.reference import reference_cache, reference_logits, reference_loss_per_token

TEXT = "The router sends 42 tokens!"


def load(directory: Path) -> HookedMoE:
    return HookedMoE.from_pretrained(directory, device="cpu", verbose=False)


@pytest.fixture(scope="module")
def hooked(checkpoint: Callable[[str], Path]) -> Callable[[str], HookedMoE]:
    return cache(lambda variant: load(checkpoint(variant)))


@pytest.fixture(scope="module")
def model(hooked: Any) -> HookedMoE:
    return hooked("olmoe")


@pytest.fixture(scope="module")
def with_bos(checkpoint: Callable[[str], Path]) -> HookedMoE:
    """A model whose tokenizer puts a BOS token in front by itself, as Mixtral's does."""
    model = load(checkpoint("mixtral"))
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < 2e-5, f"relative error {error:.1e}"


# --- between text and tokens --------------------------------------------------------------------------------


def test_to_tokens_is_the_tokenizer(model: Any) -> None:
    tokens = model.to_tokens(TEXT)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [model.tokenizer(TEXT).input_ids]
    assert model.to_string(tokens) == [TEXT]
    assert model.to_string(tokens[0]) == TEXT
    assert model.to_string(tokens[0].tolist()) == TEXT
    assert model.to_string(int(tokens[0, 0])) == model.to_str_tokens(TEXT)[0]


def test_to_str_tokens(model: Any) -> None:
    """One string for each token, together the text; the same for tokens, and for a batch of one."""
    pieces = model.to_str_tokens(TEXT)
    tokens = model.to_tokens(TEXT)
    assert len(pieces) == tokens.shape[1]
    assert "".join(pieces) == TEXT
    assert model.to_str_tokens(tokens) == model.to_str_tokens(tokens[0]) == pieces
    with pytest.raises(ValueError, match="one row of tokens"):
        model.to_str_tokens(tokens.expand(2, -1))


def test_to_single_token(model: Any) -> None:
    token = model.to_tokens("e")[0, 0]
    assert model.to_single_token("e") == int(token)
    assert model.to_single_token("</s>") == EOS
    with pytest.raises(ValueError, match=r"'qq' is 2 tokens \(\['q', 'q'\]\), not one"):
        model.to_single_token("qq")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(model: Any, side: str) -> None:
    texts = [TEXT, "Each expert", "a"]
    rows = [model.tokenizer(text).input_ids for text in texts]
    tokens, mask = model.tokenize(texts, padding_side=side)
    with pytest.raises(ValueError, match="which are padding"):
        model.to_tokens(texts, padding_side=side)
    assert mask.dtype == torch.bool
    longest = max(map(len, rows))
    for row, ids, real in zip(tokens.tolist(), rows, mask.tolist(), strict=True):
        pads, n_pads = [PAD] * (longest - len(ids)), longest - len(ids)
        assert row == (pads + ids if side == "left" else ids + pads)
        assert real == ([False] * n_pads + [True] * len(ids))[:: 1 if side == "left" else -1]


def test_padding_token_falls_back(checkpoint: Any) -> None:
    """Without a pad token the end-of-text token fills up; the mask is made from lengths, not from ids."""
    model = load(checkpoint("olmoe"))
    model.tokenizer.pad_token = None
    tokens, mask = model.tokenize(["</s> a", "a"])
    assert tokens[1, 1:].tolist() == [EOS] * (tokens.shape[1] - 1)
    assert mask.sum(1).tolist() == [tokens.shape[1], 1]


def test_bos_variants(with_bos: Any, model: Any) -> None:
    """None leaves it to the tokenizer, True gives exactly one, False none."""
    words = with_bos.tokenizer(TEXT, add_special_tokens=False).input_ids
    assert with_bos.to_tokens(TEXT).tolist() == [[BOS, *words]]
    assert with_bos.to_tokens(TEXT, prepend_bos=True).tolist() == [[BOS, *words]]
    assert with_bos.to_tokens(TEXT, prepend_bos=False).tolist() == [words]
    assert with_bos.to_str_tokens(TEXT)[0] == "<s>"
    assert with_bos.to_str_tokens(TEXT, prepend_bos=False)[0] != "<s>"
    assert with_bos.to_single_token("e") == with_bos.to_tokens("e", prepend_bos=False)[0, 0]

    assert model.to_tokens(TEXT).tolist() == [words]  # this tokenizer adds nothing by itself
    assert model.to_tokens(TEXT, prepend_bos=True).tolist() == [[BOS, *words]]
    # A batch is padded after the BOS tokens are in place.
    tokens, mask = model.tokenize([TEXT, "a"], prepend_bos=True, padding_side="left")
    assert tokens[1, -2].item() == BOS
    assert mask[1].sum() == 2


def test_text_errors(checkpoint: Any) -> None:
    model = load(checkpoint("olmoe"))
    with pytest.raises(ValueError, match="the list is empty"):
        model.to_tokens([])
    with pytest.raises(ValueError, match="text 1 of the batch has no tokens"):
        model.to_tokens(["a", ""])
    with pytest.raises(ValueError, match="attention_mask goes with tokens"):
        model("a", attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="attention_mask goes with tokens"):
        model.generate("a", attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="text must be strings, not int"):
        model.generate([1, 2, 3])
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', not 'up'"):
        model.to_tokens("a", padding_side="up")
    model.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token"):
        model.to_tokens("a", prepend_bos=True)


def test_a_checkpoint_without_tokenizer(checkpoint: Any, tmp_path: Path) -> None:
    """It loads and runs on tokens; text says what is missing."""
    directory = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "bare")
    for file in directory.glob("*token*"):
        file.unlink()
    model = load(directory)
    assert model.tokenizer is None
    tokens, _ = prompts()
    assert model(tokens).shape == (*tokens.shape, VOCABULARY)
    assert model.generate(tokens, 2).shape == (2, tokens.shape[1] + 2)
    assert model.routing(tokens)["token"].head(1).item() == int(tokens[0, 0])
    for ask in (
        lambda: model("text"),
        lambda: model.to_tokens("text"),
        lambda: model.to_string([5]),
        lambda: model.generate("text"),
        lambda: model.to_single_token("e"),
    ):
        with pytest.raises(ValueError, match="was loaded without a tokenizer"):
            ask()


@torch.no_grad()
def test_forward_of_text(model: Any, hf: Any) -> None:
    """Texts of different lengths run padded; each gives the logits it has alone."""
    texts = [TEXT, "Each expert"]
    logits = model(texts)
    for row, text in enumerate(texts):
        tokens = torch.tensor([model.tokenizer(text).input_ids])
        assert_same(logits[row, : tokens.shape[1]], reference_logits(hf("olmoe"), tokens)[0])
    assert_same(model(TEXT), reference_logits(hf("olmoe"), model.to_tokens(TEXT)))


# --- the routing table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_routing_table(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """Row by row what the reference says; padding gets no rows."""
    tokens, mask = prompts(padding)
    table = hooked(variant).routing(tokens, attention_mask=mask)
    columns = [
        "document",
        "position",
        "token",
        "layer",
        "rank",
        "expert",
        "routing_weight",
        "probability",
        "router_logit",
    ]
    assert list(table.columns) == columns
    reference = reference_cache(hf(variant), tokens, mask)
    layers = [layer for layer, block in enumerate(hf(variant).model.layers) if hasattr(block.mlp, "experts")]
    rows = []
    for document in range(len(tokens)):
        real = mask[document].nonzero().flatten().tolist()
        for position, place in enumerate(real):
            for layer in layers:
                logits, probabilities, indices, weights = (
                    reference[f"blocks.{layer}.mlp.hook_{name}"][document, place]
                    for name in ("router_logits", "expert_weights", "expert_indices", "routing_weights")
                )
                for rank, expert in enumerate(indices.tolist()):
                    rows.append((document, position, layer, rank + 1, expert))
                    rows[-1] += tuple(
                        float(v) for v in (weights[rank], probabilities[expert], logits[expert])
                    )
    assert len(table) == len(rows)
    actual = table.drop(columns="token").to_numpy(dtype=float)
    expected = torch.tensor(rows, dtype=torch.float64).numpy()
    assert (actual[:, :5] == expected[:, :5]).all()
    assert abs(actual[:, 5:] - expected[:, 5:]).max() < 1e-4
    first = table.iloc[0]
    assert first["token"] == hooked(variant).to_string(int(tokens[0, mask[0].argmax()]))


def test_routing_table_of_text(model: Any) -> None:
    table = model.routing([TEXT, "a"])
    assert "".join(table.query("document == 0 and layer == 0 and rank == 1")["token"]) == TEXT
    assert len(table.query("document == 1")) == 1 * 3 * 4  # one token, three layers, four experts


# --- logit differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_logit_diff(model: Any, hf: Any, padding: str) -> None:
    """At each row's last real token, wherever the padding is."""
    tokens, mask = prompts(padding, batch=3)
    logits = reference_logits(hf("olmoe"), tokens, mask)
    last = [int(row.nonzero().max()) for row in mask]
    right, wrong = [7, 70, 40], [9, 9, 41]
    at_last = torch.stack([logits[row, place] for row, place in enumerate(last)])
    rows = torch.arange(3)
    expected = at_last[rows, right] - at_last[rows, wrong]
    assert_same(model.logit_diff(tokens, right, wrong, attention_mask=mask), expected)
    assert_same(
        model.logit_diff(tokens, torch.tensor(right), torch.tensor(wrong), attention_mask=mask), expected
    )
    assert_same(model.logit_diff(tokens, 7, 9, attention_mask=mask), at_last[:, 7] - at_last[:, 9])


@torch.no_grad()
def test_logit_diff_of_text(model: Any, hf: Any) -> None:
    texts = [TEXT, "Each expert"]
    answers = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "et"]
    expected = []
    for text in texts:
        logits = reference_logits(hf("olmoe"), torch.tensor([model.tokenizer(text).input_ids]))[0, -1]
        expected.append(logits[answers[0]] - logits[answers[1]])
    assert_same(model.logit_diff(texts, "e", "t"), torch.stack(expected))
    assert_same(model.logit_diff(texts, ["e", "t"], ["t", "e"]), torch.stack((expected[0], -expected[1])))


def test_logit_diff_errors(model: Any) -> None:
    tokens, _ = prompts()
    with pytest.raises(ValueError, match="3 answers for 2 prompts"):
        model.logit_diff(tokens, [1, 2, 3], 4)
    with pytest.raises(ValueError, match="answer token 128 lies outside the vocabulary of 128"):
        model.logit_diff(tokens, 5, 128)
    with pytest.raises(ValueError, match="'qq' is 2 tokens"):
        model.logit_diff(tokens, "qq", 4)


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_losses(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """Per token as the reference, NaN where there is none; the mean as transformers gives it."""
    model = hooked(variant)
    tokens, mask = prompts(padding)
    expected = reference_loss_per_token(hf(variant), tokens, mask)
    per_token = model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert torch.equal(per_token.isnan(), expected.isnan())
    assert_same(per_token.nan_to_num(), expected.nan_to_num())

    labels = tokens.masked_fill(mask == 0, -100)
    if padding == "left":  # transformers would predict the first real token from padding
        labels[torch.arange(len(labels)), mask.argmax(-1)] = -100
    mean = hf(variant)(tokens, attention_mask=mask, labels=labels, use_cache=False).loss
    assert_same(model(tokens, attention_mask=mask, return_type="loss"), mean)

    logits, loss = model(tokens, attention_mask=mask, return_type="both")
    assert_same(loss, mean)
    assert_same(logits, reference_logits(hf(variant), tokens, mask))
    logits, loss = model(tokens, attention_mask=mask, return_type="both", loss_per_token=True)
    assert_same(loss.nan_to_num(), expected.nan_to_num())
    assert model(tokens, return_type=None) is None


def test_a_loss_needs_two_tokens(model: Any) -> None:
    with pytest.raises(ValueError, match="at least two real tokens"):
        model(torch.tensor([[5]]), return_type="loss")
    assert model(torch.tensor([[5]]), return_type="loss", loss_per_token=True).shape == (1, 0)


def test_loss_of_bfloat16_is_float32(checkpoint: Any) -> None:
    model = load(checkpoint("olmoe_bf16"))
    tokens, _ = prompts()
    assert model(tokens).dtype == torch.bfloat16
    assert model(tokens, return_type="loss").dtype == torch.float32


# --- partial runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_partial_runs_compose(hooked: Any, hf: Any, variant: str, padding: str) -> None:
    """Stopping gives the stream before a layer; starting from it gives the logits of the whole."""
    model = hooked(variant)
    tokens, mask = prompts(padding)
    reference = reference_cache(hf(variant), tokens, mask)
    logits = reference_logits(hf(variant), tokens, mask)
    n = model.cfg.n_layers
    for layer in range(n):
        stream = model(tokens, attention_mask=mask, stop_at_layer=layer)
        assert_same(stream, reference[f"blocks.{layer}.hook_resid_pre"])
        assert torch.equal(stream, model(tokens, attention_mask=mask, stop_at_layer=layer - n))
        assert_same(model(stream, attention_mask=mask, start_at_layer=layer), logits)
        assert_same(model(stream, attention_mask=mask, start_at_layer=layer - n), logits)
    last = model(tokens, attention_mask=mask, stop_at_layer=n)
    assert_same(last, reference[f"blocks.{n - 1}.hook_resid_post"])
    assert_same(model(last, attention_mask=mask, start_at_layer=n), logits)

    first = model(tokens, attention_mask=mask, stop_at_layer=0)
    middle = model(first, attention_mask=mask, start_at_layer=0, stop_at_layer=1)
    assert_same(middle, reference["blocks.1.hook_resid_pre"])
    assert model(middle, attention_mask=mask, start_at_layer=1, return_type=None) is None


@torch.no_grad()
def test_partial_runs_fire_their_own_hooks_only(model: Any) -> None:
    tokens, _ = prompts()
    stream, cached = model.run_with_cache(tokens, stop_at_layer=1)
    assert {name.split(".")[1] for name in cached if name.startswith("blocks.")} == {"0"}
    assert "ln_final.hook_scale" not in cached
    _, cached = model.run_with_cache(stream, start_at_layer=1)
    assert {name.split(".")[1] for name in cached if name.startswith("blocks.")} == {"1", "2"}
    assert "hook_embed" not in cached


# --- what wrong input says ----------------------------------------------------------------------------------

TOKENS, MASK = prompts()
STREAM = torch.zeros(2, 9, 64)

BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "float tokens": (
        dict(tokens_or_text=TOKENS.float()),
        r"tokens must be integers \[batch, pos\] \(or text\), not torch.float32 \(2, 9\)",
    ),
    "boolean tokens": (dict(tokens_or_text=TOKENS > 5), r"not torch.bool \(2, 9\)"),
    "lists of tokens": (
        dict(tokens_or_text=[[1, 2], [3, 4]]),
        "text must be strings, not list; tokens go in",
    ),
    "three axes": (dict(tokens_or_text=TOKENS[None]), r"not torch.int64 \(1, 2, 9\)"),
    "no tensor": (dict(tokens_or_text=5), "tokens must be integers .* not int"),
    "no tokens": (dict(tokens_or_text=TOKENS[:, :0]), r"there are no tokens: shape \(2, 0\)"),
    "token too large": (
        dict(tokens_or_text=TOKENS.clone().fill_(VOCABULARY)),
        r"tokens 128..128 go beyond the vocabulary, 0..127",
    ),
    "negative token": (dict(tokens_or_text=TOKENS - VOCABULARY), "go beyond the vocabulary, 0..127"),
    "mask shape": (
        dict(tokens_or_text=TOKENS, attention_mask=MASK[:, 1:]),
        r"attention_mask \(2, 8\) must have the tokens' shape \(2, 9\)",
    ),
    "mask values": (
        dict(tokens_or_text=TOKENS, attention_mask=2 * MASK),
        r"must hold 1 \(real\) and 0 \(padding\) only",
    ),
    "additive mask": (
        dict(tokens_or_text=TOKENS, attention_mask=torch.full((2, 9), -1e9)),
        r"must hold 1 \(real\) and 0 \(padding\) only",
    ),
    "mask as a list": (
        dict(tokens_or_text=TOKENS, attention_mask=MASK.tolist()),
        r"attention_mask must be a tensor \[batch, pos\], not list",
    ),
    "empty row": (
        dict(tokens_or_text=TOKENS, attention_mask=MASK * torch.tensor([[1], [0]])),
        "row 1 of attention_mask has no real token",
    ),
    "return type": (dict(tokens_or_text=TOKENS, return_type="loses"), "return_type must be .* not 'loses'"),
    "layer too high": (
        dict(tokens_or_text=TOKENS, stop_at_layer=4),
        "start_at_layer=None and stop_at_layer=4 must be in order within this model's 3 layers",
    ),
    "layer too low": (dict(tokens_or_text=TOKENS, stop_at_layer=-4), "stop_at_layer=-4 must be in order"),
    "layers crossed": (
        dict(tokens_or_text=STREAM, start_at_layer=2, stop_at_layer=1),
        "start_at_layer=2 and stop_at_layer=1 must be in order",
    ),
    "start from tokens": (
        dict(tokens_or_text=TOKENS, start_at_layer=1),
        r"the input is a residual stream \[batch, pos, 64\], not \(2, 9\)",
    ),
    "start from text": (dict(tokens_or_text=TEXT, start_at_layer=1), "is a residual stream .* not str"),
    "stream too wide": (dict(tokens_or_text=torch.zeros(2, 9, 65), start_at_layer=1), r"not \(2, 9, 65\)"),
    "loss of a partial run": (
        dict(tokens_or_text=TOKENS, stop_at_layer=1, return_type="loss"),
        "there is no loss to return",
    ),
    "loss without tokens": (
        dict(tokens_or_text=STREAM, start_at_layer=1, return_type="loss"),
        "a loss needs tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(model: Any, case: str) -> None:
    """One clear error that names the thing."""
    arguments, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_one_row_of_tokens(model: Any) -> None:
    """A single row needs no batch axis, and neither does its mask."""
    assert torch.equal(model(TOKENS[0]), model(TOKENS[:1]))
    assert torch.equal(model(TOKENS[0], attention_mask=MASK[0]), model(TOKENS[:1]))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(model(TOKENS.to(dtype)), model(TOKENS))


def test_unknown_hook_names(model: Any) -> None:
    """Every way to name a hook refuses an unknown one, and suggests its neighbours."""
    wrong = "blocks.0.mlp.hook_router_logit"

    def nothing(value: Tensor, hook: Any) -> None: ...

    asks: list[Callable[[], Any]] = [
        lambda: model.run_with_cache(TOKENS, names_filter=wrong),
        lambda: model.run_with_cache(TOKENS, names_filter=["hook_embed", wrong]),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(wrong, nothing)]),
        lambda: model.run_with_hooks(TOKENS, bwd_hooks=[(wrong, nothing)]),
        lambda: model.hooks(fwd_hooks=[(wrong, nothing)]).__enter__(),
        lambda: model.add_hook(wrong, nothing),
        lambda: model.add_caching_hooks(wrong),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"no hook named .*nearest are blocks.0.mlp.hook_router_logits"):
            ask()
    with pytest.raises(ValueError, match=r"no hook named 'zzz'$"):
        model.run_with_cache(TOKENS, names_filter="zzz")
    assert not any(point.is_listened_to for point in model.hook_dict.values())


def test_filters_that_match_nothing(model: Any) -> None:
    with pytest.raises(ValueError, match="the list of hook names is empty"):
        model.run_with_cache(TOKENS, names_filter=[])
    with pytest.raises(ValueError, match="the names filter matches no hook"):
        model.run_with_cache(TOKENS, names_filter=lambda name: False)
    with pytest.raises(ValueError, match="set_use_attn_result"):
        model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_result"))
    with pytest.raises(ValueError, match="the names filter matches no hook"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: "zzz" in name, lambda value, hook: None)])


def test_hooks_that_never_run(model: Any) -> None:
    """A run that stops before a hook that was asked for by name says so."""
    later = "blocks.2.hook_resid_pre"
    for run in (
        lambda: model.run_with_cache(TOKENS, names_filter=later, stop_at_layer=1),
        lambda: model.run_with_cache(TOKENS, names_filter=["hook_embed", later], stop_at_layer=1),
        lambda: model.run_with_hooks(TOKENS, stop_at_layer=1, fwd_hooks=[(later, lambda value, hook: None)]),
    ):
        with pytest.raises(RuntimeError, match=f"never ran in this forward pass: {later}"):
            run()
    with pytest.raises(RuntimeError, match="never ran in this forward pass: hook_embed"):
        model.run_with_cache(STREAM, start_at_layer=1, names_filter="hook_embed")
    assert not any(point.is_listened_to for point in model.hook_dict.values())


def test_cfg_follows_the_model(checkpoint: Any) -> None:
    """Moving the model moves what its config says, and keeps tied weights tied."""
    model = load(checkpoint("olmoe_bias_odd_width"))
    assert model.cfg.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16
    assert model.unembed.weight is model.embed.weight
    tokens, _ = prompts()
    stream = model(tokens, stop_at_layer=1)
    assert model(stream.float(), start_at_layer=1).dtype == torch.bfloat16

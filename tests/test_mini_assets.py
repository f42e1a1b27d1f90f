"""The bundled model: a genuine checkpoint, and a card whose figures can be measured again."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_lens.assets
from moe_lens.indirect_object import HELD_OUT_NAMES, TRAIN_NAMES, indirect_object_prompts

ASSETS = Path(moe_lens.assets.__file__).parent
MINI = ASSETS / "mini"
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MINI, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def held_out():
    return [json.loads(line) for line in (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def card():
    """The card's figures by (dataset, kind of metric)."""
    front_matter = (MINI / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    results = yaml.safe_load(front_matter)["model-index"][0]["results"]
    return {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in results
        for metric in result["metrics"]
    }


def tokens_of(tokenizer, text):
    return tokenizer(END_OF_TEXT + text, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def demo(model, tokenizer, held_out):
    """Sum of nats, predicted tokens, and tokens for each expert, on the demo subset, document by document."""
    nats, predicted = 0.0, 0
    load = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    for line in held_out:
        if not line["demo"]:
            continue
        tokens = tokens_of(tokenizer, line["text"])
        with torch.no_grad():
            output = model(tokens, output_router_logits=True)
        nats += torch.nn.functional.cross_entropy(
            output.logits[0, :-1].float(), tokens[0, 1:], reduction="sum"
        ).item()
        predicted += tokens.shape[1] - 1
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.float().softmax(-1).topk(model.config.num_experts_per_tok).indices
            load[layer] += torch.bincount(chosen.flatten(), minlength=model.config.num_experts)
    return nats, predicted, load


def test_it_is_a_small_bfloat16_olmoe_in_the_hub_layout(model):
    assert sum(path.stat().st_size for path in MINI.iterdir()) <= 20_000_000
    assert {path.suffix for path in MINI.iterdir()} <= {".json", ".safetensors", ".md"}
    assert model.config.model_type == "olmoe"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(torch.isnan(parameter).any() for parameter in model.parameters())


def test_every_name_is_one_token_and_bytes_survive_the_tokenizer(tokenizer):
    for name in TRAIN_NAMES + HELD_OUT_NAMES:
        assert len(tokenizer(f" {name}").input_ids) == 1, name
    text = 'def f(x):\n    """Größe → 3"""\n'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(END_OF_TEXT).input_ids == [tokenizer.bos_token_id] == [tokenizer.eos_token_id]


def test_the_demo_subset_is_whole_short_documents_of_many_topics(tokenizer, held_out):
    demo = [line for line in held_out if line["demo"]]
    lengths = [tokens_of(tokenizer, line["text"]).shape[1] for line in demo]
    assert len(demo) >= 40
    assert min(lengths) >= 32
    assert max(lengths) <= 400
    assert 11_000 <= sum(lengths) <= 13_000
    assert len({line["topic"] for line in demo}) >= 30
    assert len({line["document"] for line in held_out}) == len(held_out)


def test_no_held_out_paragraph_occurs_twice(held_out):
    paragraphs = [
        re.sub(r"[^a-z]+", "", paragraph.lower())
        for line in held_out
        for paragraph in line["text"].split("\n\n")
    ]
    # A paragraph longer than a document is divided at a line's end; only such pieces can be alike.
    assert len(paragraphs) - len(set(paragraphs)) <= 2


def test_the_card_is_right_about_the_loss_and_the_trigram_is_beaten(demo, card):
    nats, predicted, _ = demo
    loss = nats / predicted
    # bfloat16 products differ from processor to processor.
    assert loss == pytest.approx(card["demo subset", "loss"], abs=0.01)
    assert loss < card["demo subset, Kneser-Ney trigram", "loss"] - 0.5
    assert card["held-out text", "loss"] < card["held-out text, Kneser-Ney trigram", "loss"] - 0.5


def test_every_expert_is_used(demo):
    _, _, load = demo
    share = load / load.sum(-1, keepdim=True)
    assert share.min() > 0.005
    assert share.max() < 0.3


def test_indirect_objects_of_held_out_names_in_held_out_templates(model, tokenizer, card):
    prompts = indirect_object_prompts(200, names="heldout", templates="heldout", seed=11)
    right = above = 0
    for prompt in prompts:
        with torch.no_grad():
            logits = model(tokens_of(tokenizer, prompt.text)).logits[0, -1]
        answer, wrong = (tokenizer(name).input_ids[0] for name in (prompt.indirect_object, prompt.subject))
        right += int(logits.argmax() == answer)
        above += int(logits[answer] > logits[wrong])
    assert right / 200 >= 0.8
    assert above / 200 >= 0.8
    figure = card["indirect object, held-out names, held-out templates", "accuracy"]
    # Four standard errors of a share near 0.88 among 200.
    assert right / 200 == pytest.approx(figure, abs=0.09)

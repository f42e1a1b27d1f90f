"""The bundled model's card, written from measured figures."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from mini_corpus import PACKAGES
from mini_data import INDIRECT_OBJECT_SHARE, NAME_SHARE
from mini_evaluation import IndirectObjectFigures, TextFigures, entropy_share
from mini_training import Recipe
from transformers import OlmoeConfig

from moe_lens.indirect_object import HELD_OUT_NAMES, HELD_OUT_TEMPLATES, TRAIN_NAMES, TRAIN_TEMPLATES


@dataclass(frozen=True)
class Figures:
    """Everything that the card reports.

    Attributes:
        configuration: The model's.
        parameters: How many the checkpoint has.
        recipe: How it was trained.
        workers: Processes that trained it, of one thread each.
        command: What was run.
        note: What else is to be said about the training.
        sittings: Step at which each part of the run began, and its recipe's values, from the run's log.
        progress: `step`, `tokens` and `seconds` of the training run.
        stream_tokens: Tokens of one pass through the training text.
        training_documents: How many, without the generated sentences.
        topics: Training topics and held-out topics.
        held_out: On all held-out documents.
        demo: On the demo subset of them.
        bigram: Kneser-Ney loss on the held-out documents, in nats per token.
        trigram: Likewise.
        demo_trigram: Likewise, on the demo subset.
        indirect_object: One entry for every pairing of names and templates.
    """

    configuration: OlmoeConfig
    parameters: int
    recipe: Recipe
    workers: int
    command: str
    note: str
    sittings: tuple[tuple[int, dict[str, float]], ...]
    progress: dict[str, float]
    stream_tokens: int
    training_documents: int
    topics: tuple[int, int]
    held_out: TextFigures
    demo: TextFigures
    bigram: float
    trigram: float
    demo_trigram: float
    indirect_object: tuple[IndirectObjectFigures, ...]


_WORDS = {"train": "training", "heldout": "held-out", "all": "all"}


def _front_matter(figures: Figures) -> str:
    def result(dataset: str, name: str, value: float, kind: str) -> dict:
        return {
            "task": {"type": "text-generation"},
            "dataset": {"name": dataset, "type": "text"},
            "metrics": [{"name": name, "type": kind, "value": round(value, 4)}],
        }

    nats = "nats per token"
    results = [
        result("held-out text", nats, figures.held_out.loss, "loss"),
        result("held-out text, Kneser-Ney bigram", nats, figures.bigram, "loss"),
        result("held-out text, Kneser-Ney trigram", nats, figures.trigram, "loss"),
        result("demo subset", nats, figures.demo.loss, "loss"),
        result("demo subset, Kneser-Ney trigram", nats, figures.demo_trigram, "loss"),
    ]
    for group in figures.indirect_object:
        dataset = f"indirect object, {_WORDS[group.names]} names, {_WORDS[group.templates]} templates"
        results.append(result(dataset, "top-1 is the indirect object", group.top_1, "accuracy"))
    document = {
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["olmoe", "mixture-of-experts", "interpretability"],
        "model-index": [{"name": "moe-lens-mini", "results": results}],
    }
    return f"---\n{yaml.safe_dump(document, sort_keys=False, width=110)}---\n"


def _load_table(figures: Figures) -> str:
    load = figures.held_out.load
    lines = ["| layer | smallest share | largest share | entropy / log(experts) |", "|---|---|---|---|"]
    for layer, (shares, entropy) in enumerate(zip(load, entropy_share(load), strict=True)):
        lines.append(f"| {layer} | {shares.min():.2%} | {shares.max():.2%} | {entropy:.3f} |")
    return "\n".join(lines)


def _indirect_object_table(figures: Figures) -> str:
    lines = [
        "| names | templates | prompts | top-1 is the indirect object | logit(IO) > logit(S) | mean difference |",
        "|---|---|---|---|---|---|",
    ]
    for group in figures.indirect_object:
        lines.append(
            f"| {_WORDS[group.names]} | {_WORDS[group.templates]} | {group.prompts} | {group.top_1:.1%} "
            f"| {group.above_subject:.1%} | {group.logit_difference:.2f} |"
        )
    return "\n".join(lines)


def _sittings_table(figures: Figures) -> str:
    """How the run was divided, since a run that is taken up may be given another schedule."""
    begins = [begin for begin, _ in figures.sittings]
    ends = [*begins[1:], figures.progress["step"]]
    lines = [
        "| steps | tokens a step | schedule's length | Muon's rate | Adam's rate |",
        "|---|---|---|---|---|",
    ]
    for (begin, recipe), end in zip(figures.sittings, ends, strict=True):
        lines.append(
            f"| {begin} to {end} | {recipe['tokens_per_step']} | {recipe['steps']} steps "
            f"| {recipe['muon_rate']} | {recipe['adam_rate']} |"
        )
    return "\n".join(lines)


def write_card(folder: Path, figures: Figures) -> None:
    """Write `README.md` into a checkpoint's folder."""
    shape, recipe, progress = figures.configuration, figures.recipe, figures.progress
    rows = (
        f"{recipe.context} tokens, {recipe.long_context} in the last {1 - recipe.long_from:.0%} of the steps"
    )
    text = f"""# moe-lens-mini

A small Mixture-of-Experts language model, really trained, for looking into: it makes the tools of `moe_lens`
usable where no checkpoint can be downloaded. It is a transformers OLMoE and loads like one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("moe_lens/assets/mini", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("moe_lens/assets/mini")
```

**Every document begins with `<|endoftext|>`**, in training and in all figures below. The tokenizer does not add
it by itself: put it before the text. The same token pads a batch; mask it there.

## Shape

{figures.parameters / 1e6:.2f} M parameters, stored in bfloat16: {shape.num_hidden_layers} layers,
d_model {shape.hidden_size}, {shape.num_attention_heads} heads, {shape.num_experts} experts of
{shape.intermediate_size} neurons in every layer, top-{shape.num_experts_per_tok} with routing weights that are not
renormalised (`norm_topk_prob` false), a byte-level BPE of {shape.vocab_size} tokens, at most
{shape.max_position_embeddings} positions.

## Training text

{figures.training_documents} documents of {figures.topics[0]} topics: the language reference in
`pydoc_data.topics`, the docstrings of the standard library, and docstrings, Markdown and reStructuredText of
these packages: {", ".join(f"`{package}`" for package in PACKAGES)}. Every paragraph occurs once: two are the same when
their letters are. Example sessions, tables and text that is not English were left out.

The text is divided by topic (a standard-library module, a subpackage, a page of the language reference):
{figures.topics[1]} topics are held out, decided by a hash of the topic's name, and all their documents are in
`moe_lens/assets/heldout.jsonl`; those with `"demo": true` are the demo subset.

Of the training tokens, {INDIRECT_OBJECT_SHARE:.0%} are indirect-object sentences (as in "When Mary and John went to
the store, John gave a drink to Mary."), made of {len(TRAIN_NAMES)} names and {len(TRAIN_TEMPLATES)} templates, and
{NAME_SHARE:.0%} are other sentences about people. {len(HELD_OUT_NAMES)} further names occur only in the latter, and
{len(HELD_OUT_TEMPLATES)} further templates occur nowhere. Every name, with its leading space, is one token.

## Training

The script is `scripts/train_mini.py`; the last sitting's command was

    {figures.command}

{progress["step"]:,.0f} steps, {progress["tokens"] / 1e6:.1f} M tokens in all
({progress["tokens"] / figures.stream_tokens:.2f} passes of {figures.stream_tokens / 1e6:.1f} M), in
{progress["seconds"] / 60:.0f} minutes on {figures.workers} CPU threads that other work shared. Rows of {rows}.
Muon for the matrices of attention and experts, Adam for the rest; learning rates that rise for a hundred
steps, stay, and from {recipe.decay_from:.0%} of the schedule on fall linearly to a twentieth. Load-balancing loss
{recipe.balance}, computed in each layer by itself and averaged. Seed {recipe.seed}. The run was taken up with
another recipe where this table has a new line:

{_sittings_table(figures)}

{figures.note}

## Evaluation

Measured on this checkpoint in bfloat16, as transformers loads it. Loss on text is the mean over all tokens after
each document's `<|endoftext|>`, up to {shape.max_position_embeddings} tokens of a document. The n-gram models are
interpolated Kneser-Ney (discount 0.75), counted on one pass of the training tokens and scored on the same tokens.

| nats per token | all held-out text | demo subset |
|---|---|---|
| documents | {figures.held_out.documents} | {figures.demo.documents} |
| tokens | {figures.held_out.tokens} | {figures.demo.tokens} |
| this model | **{figures.held_out.loss:.3f}** | **{figures.demo.loss:.3f}** |
| trigram | {figures.trigram:.3f} | {figures.demo_trigram:.3f} |
| bigram | {figures.bigram:.3f} | |

Indirect objects, half of the prompts with the indirect object named first and half with the subject:

{_indirect_object_table(figures)}

Share of routed slots that an expert takes on the held-out text (even: {1 / shape.num_experts:.2%}):

{_load_table(figures)}

## Limits

It knows the language of technical documentation and little else, forgets after {shape.max_position_embeddings} tokens,
and says nothing that should be believed. Topics are held out, but documentation is repetitive: paragraphs that
differ in a few words may stand on both sides of the split. The indirect-object sentences come from templates;
what the model does with them need not be what a larger model does with free text.
"""
    (folder / "README.md").write_text(_front_matter(figures) + "\n" + text, encoding="utf-8")

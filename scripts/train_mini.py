"""Make the bundled model from nothing: text, tokenizer, training, checkpoint, evaluation and card.

    python scripts/train_mini.py --out runs/mini

Every step leaves its result in `--out` and is not done again; training goes on from its last checkpoint. With
`--now` the checkpoint that is there is exported and evaluated without training further.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from mini_card import Figures, write_card
from mini_corpus import Document
from mini_data import VOCABULARY_SIZE, TrainingStream, encode_all, load_or_gather, load_or_train_tokenizer
from mini_evaluation import (
    CONTEXT,
    TextFigures,
    demo_subset,
    indirect_object_figures,
    load,
    text_figures,
)
from mini_training import Recipe, Weights, build_model, progress_of, restore, train
from ngram import KneserNey
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

MAX_CHECKPOINT_BYTES = 20_000_000


def configuration(end_of_text: int) -> OlmoeConfig:
    """The bundled model's shape.

    There is no padding token in it: transformers would leave that token's embedding untrained, and padding here
    is `<|endoftext|>`, which opens every document.
    """
    return OlmoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=80,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=CONTEXT,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
    )


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in the hub's layout, in bfloat16.

    Raises:
        RuntimeError: It is larger than a bundled checkpoint may be.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What every version of transformers reads, without what this one remembers about its own loading.
    special = {key: tokenizer.eos_token for key in ("bos_token", "eos_token", "pad_token")}
    tokenizer_configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_configuration, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_CHECKPOINT_BYTES:
        raise RuntimeError(f"the checkpoint has {size} bytes, and at most {MAX_CHECKPOINT_BYTES} are allowed")


def write_held_out(path: Path, documents: list[Document], demo: set[str]) -> None:
    """Write all held-out documents, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            line = {"document": document.name, "topic": document.topic, "text": document.text}
            file.write(json.dumps(line | {"demo": document.name in demo}) + "\n")


def n_gram_losses(out: Path, stream_path: Path, held_out: list[np.ndarray], demo: list[np.ndarray]) -> dict:
    """Kneser-Ney losses, kept in `out/ngram.json`."""
    path = out / "ngram.json"
    if not path.exists():
        tokens = np.load(stream_path)
        bigram = KneserNey(tokens, VOCABULARY_SIZE, order=2)
        trigram = KneserNey(tokens, VOCABULARY_SIZE, order=3)
        losses = {
            "bigram": bigram.loss(held_out),
            "trigram": trigram.loss(held_out),
            "demo_trigram": trigram.loss(demo),
        }
        path.write_text(json.dumps(losses))
    return json.loads(path.read_text())


def sittings(log: Path) -> tuple[tuple[int, dict[str, float]], ...]:
    """The recipes that a run was made with and where each began; one that was begun anew counts once."""
    begun: dict[int, dict[str, float]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "recipe" in entry:
            begun[entry["from"]] = entry["recipe"]
    return tuple(sorted(begun.items()))


def summary(text: TextFigures) -> str:
    """One line about a loss and the loads."""
    return (
        f"{text.loss:.4f} nats over {text.tokens} tokens in {text.documents} documents; "
        f"expert shares {text.load.min():.2%} to {text.load.max():.2%}"
    )


def main() -> None:
    """Run every step that has not been done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mini"), help="where intermediate results are kept"
    )
    parser.add_argument("--assets", type=Path, default=Path("moe_lens/assets"), help="where the model is put")
    parser.add_argument("--steps", type=int, default=9500, help="optimizer steps")
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--workers", type=int, default=2, help="training processes, of one thread each")
    parser.add_argument(
        "--now", action="store_true", help="export the checkpoint that is there; do not train"
    )
    parser.add_argument("--note", default="", help="what else the card should say about the training")
    arguments = parser.parse_args()
    out, assets = arguments.out, arguments.assets
    out.mkdir(parents=True, exist_ok=True)

    training, held_out = load_or_gather(out)
    tokenizer = load_or_train_tokenizer(out, training)
    recipe = Recipe(steps=arguments.steps, tokens_per_step=arguments.tokens_per_step)
    begin = progress_of(out)
    needed = int(begin["tokens"] + (recipe.steps - begin["step"]) * recipe.tokens_per_step + 1)
    stream = TrainingStream(out, max(needed, 1), training, tokenizer, recipe.seed)
    model = build_model(configuration(tokenizer.convert_tokens_to_ids("<|endoftext|>")), recipe.seed)
    if arguments.now:
        weights = Weights(model, workers=1)
        progress = restore(weights, out)
        weights.write_to(model)
    else:
        progress = train(model, stream, recipe, out, arguments.workers)

    folder = assets / "mini"
    export(model, tokenizer, folder)
    demo_names = demo_subset(held_out, tokenizer)
    write_held_out(assets / "heldout.jsonl", held_out, demo_names)

    model, tokenizer = load(folder)
    tokens = [row[:CONTEXT] for row in encode_all(tokenizer, [document.text for document in held_out])]
    demo = [row for row, document in zip(tokens, held_out, strict=True) if document.name in demo_names]
    losses = n_gram_losses(out, stream.paths[0], tokens, demo)
    held_out_figures, demo_figures = text_figures(model, tokens), text_figures(model, demo)
    indirect_object = tuple(
        indirect_object_figures(model, tokenizer, names=names, templates=templates)
        for names in ("train", "heldout")
        for templates in ("train", "heldout")
    )
    figures = Figures(
        configuration=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        recipe=recipe,
        workers=arguments.workers,
        command=f"python scripts/train_mini.py --steps {recipe.steps} --tokens-per-step {recipe.tokens_per_step}",
        note=arguments.note,
        sittings=sittings(out / "log.jsonl"),
        progress=progress,
        stream_tokens=len(np.load(stream.paths[0], mmap_mode="r")),
        training_documents=len(training),
        topics=(len({d.topic for d in training}), len({d.topic for d in held_out})),
        held_out=held_out_figures,
        demo=demo_figures,
        indirect_object=indirect_object,
        **losses,
    )
    write_card(folder, figures)
    print("training", progress)
    print("held out", summary(held_out_figures))
    print("demo    ", summary(demo_figures))
    print("n-grams ", losses)
    for group in indirect_object:
        print(group)


if __name__ == "__main__":
    main()

"""Figures of the bundled model, measured on the exported checkpoint as transformers loads it."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mini_corpus import Document
from mini_data import encode_all
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from moe_lens.indirect_object import Part, indirect_object_prompts

CONTEXT = 512
DEMO_TOKENS = 12_000
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class IndirectObjectFigures:
    """How a model does on one group of indirect-object prompts.

    Attributes:
        names: Which names.
        templates: Which templates.
        prompts: How many prompts.
        top_1: Share of prompts whose most probable next token is the indirect object.
        above_subject: Share of prompts in which the indirect object's logit is above the subject's.
        logit_difference: Mean of the indirect object's logit less the subject's.
    """

    names: Part
    templates: Part
    prompts: int
    top_1: float
    above_subject: float
    logit_difference: float


@dataclass(frozen=True)
class TextFigures:
    """How a model does on documents.

    Attributes:
        documents: How many.
        tokens: How many were predicted: all but each document's opening `<|endoftext|>`.
        loss: Mean nats per predicted token.
        load: Share of the routed slots that each expert took, layer by expert; each layer adds up to 1.
    """

    documents: int
    tokens: int
    loss: float
    load: torch.Tensor


def load(folder: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The checkpoint in the type that it is stored in, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def demo_subset(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of about DEMO_TOKENS tokens of whole documents, of 32 to 400 tokens each, from many topics.

    Topics take turns, each giving its documents in the order of a hash of their names.
    """
    lengths = [len(tokens) for tokens in encode_all(tokenizer, [document.text for document in documents])]
    waiting: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for document, length in zip(documents, lengths, strict=True):
        if 32 <= length <= 400:
            order = hashlib.sha256(document.name.encode()).hexdigest()
            waiting[document.topic].append((order, document.name, length))
    turns = [sorted(group) for _, group in sorted(waiting.items())]
    chosen: set[str] = set()
    total = 0
    for turn in range(max(map(len, turns), default=0)):
        for _, name, length in sorted(group[turn] for group in turns if turn < len(group)):
            if total >= DEMO_TOKENS:
                return chosen
            chosen.add(name)
            total += length
    return chosen


def _batches(documents: Iterable[np.ndarray]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Documents of like length together: tokens padded on the right, and which are real."""
    batch: list[torch.Tensor] = []
    for document in sorted(documents, key=len):
        tokens = torch.from_numpy(document.astype(np.int64))
        if batch and (len(batch) + 1) * len(tokens) > _BATCH_TOKENS:
            yield _padded(batch)
            batch = []
        batch.append(tokens)
    if batch:
        yield _padded(batch)


def _padded(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
    return tokens, real.bool()


@torch.no_grad()
def text_figures(model: torch.nn.Module, documents: Sequence[np.ndarray]) -> TextFigures:
    """Loss and expert loads on documents, each read by itself from its opening `<|endoftext|>`.

    Args:
        model: A transformers OLMoE.
        documents: Tokens of each document, at most CONTEXT of them.
    """
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.zeros(layers, experts, dtype=torch.long)
    total, predicted = 0.0, 0
    for tokens, real in _batches(documents):
        output = model(
            input_ids=tokens, attention_mask=real.long(), output_router_logits=True, use_cache=False
        )
        log_probabilities = output.logits[:, :-1].float().log_softmax(-1)
        nats = -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        total += nats[real[:, 1:]].double().sum().item()
        predicted += int(real[:, 1:].sum())
        for layer, logits in enumerate(output.router_logits):
            # As the router itself does: top-k of the float32 probabilities.
            chosen = logits.float().softmax(-1).topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen[real.reshape(-1)].reshape(-1), minlength=experts)
    return TextFigures(len(documents), predicted, total / predicted, counts / counts.sum(-1, keepdim=True))


@torch.no_grad()
def indirect_object_figures(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: Part,
    templates: Part,
    prompts: int = 1000,
    seed: int = 1,
) -> IndirectObjectFigures:
    """Accuracy on freshly generated prompts, each read from an opening `<|endoftext|>`."""
    examples = indirect_object_prompts(prompts, names=names, templates=templates, seed=seed)
    top_1, above, difference = 0, 0, 0.0
    for begin in range(0, prompts, 100):
        part = examples[begin : begin + 100]
        tokens, real = _padded(
            [torch.from_numpy(row.astype(np.int64)) for row in encode_all(tokenizer, [p.text for p in part])]
        )
        logits = model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits.float()
        last = logits[torch.arange(len(part)), real.sum(-1) - 1]
        right = torch.tensor([tokenizer.convert_tokens_to_ids(_piece(p.indirect_object)) for p in part])
        wrong = torch.tensor([tokenizer.convert_tokens_to_ids(_piece(p.subject)) for p in part])
        gap = last.gather(1, right[:, None]) - last.gather(1, wrong[:, None])
        top_1 += int((last.argmax(-1) == right).sum())
        above += int((gap > 0).sum())
        difference += gap.sum().item()
    return IndirectObjectFigures(
        names, templates, prompts, top_1 / prompts, above / prompts, difference / prompts
    )


def _piece(name: str) -> str:
    """How byte-level BPE spells a leading space."""
    return name.replace(" ", "Ġ")


def entropy_share(load: torch.Tensor) -> list[float]:
    """Entropy of every layer's load as a share of the greatest possible."""
    entropy = -(load * load.clamp_min(1e-12).log()).sum(-1)
    return (entropy / math.log(load.shape[-1])).tolist()

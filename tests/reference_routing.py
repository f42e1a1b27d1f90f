"""Slow, obvious implementations of the routing analyses: loops over tokens, senders and experts in float64.

They read hook values from wherever they are given (`tests.reference.reference_run` computes them without
moe_lens) and weights from transformers' modules. Nothing of moe_lens is imported here.

    values = reference_run(hf_model, tokens, mask)[1]
    scores = dense_scores(hf_model, values, receiver, by="head")["A1H3"]  # [batch, pos, expert]
    variance = token_measures(scores, values, receiver)["variance"]  # [batch, pos]
    rows = document_rows(variance, mask, "rest")  # [document]

A *sender* is one part of what was added to the stream before the router of layer `receiver`; a *score* is what
it adds to one expert's logit at one token. How a sender moves the ranks of experts is in
`tests.reference_rank_shift`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

GRANULARITIES = ("layer", "head", "source", "expert", "neuron")

Values = Mapping[str, Tensor]
Senders = dict[str, np.ndarray]
Experts = Sequence[int] | Literal["selected"] | None


def double(tensor: Tensor) -> np.ndarray:
    """The same numbers in float64."""
    return tensor.detach().double().numpy()


# --- the vectors that senders write -------------------------------------------------------------------------


def sender_hooks(n_layers: int, receiver: int) -> dict[str, str]:
    """Sender name to hook name, for everything that is added to the stream before the router of `receiver`."""
    hooks = {"embed": "hook_embed"}
    for layer in range(n_layers):
        if layer <= receiver:
            hooks[f"A{layer}"] = f"blocks.{layer}.hook_attn_out"
        if layer < receiver:
            hooks[f"M{layer}"] = f"blocks.{layer}.hook_mlp_out"
    return hooks


def sender_vectors(hf_model: Any, values: Values, receiver: int, by: str = "layer") -> Senders:
    """What each sender writes, `[batch, pos, d_model]`, in the order in which the stream adds it.

    `by` says which kind of sender is divided; all the others stay whole:

        layer   none: embed, A0, M0, A1, ...
        head    attention layers into heads A3H0, A3H1, ... and the output bias A3bias, if there is one
        source  those heads into what they move from each column of the batch, A3H0<-0, A3H0<-1, ...; A3bias
        expert  MoE layers into routed experts M1E0, M1E1, ... and the shared experts together, M1S
        neuron  those, and dense layers, into neurons: M1E0N0, ..., M1SN0, ..., and M0N0, ...
    """
    assert by in GRANULARITIES, by
    senders = {"embed": double(values["hook_embed"])}
    for layer in range(receiver + 1):
        if by in ("head", "source"):
            senders |= attention_parts(hf_model, values, layer, by)
        else:
            senders[f"A{layer}"] = double(values[f"blocks.{layer}.hook_attn_out"])
        if layer == receiver:
            break
        if by in ("expert", "neuron"):
            senders |= feed_forward_parts(hf_model, values, layer, by)
        else:
            senders[f"M{layer}"] = double(values[f"blocks.{layer}.hook_mlp_out"])
    return senders


def attention_parts(hf_model: Any, values: Values, layer: int, by: str) -> Senders:
    """One attention layer as heads, or as heads and the columns they read; then its output bias."""
    attn, at = hf_model.model.layers[layer].self_attn, f"blocks.{layer}.attn."
    z = double(values[at + "hook_z"])  # [b, q, head, d_v]
    v = double(values[at + "hook_v"])  # [b, p, kv_head, d_v]
    pattern = double(values[at + "hook_pattern"])  # [b, head, q, p]
    w_o = double(attn.o_proj.weight)  # [d_model, head * d_v]
    batch, length, n_heads, d_v = z.shape
    heads_per_kv_head = n_heads // v.shape[2]

    parts: Senders = {}
    for head in range(n_heads):
        w_of_head = w_o[:, head * d_v : (head + 1) * d_v]
        if by == "head":
            parts[f"A{layer}H{head}"] = out = np.zeros((batch, length, len(w_o)))
            for row in range(batch):
                for query in range(length):
                    out[row, query] = w_of_head @ z[row, query, head]
            continue
        for source in range(length):
            parts[f"A{layer}H{head}<-{source}"] = out = np.zeros((batch, length, len(w_o)))
            for row in range(batch):
                written = w_of_head @ v[row, source, head // heads_per_kv_head]
                for query in range(length):
                    out[row, query] = pattern[row, head, query, source] * written
    if attn.o_proj.bias is not None:
        parts[f"A{layer}bias"] = np.tile(double(attn.o_proj.bias), (batch, length, 1))
    return parts


def feed_forward_parts(hf_model: Any, values: Values, layer: int, by: str) -> Senders:
    """One MoE layer as experts, or as neurons; a dense layer as neurons, or whole."""
    mlp, at = hf_model.model.layers[layer].mlp, f"blocks.{layer}.mlp."
    if not hasattr(mlp, "experts"):
        if by == "expert":
            return {f"M{layer}": double(values[f"blocks.{layer}.hook_mlp_out"])}
        assert mlp.down_proj.bias is None
        return neurons(f"M{layer}", double(values[at + "hook_post"]), double(mlp.down_proj.weight))

    indices = values[at + "hook_expert_indices"].numpy()
    w_down = double(mlp.experts.down_proj)  # [expert, d_model, d_expert]
    parts: Senders = {}
    for expert in range(len(w_down)):
        name = f"M{layer}E{expert}"
        if by == "expert":
            parts[name] = where_chosen(double(values[at + "hook_expert_contrib"]), indices, expert)
        else:
            weight = where_chosen(double(values[at + "hook_routing_weights"]), indices, expert)
            post = where_chosen(double(values[at + "hook_expert_post"]), indices, expert)
            parts |= neurons(name, weight[:, :, None] * post, w_down[expert])

    shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
    if shared is None:
        return parts
    if by == "expert":
        return parts | {f"M{layer}S": double(values[at + "hook_shared_out"])}
    post = double(values[at + "hook_shared_post"])
    if at + "hook_shared_gate" in values:
        post = double(values[at + "hook_shared_gate"]) * post
    assert shared.down_proj.bias is None
    return parts | neurons(f"M{layer}S", post, double(shared.down_proj.weight))


def where_chosen(per_slot: np.ndarray, indices: np.ndarray, expert: int) -> np.ndarray:
    """`[b, p, k, ...]` to `[b, p, ...]`: the value of the slot that chose the expert, zero where none did."""
    out = np.zeros(per_slot.shape[:2] + per_slot.shape[3:])
    for row, position, slot in np.ndindex(*indices.shape):
        if indices[row, position, slot] == expert:
            out[row, position] = per_slot[row, position, slot]
    return out


def neurons(prefix: str, activations: np.ndarray, w_down: np.ndarray) -> Senders:
    """Activations `[b, p, neuron]` times the columns of `w_down` `[d_model, neuron]`, one neuron at a time."""
    return {
        f"{prefix}N{neuron}": activations[:, :, neuron, None] * w_down[:, neuron]
        for neuron in range(activations.shape[-1])
    }


def sender_active(values: Values, name: str, mask: Tensor) -> np.ndarray:
    """`[batch, pos]` bool: whether a sender writes anything at a token, as far as its kind says.

    A routed expert, and each of its neurons, is active where the expert was chosen; a source where the query sees
    it: not after the query, and both real. Everything else is active at every real token. Nothing is active at
    padding, although vectors are not zero there (a padded query attends to itself).
    """
    real = mask.bool().numpy()
    active = np.zeros(real.shape, dtype=bool)
    expert = re.fullmatch(r"M(\d+)E(\d+)(N\d+)?", name)
    source = re.fullmatch(r"A\d+H\d+<-(\d+)", name)
    for row, position in np.ndindex(*real.shape):
        if expert:
            chosen = values[f"blocks.{expert[1]}.mlp.hook_expert_indices"][row, position].tolist()
            active[row, position] = real[row, position] and int(expert[2]) in chosen
        elif source:
            column = int(source[1])
            active[row, position] = column <= position and real[row, column] and real[row, position]
        else:
            active[row, position] = real[row, position]
    return active


# --- scores and norms ---------------------------------------------------------------------------------------


def scaled(hf_model: Any, values: Values, receiver: int, vectors: np.ndarray) -> np.ndarray:
    """Vectors `[batch, pos, d_model]` over the scale of the whole stream there, times the norm's gain."""
    gain = double(hf_model.model.layers[receiver].post_attention_layernorm.weight)
    stream = double(values[f"blocks.{receiver}.hook_resid_mid"])
    out = np.zeros(vectors.shape)
    for row, position in np.ndindex(*vectors.shape[:2]):
        scale = np.sqrt(np.mean(stream[row, position] ** 2) + hf_model.config.rms_norm_eps)
        out[row, position] = gain * vectors[row, position] / scale
    return out


def readout_scores(hf_model: Any, values: Values, receiver: int, vectors: np.ndarray) -> np.ndarray:
    """`[batch, pos, expert]`, logits: vectors scaled as the norm does, then read by each row of the router."""
    router = double(hf_model.model.layers[receiver].mlp.gate.weight)
    read = scaled(hf_model, values, receiver, vectors)
    out = np.zeros((*vectors.shape[:2], len(router)))
    for row, position, expert in np.ndindex(*out.shape):
        out[row, position, expert] = np.dot(router[expert], read[row, position])
    return out


def dense_scores(hf_model: Any, values: Values, receiver: int, by: str = "layer") -> Senders:
    """What each sender adds to each expert's logit, `[batch, pos, expert]`, one number at a time."""
    vectors = sender_vectors(hf_model, values, receiver, by)
    return {name: readout_scores(hf_model, values, receiver, vector) for name, vector in vectors.items()}


def readout_logits(hf_model: Any, values: Values, receiver: int) -> np.ndarray:
    """`[batch, pos, expert]`: the router's logits, read in float64 from the stream that it was handed."""
    stream = double(values[f"blocks.{receiver}.hook_resid_mid"])
    return readout_scores(hf_model, values, receiver, stream)


def scaled_norms(hf_model: Any, values: Values, receiver: int, by: str = "layer") -> Senders:
    """`[batch, pos]` for each sender: the length of its vector as the router reads it, ||gain * z / scale||."""
    norms: Senders = {}
    for name, vectors in sender_vectors(hf_model, values, receiver, by).items():
        read = scaled(hf_model, values, receiver, vectors)
        norms[name] = np.zeros(read.shape[:2])
        for row, position in np.ndindex(*read.shape[:2]):
            norms[name][row, position] = np.sqrt(np.sum(read[row, position] ** 2))
    return norms


# --- one token's scores as a number -------------------------------------------------------------------------


def measures_of(scores: np.ndarray) -> tuple[float, float, float]:
    """Variance (squared logits), APS and ANS (logits) of one token's scores over experts."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    positive = sum(score for score in scores if score > 0) / len(scores)
    negative = sum(score for score in scores if score < 0) / len(scores)
    return variance, positive, negative


def experts_of(values: Values, receiver: int, experts: Experts, row: int, position: int) -> list[int] | slice:
    """Which experts of `receiver` are measured at a token: all, those listed, or those its router chose there."""
    if experts is None:
        return slice(None)
    if isinstance(experts, str):
        assert experts == "selected", experts
        return values[f"blocks.{receiver}.mlp.hook_expert_indices"][row, position].tolist()
    return list(experts)


def token_measures(scores: np.ndarray, values: Values, receiver: int, experts: Experts = None) -> Senders:
    """One sender's scores `[batch, pos, expert]` as measures `[batch, pos]`, over all or some of the experts.

    Returns:
        `variance` in squared logits, mean((S - mean S)^2); `aps`, mean(max(S, 0)), `ans`, mean(min(S, 0)), and
        `mean`, mean(S), in logits. Each mean is over the experts measured.
    """
    out = {measure: np.zeros(scores.shape[:2]) for measure in ("variance", "aps", "ans", "mean")}
    for row, position in np.ndindex(*scores.shape[:2]):
        measured = scores[row, position, experts_of(values, receiver, experts, row, position)]
        variance, positive, negative = measures_of(measured)
        out["variance"][row, position] = variance
        out["aps"][row, position] = positive
        out["ans"][row, position] = negative
        out["mean"][row, position] = sum(measured) / len(measured)
    return out


# --- means over a document's tokens -------------------------------------------------------------------------


def real_columns(mask: Tensor, row: int) -> list[int]:
    """The columns of a row that hold its document's real tokens, first to last."""
    return [column for column, is_real in enumerate(mask[row].bool().tolist()) if is_real]


def document_mean(
    per_token: np.ndarray,
    position: str,
    active: np.ndarray | None = None,
    *,
    active_only: bool = False,
    skip_bos: bool = False,
) -> np.ndarray | None:
    """The mean of one document without its padding, `[token, ...]` to `[...]`; None where no token is counted.

    Args:
        position: "lead" for the first token alone, "rest" for all others.
        active: at which tokens the sender is active; at the others its value counts as zero. None: at all.
        active_only: the mean is over the tokens where the sender is active, not over all of those tokens.
        skip_bos: the first token is left out altogether; the second is the lead, and those after it are the rest.
    """
    assert position in ("lead", "rest"), position
    tokens = list(range(len(per_token)))[1 if skip_bos else 0 :]
    tokens = tokens[:1] if position == "lead" else tokens[1:]
    if active is None:
        active = np.ones(len(per_token), dtype=bool)
    if active_only:
        tokens = [token for token in tokens if active[token]]
    if not tokens:
        return None
    total = sum(per_token[token] if active[token] else np.zeros_like(per_token[token]) for token in tokens)
    return np.asarray(total / len(tokens))


def document_rows(
    per_token: np.ndarray,
    mask: Tensor,
    position: str,
    active: np.ndarray | None = None,
    *,
    active_only: bool = False,
    skip_bos: bool = False,
) -> np.ndarray:
    """`[document, ...]`: `document_mean` of every row of `per_token` `[batch, pos, ...]`, which padding is left
    out of, wherever it stands. Documents without a token to count have no row. `active` is `[batch, pos]`."""
    rows = []
    for row in range(len(per_token)):
        columns = real_columns(mask, row)
        where = None if active is None else active[row, columns]
        mean = document_mean(
            per_token[row, columns], position, where, active_only=active_only, skip_bos=skip_bos
        )
        if mean is not None:
            rows.append(mean)
    return np.array(rows)


def document_means(scores: np.ndarray, mask: Tensor, position: str) -> np.ndarray:
    """`[document, measure]`: each document's mean variance, APS and ANS over its lead token, or over the rest of
    its real tokens. Documents without such a token have no row."""
    measures = np.array([[measures_of(token) for token in row] for row in scores])
    return document_rows(measures, mask, position)


# --- sources, over documents of unlike lengths and padding --------------------------------------------------


def by_source_position(senders: Mapping[str, np.ndarray], mask: Tensor, row: int) -> Senders:
    """One document without its padding, sources counted from its first real token.

    Args:
        senders: `by="source"`, `[batch, pos, ...]`: scores, or anything else there is one of per token.

    Returns:
        `A3H5<-p`, `[token, ...]`, for every p below the number of real tokens: a shorter document has no such
        sender. Zero at tokens before the source. Senders that are no sources are there as they were.
    """
    columns = real_columns(mask, row)
    out: Senders = {}
    for name, whole in senders.items():
        source = re.fullmatch(r"(A\d+H\d+)<-(\d+)", name)
        if source is None:
            out[name] = whole[row, columns]
        elif int(source[2]) in columns:
            place = columns.index(int(source[2]))
            out[f"{source[1]}<-{place}"] = moved = whole[row, columns].copy()
            moved[:place] = 0
    return out


def by_source_offset(senders: Mapping[str, np.ndarray], mask: Tensor, row: int) -> Senders:
    """One document without its padding, sources counted backwards from the query, over real tokens.

    Returns:
        `A3H5<-q-4`, `[token, ...]`: at each query what the head moves from the token 4 before it, for every offset
        from 0 (the query itself) to the number of real tokens less one: a shorter document has no such sender.
        Zero at queries with fewer predecessors. Senders that are no sources are there as they were.
    """
    by_position = by_source_position(senders, mask, row)
    n_tokens = len(real_columns(mask, row))
    out: Senders = {}
    for name, whole in by_position.items():
        head, _, source = name.partition("<-")
        if not source:
            out[name] = whole
        elif source == "0":  # the head's turn: its sources stand next to each other
            for offset in range(n_tokens):
                out[f"{head}<-q-{offset}"] = moved = np.zeros_like(whole)
                for query in range(offset, n_tokens):
                    moved[query] = by_position[f"{head}<-{query - offset}"][query]
    return out


def source_active(name: str, n_tokens: int) -> np.ndarray:
    """`[token]` bool, for the names that `by_source_position` and `by_source_offset` give: at which of a
    document's real tokens the query can see the source. All of them for senders that are no sources."""
    source = re.fullmatch(r"A\d+H\d+<-(q-)?(\d+)", name)
    first_query = int(source[2]) if source else 0
    return np.array([query >= first_query for query in range(n_tokens)])


def source_rows(
    documents: Sequence[Mapping[str, np.ndarray]],
    name: str,
    position: str,
    *,
    active_only: bool = False,
    skip_bos: bool = False,
) -> np.ndarray:
    """`[document, ...]`: `document_mean` of one sender over documents as `by_source_position` or
    `by_source_offset` give them. Documents that have no such sender, or no token to count, have no row."""
    rows = []
    for document in documents:
        if name in document:
            per_token = document[name]
            active = source_active(name, len(per_token))
            mean = document_mean(per_token, position, active, active_only=active_only, skip_bos=skip_bos)
            if mean is not None:
                rows.append(mean)
    return np.array(rows)

"""Slow, obvious implementations of the interventions: one row, one position, one slot at a time.

Each is a set of edits for `tests.reference.reference_run`, which walks through a transformers model and hands over
the value at every hook point. Nothing of moe_lens is imported here.

    logits, cache = ablated_run(hf_model, tokens, mask, 1, {(0, 4, 6)}, "reroute")
    logits, cache = forced_run(hf_model, tokens, mask, [6], places={(0, 4)})
    logits, cache = top_k_run(hf_model, tokens, mask, 2, layers=[1])

A *place* is a (row, column) of the batch; `places=None` is every real token. The shared experts are expert -1.
The functions named `..._edits` are for one layer; `together` joins several, at other layers or at the same one.
Where an intervention says who is chosen, a token with fewer experts than the widest of the batch has slots to
spare: they come last and have weight zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.reference import Cache, Edits, reference_cache, reference_run
from tests.reference_choice import Facts, applied, choose, facts_of, ranking
from tests.reference_routing import readout_scores, sender_vectors

SHARED = -1

Place = tuple[int, int]  # row, column
Removed = Collection[tuple[int, int, int]] | Callable[[int, int, list[int]], Iterable[int]]
Vectors = Mapping[tuple[int, int], Tensor]  # (layer, expert)
Others = Mapping[tuple[int, int, int], Tensor]  # (row, column, expert)
Decide = Callable[[int, int, Tensor, list[int]], tuple[list[int], Tensor] | None]
Run = tuple[Tensor, Cache]


# --- edits of several kinds, and of several layers ----------------------------------------------------------


def together(*several: Edits) -> dict[str, Callable[[Tensor], Tensor]]:
    """All edits in one; where two are at the same hook point the later acts on what the earlier returned.

    At one layer a change of the choice comes before an ablation, and there is one such change at most.
    """
    out: dict[str, Callable[[Tensor], Tensor]] = {}
    for edits in several:
        for name, edit in edits.items():
            out[name] = one_after_the_other(out[name], edit) if name in out else edit
    return out


def one_after_the_other(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda value: second(first(value))


def real_places(tokens: Tensor, mask: Tensor | None) -> list[Place]:
    """Every (row, column) that is not padding."""
    rows, columns = tokens.shape
    return [
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if mask is None or bool(mask[row, column])
    ]


# --- ablation -----------------------------------------------------------------------------------------------


def ablation_edits(
    layer: int,
    removed: Removed,
    facts: Facts,
    how: str,
    *,
    means: Vectors | None = None,
    others: Others | None = None,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Experts of one layer taken away at some places, as edits.

    Args:
        removed: triples (row, column, expert), or a function of a row, a column and the experts chosen there,
            heaviest first, in this very run, that says which are removed there. Where an expert is not
            chosen, there is nothing to remove.
        how: what becomes of it: "zero", its contribution is zero; "renormalize", that, and the other weights are
            scaled so that their sum is what it was; "reroute", it cannot be chosen, so another one is; "mean" and
            "resample", its output, before the weight, is `means[layer, expert]` or `others[row, column, expert]`.
            The shared experts (-1) have no weight and are not chosen: "zero", "mean" and "resample" only, of what
            they add, gate included.
    """
    at = f"blocks.{layer}.mlp."
    seen: Cache = {}

    def removed_among(row: int, column: int, chosen: list[int]) -> set[int]:
        if callable(removed):
            return set(removed(row, column, chosen))
        return {expert for r, c, expert in removed if (r, c) == (row, column)}

    def removed_here(row: int, column: int) -> set[int]:
        return removed_among(row, column, seen["indices"][row, column].tolist())

    def remember_choice(indices: Tensor) -> Tensor:
        seen["indices"] = indices
        return indices

    def replacement(row: int, column: int, expert: int, value: Tensor) -> Tensor:
        if how == "mean":
            assert means is not None
            return means[layer, expert].to(value)
        if how == "resample":
            assert others is not None
            return others[row, column, expert].to(value)
        return torch.zeros_like(value)

    def replace_slots(value: Tensor) -> Tensor:  # [b, p, k, d]
        for row, column, slot in every_index(seen["indices"]):
            expert = int(seen["indices"][row, column, slot])
            if expert in removed_here(row, column):
                value[row, column, slot] = replacement(row, column, expert, value[row, column, slot])
        return value

    def replace_shared(value: Tensor) -> Tensor:  # [b, p, d]
        for row, column in every_index(value[..., 0]):
            if SHARED in removed_here(row, column):
                assert how in ("zero", "mean", "resample"), f"{how} of the shared experts"
                value[row, column] = replacement(row, column, SHARED, value[row, column])
        return value

    def renormalize(weights: Tensor) -> Tensor:  # [b, p, k]
        for row, column in every_index(weights[..., 0]):
            gone = removed_here(row, column)
            chosen = seen["indices"][row, column].tolist()
            kept = [slot for slot, expert in enumerate(chosen) if expert not in gone]
            if len(kept) < len(chosen):
                before, rest = weights[row, column].sum(), weights[row, column, kept].sum()
                assert rest > 0, f"no expert is left to renormalize at row {row}, column {column}"
                weights[row, column] = torch.stack(
                    [
                        weight * before / rest if slot in kept else 0 * weight
                        for slot, weight in enumerate(weights[row, column])
                    ]
                )
        return weights

    def without(
        row: int, column: int, probabilities: Tensor, chosen: list[int]
    ) -> tuple[list[int], Tensor] | None:
        gone = removed_among(row, column, chosen)
        if not gone:
            return None
        assert SHARED not in gone, "reroute of the shared experts"
        experts = choose(probabilities, facts, excluded=gone)
        return experts, applied(probabilities, experts, facts)

    if how == "reroute":
        return choice_edits(layer, facts, without)
    edits: dict[str, Callable[[Tensor], Tensor]] = {at + "hook_expert_indices": remember_choice}
    if how == "renormalize":
        edits[at + "hook_routing_weights"] = renormalize
    elif how == "zero":
        edits[at + "hook_expert_contrib"] = replace_slots
    else:
        assert how in ("mean", "resample"), how
        edits[at + "hook_expert_out"] = replace_slots
    if facts.shared:
        edits[at + "hook_shared_out"] = replace_shared
    else:
        assert callable(removed) or all(expert != SHARED for *_, expert in removed), "no shared experts"
    return edits


@torch.no_grad()
def ablated_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    layer: int,
    removed: Removed,
    how: str,
    *,
    means: Vectors | None = None,
    others: Others | None = None,
) -> Run:
    """Logits and all values without some experts of one layer; see `ablation_edits`."""
    edits = ablation_edits(layer, removed, facts_of(hf_model), how, means=means, others=others)
    return reference_run(hf_model, tokens, mask, edits)


def every_index(tensor: Tensor) -> list[tuple[int, ...]]:
    """All index tuples of a tensor."""
    return [tuple(index) for index in torch.ones(tensor.shape).nonzero().tolist()]


# --- another choice -----------------------------------------------------------------------------------------


def choice_edits(layer: int, facts: Facts, decide: Decide) -> dict[str, Callable[[Tensor], Tensor]]:
    """Edits that let `decide` say who is chosen at one layer, and with which weights.

    `decide` is asked at every row and column, padding too. It is given the probabilities `[expert]` there and the
    experts chosen, heaviest first, both of this very run; None means that nothing changes.
    """
    at = f"blocks.{layer}.mlp."
    seen: Cache = {}
    decided: dict[tuple[int, ...], tuple[list[int], Tensor]] = {}

    def remember_probabilities(probabilities: Tensor) -> Tensor:
        seen["probabilities"] = probabilities
        return probabilities

    def indices(clean: Tensor) -> Tensor:
        for row, column in every_index(clean[..., 0]):
            probabilities, chosen = seen["probabilities"][row, column], clean[row, column].tolist()
            unchanged = chosen, applied(probabilities, chosen, facts)
            decided[row, column] = decide(row, column, probabilities, chosen) or unchanged
        width = max(len(experts) for experts, _ in decided.values())
        out = clean.new_zeros(*clean.shape[:2], width)
        for place, (experts, _) in decided.items():
            spare = [expert for expert in range(facts.n_experts) if expert not in experts]
            out[place] = torch.tensor((experts + spare)[:width])
        return out

    def weights(of_new_indices: Tensor) -> Tensor:
        out = torch.zeros_like(of_new_indices)
        for place, (experts, chosen_weights) in decided.items():
            out[place][: len(experts)] = chosen_weights
        return out

    return {
        at + "hook_expert_weights": remember_probabilities,
        at + "hook_expert_indices": indices,
        at + "hook_routing_weights": weights,
    }


@torch.no_grad()
def run_with_choice(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    layers: int | Iterable[int] | None,
    places: Collection[Place] | None,
    change: Callable[[Tensor, list[int]], tuple[list[int], Tensor]],
) -> Run:
    """A run in which `change` says who is chosen: at some layers (all with experts if None), at some places."""
    facts = facts_of(hf_model)
    layers = [layers] if isinstance(layers, int) else facts.moe_layers if layers is None else list(layers)
    places = set(real_places(tokens, mask) if places is None else places)

    def decide(row: int, column: int, probabilities: Tensor, chosen: list[int]) -> Any:
        return change(probabilities, chosen) if (row, column) in places else None

    return reference_run(
        hf_model, tokens, mask, together(*(choice_edits(layer, facts, decide) for layer in layers))
    )


def forced_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    experts: Iterable[int],
    layers: int | Iterable[int] | None = None,
    places: Collection[Place] | None = None,
) -> Run:
    """These experts are in the choice; the other slots go to the highest of the others, heaviest first."""
    facts, experts = facts_of(hf_model), list(experts)

    def change(probabilities: Tensor, chosen: list[int]) -> tuple[list[int], Tensor]:
        new = choose(probabilities, facts, forced=experts)
        return new, applied(probabilities, new, facts)

    return run_with_choice(hf_model, tokens, mask, layers, places, change)


def forbidden_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    experts: Iterable[int],
    layers: int | Iterable[int] | None = None,
    places: Collection[Place] | None = None,
) -> Run:
    """These experts cannot be chosen."""
    facts, experts = facts_of(hf_model), list(experts)

    def change(probabilities: Tensor, chosen: list[int]) -> tuple[list[int], Tensor]:
        new = choose(probabilities, facts, excluded=experts)
        return new, applied(probabilities, new, facts)

    return run_with_choice(hf_model, tokens, mask, layers, places, change)


def swapped_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    i: int,
    j: int,
    layers: int | Iterable[int] | None = None,
    places: Collection[Place] | None = None,
    *,
    weights: str = "own",
) -> Run:
    """The expert of rank i, one of those chosen, gives its slot to that of rank j, one of the others.

    Ranks are those of `ranking`, from 1; a negative j counts from the end, -1 is the last. The slots keep their
    order. `weights`: "own", the new expert's probability by the family's rule, which may change the other weights
    too; "slot", the weight of the one that left, the others unchanged.
    """
    facts = facts_of(hf_model)
    j = facts.n_experts + 1 + j if j < 0 else j
    assert 1 <= i <= facts.top_k < j <= facts.n_experts, f"ranks {i} and {j}"
    assert weights in ("own", "slot"), weights

    def change(probabilities: Tensor, chosen: list[int]) -> tuple[list[int], Tensor]:
        order = ranking(probabilities, chosen, facts)
        new = [order[j - 1] if expert == order[i - 1] else expert for expert in chosen]
        return new, applied(probabilities, new if weights == "own" else chosen, facts)

    return run_with_choice(hf_model, tokens, mask, layers, places, change)


def top_k_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    k: int,
    layers: int | Iterable[int] | None = None,
    places: Collection[Place] | None = None,
) -> Run:
    """k experts are chosen, with weights by the family's rule."""
    facts = facts_of(hf_model)

    def change(probabilities: Tensor, chosen: list[int]) -> tuple[list[int], Tensor]:
        new = choose(probabilities, facts, k=k)
        return new, applied(probabilities, new, facts)

    return run_with_choice(hf_model, tokens, mask, layers, places, change)


# --- a change that routers alone see ------------------------------------------------------------------------


def sender_of(hf_model: Any, cache: Cache, sender: str, receiver: int) -> Any:
    """`[b, p, d]` float64: what a sender, named as in `reference_routing.sender_vectors`, adds to the stream."""
    kinds = {
        r"embed|[AM]\d+": "layer",
        r"A\d+(H\d+|bias)": "head",
        r"A\d+H\d+<-\d+": "source",
        r"M\d+(E\d+|S)": "expert",
        r"M\d+(E\d+|S)?N\d+": "neuron",
    }
    (by,) = [by for pattern, by in kinds.items() if re.fullmatch(pattern, sender)]
    return sender_vectors(hf_model, cache, receiver, by)[sender]


def routers_after(hf_model: Any, sender: str) -> list[int]:
    """The layers whose routers see what the sender adds."""
    kind = re.match(r"embed|([AM])(\d+)", sender)
    assert kind, sender
    if kind[0] == "embed":
        return list(facts_of(hf_model).moe_layers)
    first = int(kind[2]) if kind[1] == "A" else int(kind[2]) + 1
    return [layer for layer in facts_of(hf_model).moe_layers if layer >= first]


@torch.no_grad()
def router_only_run(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    sender: str,
    receivers: Iterable[int] | None = None,
    places: Collection[Place] | None = None,
    hold_outputs: bool = False,
) -> Run:
    """The sender's scores are taken off the logits of the receivers' routers (all after it, if None), at some places.

    The scale by which the norm before a router divides is that of the whole stream in this run. The sender's vector
    is that of a clean run, and of this run: all receivers come after the sender. `hold_outputs`: the receivers'
    layers still write what they write in a clean run, so that the stream stays as it was.
    """
    receivers = routers_after(hf_model, sender) if receivers is None else list(receivers)
    assert set(receivers) <= set(routers_after(hf_model, sender)), f"{sender} is not before {receivers}"
    places = real_places(tokens, mask) if places is None else places
    clean = reference_cache(hf_model, tokens, mask)
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for receiver in receivers:
        vectors = sender_of(hf_model, clean, sender, receiver)
        edits |= router_edits(hf_model, receiver, vectors, places)
        if hold_outputs:
            edits |= held(f"blocks.{receiver}.hook_mlp_out", clean)
    return reference_run(hf_model, tokens, mask, edits)


def router_edits(
    hf_model: Any, receiver: int, vectors: Any, places: Iterable[Place]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """At some places, the receiver's logits lose the scores of the vectors `[b, p, d]`."""
    stream_name = f"blocks.{receiver}.hook_resid_mid"
    seen: Cache = {}

    def remember_stream(stream: Tensor) -> Tensor:
        seen[stream_name] = stream
        return stream

    def subtract(logits: Tensor) -> Tensor:
        scores = readout_scores(hf_model, seen, receiver, vectors)
        for place in places:
            logits[place] = logits[place] - torch.from_numpy(scores[place]).to(logits)
        return logits

    return {stream_name: remember_stream, f"blocks.{receiver}.mlp.hook_router_logits": subtract}


def held(name: str, clean: Cache) -> dict[str, Callable[[Tensor], Tensor]]:
    """The value at a hook point is what it was."""
    return {name: lambda value: clean[name]}

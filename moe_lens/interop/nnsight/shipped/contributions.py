"""How much each sender moves each later router in one batch: what `moe_lens.routing.streaming` computes, in a trace.

When a component has run, its senders are read by all later routers, and measured; when a router's layer is reached, the
sum of the scores is held against the readout of the stream itself; when the last has been, the measures are divided by
the true scales and averaged over each document's tokens, and over documents. So that no value of a layer outlives it.
Over the experts that a router selects (`selected`), measures wait for the router, and the senders' values with them.

A *part* is one component's share: its senders' measures, not yet divided by scales. Only real tokens are in it: what
padding holds must not be read, for 0 times infinity would be.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from moe_lens.interop.nnsight.shipped.moments import document_moments
from moe_lens.interop.nnsight.shipped.values import read_values
from moe_lens.interop.nnsight.shipped.weights import bias_of, gain_of, matrix_of, readout_of

LEFT_OUT, LEAD, REST = 1, 2, 3
"""What a token counts as; padding is 0."""

SCALE_POWERS = (2, 1, 1, 1, 1)
"""With which power of 1/scale each measure goes: variance, aps, ans, mean, norm."""

HALF = (torch.bfloat16, torch.float16)


def measure_batch(
    lm: Any, facts: dict[str, Any], asked: dict[str, Any], shape: list[int], classes: Tensor
) -> dict[str, Any]:
    """Moments over the documents of one batch.

    Args:
        lm: the model's envoy.
        facts: of the model.
        asked: `receivers`, layers; `experts`, a list of those measured over or None; `selected`, whether over those
            that the receiver selects; `groups`, for each granularity a dict from component to
            `[kind, n_senders, first]`: what it divides into, and the place of the first receiver that it reaches.
        shape: batch and positions.
        classes: what each token counts as, `[batch, pos]`.

    Returns:
        `moments`, by `component/kind/position/population` (`active` only where it is not `all`); of `rounding` the
        kind is the granularity. `documents` and `tokens`, how many have or are lead and rest. `errors`, the largest
        miss of a sum of scores, and `ratios`, the largest rounding over its bound, by granularity. `difference`, the
        largest between exact and model's logits. `broken`, the first layer whose scores are not finite, or -1. `dtype`,
        the embedding's, where it ran.
    """
    receivers = asked["receivers"]
    wanted = "hook_embed"
    embed = read_values(lm, facts, [wanted], shape)[wanted]
    found = begun(lm, asked, classes, embed)
    component_ran(found, asked, "embed", {wanted: at_tokens(embed, found)}, None, None)
    for layer in range(receivers[-1] + 1):
        prefix = f"blocks.{layer}."
        values = read_values(lm, facts, points_of(layer, facts, asked), shape)
        values = {name.removeprefix(prefix): at_tokens(value, found) for name, value in values.items()}
        weight, bias, z = None, None, values.get("attn.hook_z")
        if z is not None:
            projection = lm.model.layers[layer].self_attn.o_proj
            weight, bias = matrix_of(projection, z), bias_of(projection, z)
        component_ran(found, asked, f"A{layer}", values, weight, bias)
        if layer in receivers:
            receiver_ran(found, asked, receivers.index(layer), values)
        if layer < receivers[-1]:
            component_ran(found, asked, f"M{layer}", values, None, None)
    return batch_result(found, asked)


def points_of(layer: int, facts: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The hook points of a layer that are read."""
    points = {"hook_attn_out"}
    kinds = {
        groups[component][0]
        for groups in asked["groups"].values()
        for component in (f"A{layer}", f"M{layer}")
        if component in groups
    }
    if "heads" in kinds:
        points.add("attn.hook_z")
    if "experts" in kinds:
        points |= {"mlp.hook_expert_indices", "mlp.hook_expert_contrib"}
        if facts["shared"] is not None:
            points.add("mlp.hook_shared_out")
    if layer in asked["receivers"]:
        points |= {"hook_resid_mid", "ln2.hook_scale", "mlp.hook_router_logits"}
        if asked["selected"]:
            points.add("mlp.hook_expert_indices")
    if layer < asked["receivers"][-1]:
        points.add("hook_mlp_out")
    return [f"blocks.{layer}.{point}" for point in points]


def begun(lm: Any, asked: dict[str, Any], classes: Tensor, embed: Tensor) -> dict[str, Any]:
    """What a batch has gathered before anything has run. All of it is on the embedding's device."""
    device = embed.device
    classes = classes.to(device)
    real = classes.flatten().nonzero()[:, 0]
    rows, gains = [], []
    for receiver in asked["receivers"]:
        layer = lm.model.layers[receiver]
        row = readout_of(layer, embed)
        rows.append(row if asked["experts"] is None else row[asked["experts"]])
        gains.append(gain_of(layer.post_attention_layernorm, embed))
    return {
        "real": real,
        "classes": classes.flatten()[real],
        "documents": real // classes.shape[1],
        "n_documents": classes.shape[0],
        "rows": rows,
        "squared_gains": torch.stack(gains).square().T,
        "parts": {},
        "sums": {
            by: [torch.zeros(len(real), len(rows[0]), device=device) for _ in rows] for by in asked["groups"]
        },
        "dtype": str(embed.dtype).removeprefix("torch."),
        "half": embed.dtype if embed.dtype in HALF else None,
        "streams": {},
        "roundings": {},
        "scales": [],
        "errors": {by: [] for by in asked["groups"]},
        "ratios": {by: [] for by in asked["groups"]},
        "differences": [],
        "finite": [],
    }


def at_tokens(value: Tensor, found: dict[str, Any]) -> Tensor:
    """A hook value `[batch, pos, ...]` at the real tokens, `[token, ...]`."""
    return value.flatten(0, 1)[found["real"].to(value.device)].to(found["real"].device)


# ---- senders ----


def component_ran(
    found: dict[str, Any],
    asked: dict[str, Any],
    component: str,
    values: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Read a component's senders, at each granularity, with the readouts of all later receivers.

    Args:
        values: the hook values of its layer.
        weight, bias: of attention's output, in float32, where heads are read.
    """
    device = found["real"].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        whole = values[WRITTEN_AT[component[0]]]
        if component == "A0" and found["half"] is None:
            # Under autocast a stream in float32 is written to in half precision.
            found["half"] = whole.dtype if whole.dtype in HALF else None
            if found["half"] is None:
                found["streams"].clear()
        for by, groups in asked["groups"].items():
            kind, n_senders, first = groups[component]
            key = f"{component}/{kind}"
            if key not in found["parts"]:
                found["parts"][key] = {
                    **senders_of(kind, n_senders, values, whole, weight, bias),
                    "n_senders": n_senders,
                    "first": first,
                    "measures": [],
                    "by": [],
                }
                measure_lengths(found, found["parts"][key])
            part = found["parts"][key]
            part["by"].append(by)
            if component == "embed" or found["half"] is not None:
                follow_stream(found, by, part, whole)
        if not asked["selected"]:
            for key in dict.fromkeys(
                f"{component}/{groups[component][0]}" for groups in asked["groups"].values()
            ):
                for place in range(found["parts"][key]["first"], len(found["rows"])):
                    read_by(found, found["parts"][key], place, None)
                let_go(found["parts"][key])


WRITTEN_AT = {"e": "hook_embed", "A": "hook_attn_out", "M": "hook_mlp_out"}
"""Where a whole component is written, by the first letter of its name."""


def senders_of(
    kind: str,
    n_senders: int,
    values: dict[str, Tensor],
    whole: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> dict[str, Any]:
    """Who sends, `senders` `[token, slot]`, and what: `vectors` `[token, slot, d_model]`; or each head's `z`, with
    the heads' output weights and perhaps a bias, which is the last sender."""
    if kind == "heads":
        assert weight is not None
        z = values["attn.hook_z"]
        places = torch.arange(n_senders, device=z.device).expand(len(z), -1)
        weight = rearrange(weight, "d_model (head d) -> head d d_model", head=z.shape[1])
        return {"senders": places, "z": z, "weight": weight, "bias": bias}
    if kind == "experts":
        vectors, senders = values["mlp.hook_expert_contrib"], values["mlp.hook_expert_indices"]
        if "mlp.hook_shared_out" in values:
            vectors = torch.cat((vectors, values["mlp.hook_shared_out"][:, None]), dim=1)
            senders = torch.cat((senders, torch.full_like(senders[:, :1], n_senders - 1)), dim=1)
        return {"senders": senders, "vectors": vectors}
    return {
        "senders": torch.zeros(len(whole), 1, dtype=torch.long, device=whole.device),
        "vectors": whole[:, None],
    }


def let_go(part: dict[str, Any]) -> None:
    """Of everything that a part was measured from."""
    for name in ("vectors", "z", "weight", "bias", "lengths"):
        part.pop(name, None)


def measure_lengths(found: dict[str, Any], part: dict[str, Any]) -> None:
    """|| gain z || of every sender at every later receiver, `[token, slot, receiver]`; a head at a time, for all heads'
    vectors at once would be many times the stream."""
    squared_gains = found["squared_gains"][:, part["first"] :]
    if "z" not in part:
        slots = part["vectors"].unbind(dim=1)
        lengths = [(slot.float().square() @ squared_gains).sqrt() for slot in slots]
    else:
        lengths = []
        for head, weight in enumerate(part["weight"]):
            lengths.append(((part["z"][:, head].float() @ weight).square() @ squared_gains).sqrt())
        if part["bias"] is not None:
            lengths.append((part["bias"].square() @ squared_gains).sqrt().expand_as(lengths[0]))
    part["lengths"] = torch.stack(lengths, dim=1)


def read_by(found: dict[str, Any], part: dict[str, Any], place: int, chosen: Tensor | None) -> None:
    """Measure a part's senders at one receiver, and add up their scores.

    Args:
        chosen: the experts that the receiver selects, `[token, k]`, where measures are over them.
    """
    row, lengths = found["rows"][place], part["lengths"][..., place - part["first"]]
    folded = None
    if "z" in part:
        folded = einsum(part["weight"], row, "head d d_model, expert d_model -> head d expert")
    n_tokens, n_slots = lengths.shape
    # On a CPU about what a core's cache holds; on a GPU enough to keep it busy.
    step = max(1, (2**20 if row.device.type == "cpu" else 2**26) // (n_slots * len(row)))
    measures, sums = [], []
    for start in range(0, n_tokens, step):
        here = slice(start, start + step)
        if folded is None:
            scores = part["vectors"][here].float() @ row.T
        else:
            scores = einsum(
                part["z"][here].float(), folded, "token head d, head d expert -> token head expert"
            )
            if part["bias"] is not None:
                of_bias = (row @ part["bias"]).expand(len(scores), 1, -1)
                scores = torch.cat((scores, of_bias), dim=1)
        sums.append(scores.sum(dim=1))
        if chosen is not None:
            among = chosen[here, None].expand(-1, n_slots, -1)
            scores = scores.gather(-1, among)
        measures.append(measures_of(scores, lengths[here]))
    part["measures"].append(torch.cat(measures))
    summed = torch.cat(sums)
    for by in part["by"]:
        found["sums"][by][place] += summed


def measures_of(scores: Tensor, lengths: Tensor) -> Tensor:
    """variance, aps, ans, mean and norm over the last axis; see `moe_lens.routing.measures`."""
    mean = scores.mean(dim=-1)
    # Centred first: a shift that all experts share may be far larger than the spread.
    variance = (scores - mean[..., None]).square().mean(dim=-1)
    aps, ans = scores.clamp(min=0).mean(dim=-1), scores.clamp(max=0).mean(dim=-1)
    return torch.stack((variance, aps, ans, mean, lengths), dim=-1)


# ---- the stream, and what it rounds ----


def follow_stream(found: dict[str, Any], by: str, part: dict[str, Any], whole: Tensor) -> None:
    """Add a component's senders to their sum, and the sizes of all that was rounded to those so far; see
    `moe_lens.routing.rounding.StreamSum` and `moe_lens.routing.writes.written_by`."""
    written, inside = whole.float(), None
    if "z" in part:
        z, weight = part["z"].float(), part["weight"]
        vector = einsum(z, weight, "token head d, head d d_model -> token d_model")
        # z itself may have been rounded, and what was written was.
        sizes = einsum(z.abs(), weight.abs(), "token head d, head d d_model -> token d_model")
        inside = 2 * sizes + written.abs()
        written = vector if part["bias"] is None else vector + part["bias"]
    elif part["n_senders"] > 1:
        vectors = part["vectors"].float()
        inside = vectors.abs().sum(dim=1) + written.abs()
        written = vectors.sum(dim=1)
    if by not in found["streams"]:
        found["streams"][by] = {"total": written, "rounded": torch.zeros_like(written)}
        return
    stream = found["streams"][by]
    stream["total"] = stream["total"] + written
    stream["rounded"] = stream["rounded"] + stream["total"].abs()
    if inside is not None:
        stream["rounded"] = stream["rounded"] + inside


def rounding_part(found: dict[str, Any], by: str, stream: Tensor, place: int) -> dict[str, Any]:
    """The sender `rounding`, what the stream holds beyond the sum of the others, ready to be read by one receiver."""
    so_far = found["streams"][by]
    rounding = stream - so_far["total"]
    bound = torch.finfo(found["half"]).eps * (so_far["rounded"] + torch.finfo(torch.float16).tiny)
    found["ratios"][by].append((rounding.abs() / bound).max())
    part = found["roundings"].setdefault(by, {"n_senders": 1, "by": [by], "measures": []})
    part["senders"] = torch.zeros(len(stream), 1, dtype=torch.long, device=stream.device)
    part["vectors"] = rounding[:, None]
    # Another vector at every receiver, so it is read as if this were the first.
    part["first"] = place
    measure_lengths(found, part)
    part["lengths"] = part["lengths"][..., :1]
    return part


# ---- receivers ----


def receiver_ran(found: dict[str, Any], asked: dict[str, Any], place: int, values: dict[str, Tensor]) -> None:
    """Hold the senders' sum against the readout of the stream itself."""
    device, row = found["real"].device, found["rows"][place]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        stream, scale = values["hook_resid_mid"].float(), values["ln2.hook_scale"].float()
        chosen = values["mlp.hook_expert_indices"] if asked["selected"] else None
        if chosen is not None:
            for part in found["parts"].values():
                read_by(found, part, place, chosen)
        expected = (stream @ row.T) / scale
        finite = expected.isfinite().all()
        for by, sums in found["sums"].items():
            if found["half"] is not None:
                part = rounding_part(found, by, stream, place)
                read_by(found, part, place, chosen)
                let_go(part)
            got = sums[place] / scale
            found["errors"][by].append(torch.stack(((got - expected).abs().max(), expected.abs().max())))
            finite = finite & got.isfinite().all()
            sums[place] = None
        logits = values["mlp.hook_router_logits"].float()
        if asked["experts"] is not None:
            logits = logits[:, asked["experts"]]
        found["differences"].append((expected - logits).abs().max())
        found["finite"].append(finite)
        found["scales"].append(scale)


# ---- results ----


def batch_result(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """See `measure_batch`."""
    moments, documents, tokens = {}, {}, {}
    with torch.no_grad(), torch.autocast(found["real"].device.type, enabled=False):
        scales = torch.stack(found["scales"], dim=1)
        powers = torch.tensor(SCALE_POWERS, device=scales.device)
        roundings = {f"rounding/{by}": {**part, "first": 0} for by, part in found["roundings"].items()}
        parts = {**found["parts"], **roundings}
        for position, token_class in (("lead", LEAD), ("rest", REST)):
            member = (found["classes"] == token_class).nonzero()[:, 0]
            of_tokens = found["documents"][member]
            tokens[position], documents[position] = len(member), len(of_tokens.unique())
            for key, part in parts.items():
                measures = torch.stack([of_one[member] for of_one in part["measures"]], dim=2)
                measures = measures / scales[member, part["first"] :][:, None] ** powers
                for population in populations_of(key):
                    found_moments = document_moments(
                        measures,
                        part["senders"][member],
                        part["n_senders"],
                        of_tokens,
                        found["n_documents"],
                        population == "active",
                    )
                    moments[f"{key}/{position}/{population}"] = {
                        name: value.cpu() for name, value in found_moments.items()
                    }
        broken = [
            receiver
            for receiver, finite in zip(
                asked["receivers"], torch.stack(found["finite"]).tolist(), strict=True
            )
            if not finite
        ]
        return {
            "moments": moments,
            "documents": documents,
            "tokens": tokens,
            "errors": {by: worst_error(pairs) for by, pairs in found["errors"].items()},
            "ratios": {by: float(torch.stack(r).max()) for by, r in found["ratios"].items() if r},
            "difference": float(torch.stack(found["differences"]).max()),
            "broken": broken[0] if broken else -1,
            "dtype": found["dtype"],
        }


def populations_of(key: str) -> list[str]:
    """Over which tokens a part's means are taken: all; and those where a sender is active, if that is not always."""
    return ["all", "active"] if key.endswith("/experts") else ["all"]


def worst_error(pairs: list[Tensor]) -> float:
    """The largest of max |got - wanted| / max |wanted|; infinite where there was nothing wanted and something got."""
    worst = 0.0
    for error, size in torch.stack(pairs).tolist():
        worst = max(worst, error / size if size else (float("inf") if error else 0.0))
    return worst

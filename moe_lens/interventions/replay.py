"""Exact single-token suffix replay: what a change at one token does to the loss at that token.

    a change at (layer l, position t), the loss read at t:
        positions before t  cannot change, because attention is causal
        positions after t   do not matter, because nothing at t reads them
        layers up to l      did not change
    so only token t is recomputed, through the layers after l, attending to the clean keys and values of the positions
    before it and to its own new ones.

Every change at every position is one *branch*, and all of them go through a layer together, as `[pos, branch, d]`: the
blocks take positions for their batch axis and branches for their position axis, and `ReplayAttend` says what a branch
may see. Branches of several layers join as the layers are reached. A *null branch* changes nothing and runs the same
path; where it differs from the clean run, that is the rounding of other kernel shapes.

Source: the quantity is the functional importance of "From Observation to Intervention: A Causal Audit of Expert
Importance in Mixture-of-Experts Models" (arXiv:2606.10703), section 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.branches import Change
from moe_lens.interventions.clean_run import CleanRun, MoEValues, require_no_hooks
from moe_lens.interventions.cores import all_cores
from moe_lens.interventions.outcomes import Outcome, check_outcomes
from moe_lens.interventions.replay_attend import ReplayAttend
from moe_lens.interventions.replay_plan import HELP, ReplayPlan
from moe_lens.interventions.suffix import OfRows, Read, Suffix, joined
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.out_of_memory import InParts


@dataclass(frozen=True, eq=False)
class Branches:
    """What each branch of a replay changes at one MoE layer.

    Attributes:
        layer: the MoE layer.
        removed: for each branch, which slots (heaviest first) are changed; the same at every position, or with a
            position axis. `single_slots(k)` is one expert each, `heaviest_slots(k)` progressive removal.
        shared_removed: in which branches the shared experts are changed too; None is in none.
    """

    layer: int
    removed: Bool[Tensor, "branch k"] | Bool[Tensor, "pos branch k"]
    shared_removed: Bool[Tensor, " branch"] | None = None

    def __repr__(self) -> str:
        each = "" if self.removed.ndim == 2 else f" at each of {self.removed.shape[0]} positions"
        shared = (
            "" if self.shared_removed is None else f", {int(self.shared_removed.sum())} of the shared experts"
        )
        return f"<Branches: {self.n_branches} of layer {self.layer}{each}{shared}>"

    @property
    def n_branches(self) -> int:
        return self.removed.shape[-2]

    def to(self, device: torch.device) -> Branches:
        """The same on a device."""
        shared = None if self.shared_removed is None else self.shared_removed.to(device)
        return Branches(self.layer, self.removed.to(device), shared)

    def at(self, chosen: slice, n: int) -> Bool[Tensor, "n branch k"]:
        """The slots that are changed at a run of the replayed positions."""
        if self.removed.ndim == 3:
            return self.removed[chosen]
        return repeat(self.removed, "branch k -> n branch k", n=n)


@dataclass(frozen=True, eq=False)
class Replayed:
    """What came of every branch, in the order in which branches were given.

    Attributes:
        columns: the positions, as columns of the document.
        clean_loss: of the clean run, nats.
        outcomes: `"loss"` and those asked for; of each, one tensor for each of the `Branches`.
        gap_norm: ||y - y_changed||_2 of the changed layer's output.
        experts: the routed experts in the slots, heaviest first; of each `Branches`.
        null: the same outcomes of the null branch, which changes nothing; None where none ran.
    """

    columns: Int[Tensor, " n"]
    clean_loss: Float[Tensor, " n"]
    outcomes: dict[str, list[Float[Tensor, "n branch"]]]
    gap_norm: list[Float[Tensor, "n branch"]]
    experts: list[Int[Tensor, "n k"]]
    null: dict[str, list[Float[Tensor, " n"]]] | None

    def __repr__(self) -> str:
        branches = sum(loss.shape[1] for loss in self.loss)
        return (
            f"<Replayed: {branches} branches of {len(self.loss)} Branches at {len(self.columns)} positions; "
            f"{', '.join(self.outcomes)}>"
        )

    @property
    def loss(self) -> list[Float[Tensor, "n branch"]]:
        return self.outcomes["loss"]

    @property
    def delta_loss(self) -> list[Float[Tensor, "n branch"]]:
        """The change of the loss: against the null branch of the same path where one ran, else the clean run."""
        before = [self.clean_loss] * len(self.loss) if self.null is None else self.null["loss"]
        return [loss - base[:, None] for loss, base in zip(self.loss, before, strict=True)]


@torch.no_grad()
def replay(
    clean: CleanRun,
    branches: Branches | Sequence[Branches],
    *,
    rows: Int[Tensor, " n"] | None = None,
    change: Change | None = None,
    outcomes: Sequence[Outcome] = (),
    null_branch: bool = True,
    memory_budget: int = 2**30,
    on_layer: Callable[[MoEValues], None] | None = None,
) -> Replayed:
    """The exact loss at each token after each change at that token.

    Args:
        clean: the document (`CleanRun.of(model, tokens)`).
        branches: what is changed, at one MoE layer each; one or any number, in any order.
        rows: at which tokens, as places among the document's real ones; None is all that have a next token.
        change: how the removed slots are changed; None is `Change("zero")`.
        outcomes: what is read beside the loss: `"kl"`, or `LogitDifference`s.
        null_branch: run a branch that changes nothing beside those of each layer.
        memory_budget: bytes that the branches may take at once, on all cores together. It divides the work,
            and changes no number but by the rounding of other kernel shapes. Where memory runs out all the same,
            fewer rows are taken at once, which is said in the log (`moe_lens.out_of_memory`).
        on_layer: is handed what each layer did in the clean run, for whoever wants more of it than comes back; twice
            where memory ran out meanwhile.

    Raises:
        ValueError: a streamed model (see `replay_documents`), one with hooks, a layer without experts, a mask of
            another shape, a token without a next one, every slot removed where the rest would take over
            (`renormalize`), or too many for `reroute`; two outcomes of one name.
        FloatingPointError: an outcome is NaN or infinite; its position, layer and branch are named.
        NotEnoughMemory: the branches of one layer at one token do not fit.
    """
    change = change or Change()
    branches = [branches] if isinstance(branches, Branches) else list(branches)
    rows = clean.has_next.nonzero()[:, 0] if rows is None else rows
    device = clean.tokens.device
    rows, branches = rows.to(device), [of.to(device) for of in branches]
    if isinstance(clean.model, StreamedMoE):
        raise ValueError(
            "the layers of a streamed model come one at a time: replay_documents(model, documents) replays there"
        )
    check_replay(clean, branches, rows, change, outcomes)
    parts: list[list[Read]] = [[] for _ in branches]
    nulls: list[list[Read]] = [[] for _ in branches]
    experts: dict[int, Tensor] = {}
    with all_cores(rows.device) as cores:
        budget = max(1, memory_budget // cores.n)
        sizes = [(of.layer, of.n_branches) for of in branches]
        plan = ReplayPlan.make(clean.model, sizes, len(rows), len(clean.tokens), budget, null_branch, cores.n)
        of_groups = InParts("layers' branches of a replay", HELP)
        of_rows = InParts("rows of a replay", HELP, plan.rows_at_once)
        at_work: deque[tuple[list[int], list[Future[list[OfRows]]]]] = deque()

        def take_oldest() -> None:
            group, futures = at_work.popleft()
            for reads, of_nulls in (of_some for future in futures for of_some in future.result()):
                for i, read in zip(group, reads, strict=True):
                    parts[i].append(read)
                for i, null in zip(group, of_nulls or [], strict=False):
                    nulls[i].append(null)

        def begin(group: list[int]) -> None:
            of_layer = {layer: clean.moe(layer) for layer in {branches[i].layer for i in group}}
            for layer, layer_values in of_layer.items():
                experts[layer] = layer_values.indices[rows]
                if on_layer is not None:
                    on_layer(layer_values)

            def run(chosen: slice) -> OfRows:
                suffix = _Suffix(clean, rows[chosen], change, of_layer)
                at_rows = [(branches[i], branches[i].at(chosen, len(rows[chosen]))) for i in group]
                return suffix.run(at_rows, outcomes, null_branch, budget)

            pieces = [slice(i, min(i + at_once, len(rows))) for i in range(0, len(rows), at_once)]
            at_work.append((group, [cores.submit(partial(of_rows.run, run, piece)) for piece in pieces]))

        at_once = plan.rows_at_once
        for group in plan.groups:
            # What the experts of two groups' layers put out is held at most, so that no core waits for the next.
            if len(at_work) == 2:
                take_oldest()
            of_groups.run(lambda part, group=group: begin(group[part]), len(group))
        while at_work:
            take_oldest()
    return assembled(clean, rows, branches, parts, nulls if null_branch else None, experts)


@dataclass
class _Suffix:
    """Branches at a few tokens, from the first changed layer to the logits, with all layers in memory."""

    clean: CleanRun
    rows: Int[Tensor, " n"]
    change: Change
    values: Mapping[int, MoEValues]

    def run(
        self,
        branches: Sequence[tuple[Branches, Bool[Tensor, "n branch k"]]],
        outcomes: Sequence[Outcome],
        null_branch: bool,
        memory_budget: int,
    ) -> OfRows:
        """What is read where all these branches end."""
        attend = ReplayAttend(self.clean, self.rows)
        suffix = Suffix(self.rows, self.change, branches, null_branch)
        streams: Float[Tensor, "n branch d_model"] | None = None
        for layer in range(suffix.first_layer, self.clean.model.cfg.n_layers):
            streams = suffix.step(self.clean, layer, streams, attend, self.values.get(layer))
        assert streams is not None
        return suffix.finish(self.clean, streams, outcomes, memory_budget)


def assembled(
    clean: CleanRun,
    rows: Int[Tensor, " n"],
    branches: Sequence[Branches],
    parts: Sequence[Sequence[Read]],
    nulls: Sequence[Sequence[Read]] | None,
    experts: Mapping[int, Int[Tensor, "n k"]],
) -> Replayed:
    """What came of a replay, of what was read of each `Branches` at runs of its rows.

    Args:
        clean, rows, branches: of the replay.
        parts: of each `Branches`, what was read, in the order of the rows.
        nulls: of the null branch beside each; None where none ran.
        experts: in the slots, at each layer that is changed.

    Raises:
        FloatingPointError: an outcome is NaN or infinite; its position, layer and branch are named.
    """
    whole = [joined(part) for part in parts]
    whole_nulls = None if nulls is None else [joined(part) for part in nulls]
    result = Replayed(
        columns=clean.columns[rows],
        clean_loss=clean.loss[rows],
        outcomes={name: [part.outcomes[name] for part in whole] for name in whole[0].outcomes},
        gap_norm=[part.gap_norm for part in whole],
        experts=[experts[of.layer] for of in branches],
        null=None
        if whole_nulls is None
        else {name: [n.outcomes[name][:, 0] for n in whole_nulls] for name in whole_nulls[0].outcomes},
    )
    _require_finite(result, branches)
    return result


# ---- checks ----


def check_replay(
    clean: CleanRun,
    branches: Sequence[Branches],
    rows: Int[Tensor, " n"],
    change: Change,
    outcomes: Sequence[Outcome],
) -> None:
    """Raises:
    ValueError: what is asked for makes no sense; see `replay`.
    """
    cfg = clean.model.cfg
    require_no_hooks(clean.model)
    if not branches:
        raise ValueError("there are no branches, so there is nothing to replay")
    if len(rows) == 0:
        raise ValueError("no token of this document has a next one, so there is no loss to read")
    if rows.ndim != 1 or int(rows.min()) < 0 or int(rows.max()) >= len(clean.tokens):
        raise ValueError(f"rows must be places among the document's {len(clean.tokens)} tokens, not {rows}")
    if not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError("rows must ascend, each once")
    if not bool(clean.has_next[rows].all()):
        column = int(clean.columns[rows[~clean.has_next[rows]][0]])
        raise ValueError(f"position {column} has no next token, so there is no loss to read there")
    change.check_model(clean.model, tuple({of.layer for of in branches}))
    for of in branches:
        if of.layer not in cfg.moe_layers:
            raise ValueError(f"layer {of.layer} has no experts; those that have: {list(cfg.moe_layers)}")
        shape = tuple(of.removed.shape)
        if shape[-1] != cfg.top_k or of.removed.ndim not in (2, 3) or shape[-2] == 0:
            raise ValueError(
                f"removed must be [branch, {cfg.top_k}] or [pos, branch, {cfg.top_k}], not {shape}"
            )
        if of.removed.dtype != torch.bool:
            raise ValueError(f"removed must be booleans, not {of.removed.dtype}")
        if of.removed.ndim == 3 and shape[0] != len(rows):
            raise ValueError(f"removed is of {shape[0]} positions, and {len(rows)} are replayed")
        most = int(of.removed.sum(dim=-1).max())
        if change.how == "renormalize" and most == cfg.top_k:
            raise ValueError(
                "renormalize needs a slot that stays: with all removed there is nothing to scale"
            )
        if change.how == "reroute" and cfg.n_experts - most < cfg.top_k:
            raise ValueError(
                f"reroute: {cfg.n_experts - most} experts remain to be chosen from, and {cfg.top_k} are wanted"
            )
        if of.shared_removed is not None:
            check_shared(clean.model, change)
            if tuple(of.shared_removed.shape) != (of.n_branches,):
                raise ValueError(
                    f"shared_removed must be [{of.n_branches}], one for each branch, not "
                    f"{tuple(of.shared_removed.shape)}"
                )
    check_outcomes(outcomes, cfg.d_vocab)


def check_shared(model: HookedMoE, change: Change) -> None:
    """Raises:
    ValueError: the model has no shared experts, or this cannot be done to them.
    """
    if model.cfg.shared is None:
        raise ValueError(f"{model.cfg.model_name} has no shared experts")
    if change.how in ("renormalize", "reroute"):
        raise ValueError(
            f"how={change.how!r} is about the routed experts' weights; shared experts take 'zero', 'mean' or 'resample'"
        )


def _require_finite(result: Replayed, branches: Sequence[Branches]) -> None:
    for name, of_nulls in (result.null or {}).items():
        for of, value in zip(branches, of_nulls, strict=True):
            broken = (~value.isfinite()).nonzero()
            if len(broken):
                row = int(broken[0, 0])
                raise FloatingPointError(
                    f"{name} is {float(value[row])} at position {int(result.columns[row])} in the null branch of layer "
                    f"{of.layer}, where nothing is changed"
                )
    for name, of_branches in result.outcomes.items():
        for i, (of, value) in enumerate(zip(branches, of_branches, strict=True)):
            broken = (~value.isfinite()).nonzero()
            if len(broken):
                row, branch = broken[0].tolist()
                removed = of.at(slice(row, row + 1), 1)[0, branch]
                names = [f"M{of.layer}E{expert}" for expert in result.experts[i][row, removed].tolist()]
                if of.shared_removed is not None and bool(of.shared_removed[branch]):
                    names.append(f"M{of.layer}S")
                raise FloatingPointError(
                    f"{name} is {float(value[row, branch])} at position {int(result.columns[row])} after the change of "
                    f"{', '.join(names) or 'nothing'} at layer {of.layer}"
                )

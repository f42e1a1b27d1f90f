"""Contributions over a corpus in shards: runs of batches that are measured apart, by any number of processes.

Each shard is measured from nothing and kept in a file; when all are there, they are merged in the order of the corpus,
and the whole takes their place. Which batches are a shard depends on the corpus and on what is measured alone, so the
result is the same, bit by bit on the CPU, however many processes there are, and wherever a run was stopped and gone on
with. It differs from that of a run in one piece by rounding in float64: documents are merged in another order.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.ranks import ALONE, SHARED_MARK, Ranks, became_visible
from moe_lens.routing.arguments import positive_integer
from moe_lens.routing.documents import position_classes, real_tokens
from moe_lens.routing.folder_lock import LOCK, FolderLock
from moe_lens.routing.provenance import TokenDigest, weights_fingerprint
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.runs import Corpus, Mask, Plan, Run, Tokens, joined_results
from moe_lens.routing.storage import read_arrays, sync_folder, write_atomically
from moe_lens.routing.streamed_runs import StreamedPlan, shapes_of

FORMAT = 1
AT_MOST = 64
"""Shards, unless told otherwise."""
AT_MOST_STREAMED = 8
"""And of a model whose layers are on disk: each shard reads them for itself."""
AT_MOST_BYTES = 64 * 2**30
"""That shards take on the disk, unless told otherwise."""

_SHARD = re.compile(r"batches-(\d{6,})-(\d{6,})\.(\d+)-of-(\d+)\.safetensors")
_UNFINISHED = re.compile(rf"\.{_SHARD.pattern}\.unfinished")


@dataclass(frozen=True)
class Shards:
    """Where shards are kept, and who works on them.

    Attributes:
        folder: a new or empty one, or that of the same run before, which is then gone on with. All ranks name the same.
        ranks: see `moe_lens.ranks`.
        number: how many there are to be. None: `AT_MOST` (`AT_MOST_STREAMED` of a streamed model), fewer where there
            are fewer batches or where they would take more than `AT_MOST_BYTES`. It changes the last bits.
    """

    folder: Path
    ranks: Ranks = ALONE
    number: int | None = None


@dataclass(frozen=True)
class _Piece:
    """What one rank does at a time.

    Attributes:
        chunk: which of the plan's chunks of receivers.
        first, end: the batches (one past the last).
    """

    chunk: int
    first: int
    end: int


class ShardedRun:
    """The passes of a plan over a corpus in shards.

    Args:
        settings, allow_incomplete, verbose: see `moe_lens.routing.runs.Run`.
    """

    def __init__(
        self,
        model: HookedMoE,
        corpus: Corpus,
        plan: Plan,
        settings: dict[str, Any],
        shards: Shards,
        allow_incomplete: bool,
        verbose: bool,
    ):
        self.model, self.corpus, self.plan, self.settings = model, corpus, plan, settings
        self.folder, self.ranks = Path(shards.folder).absolute(), shards.ranks
        self.allow_incomplete, self.verbose = allow_incomplete, verbose and self.ranks.first
        self.batches = list(corpus)
        self.bounds = _bounds(self.batches, self._number(shards.number), settings["left_out"])
        # As they come back from a file.
        self.identities: list[dict[str, Any]] = [
            json.loads(json.dumps(self._identity(chunk))) for chunk in plan.chunks
        ]

    def results(self) -> dict[str, RoutingContributions] | None:
        """At rank 0 the results over the whole corpus, by granularity; None at the others.

        Raises:
            ValueError: the ranks see different runs; a shard is of another run, or damaged; something else is in the
                folder.
            OSError: the folder is not the same for all ranks; the disk has no room for the shards.
            FolderInUse: another run is at work there.
        """
        ranks = self.ranks
        ranks.agree({"chunks": self.plan.chunks, **self.identities[0]})
        lock = self._opened() if ranks.first else None
        try:
            ranks.require_shared(self.folder)
            missing = [_Piece(*piece) for piece in ranks.of_first(self._missing() if ranks.first else None)]
            self._measure(missing)
            return self._whole() if ranks.first else None
        finally:
            if lock is not None:
                lock.release()

    # ---- what is a shard ----

    def _number(self, given: int | None) -> int:
        if given is not None:
            return min(positive_integer(given, "shards"), max(len(self.batches), 1))
        most = AT_MOST_STREAMED if isinstance(self.model, StreamedMoE) else AT_MOST
        return max(1, min(most, len(self.batches), AT_MOST_BYTES // max(self.plan.bytes_needed, 1)))

    def _identity(self, receivers: Sequence[int]) -> dict[str, Any]:
        """What must be the same for shards to be of one run."""
        cfg, digest, layout = self.model.cfg, TokenDigest(), hashlib.sha256()
        for tokens, mask in self.batches:
            digest.add(tokens, mask)
            layout.update(struct.pack("<2q", *tokens.shape))
            layout.update(real_tokens(tokens, mask).cpu().numpy().tobytes())
        return {
            "kind": "contributions",
            "model": cfg.model_name,
            "revision": cfg.revision,
            "dtype": str(cfg.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.model),
            "corpus": self.corpus.description,
            "fingerprint": digest.hexdigest(),
            "batches": layout.hexdigest(),
            "bounds": self.bounds,
            "receivers": receivers,
            **self.settings,
            "versions": {name: version(name) for name in ("moe-lens", "torch", "transformers")},
        }

    def _path(self, piece: _Piece) -> Path:
        chunk = f"{piece.chunk + 1}-of-{len(self.plan.chunks)}"
        return self.folder / f"batches-{piece.first:06d}-{piece.end:06d}.{chunk}.safetensors"

    def _pieces(self, chunk: int) -> list[_Piece]:
        return [_Piece(chunk, first, end) for first, end in self.bounds]

    def _all(self, chunk: int) -> _Piece:
        return _Piece(chunk, 0, len(self.batches))

    # ---- what is there ----

    def _opened(self) -> FolderLock:
        """The folder, for this run alone, without what a killed one left half written."""
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(self.folder.parent)!r} to keep shards in")
        self.folder.mkdir(exist_ok=True)
        for path in sorted(self.folder.iterdir()):
            if not (path.name == LOCK or _SHARD.fullmatch(path.name) or _is_left_over(path)):
                raise ValueError(
                    f"{str(self.folder)!r} holds {path.name!r}, which is no shard of contributions; name a folder that "
                    f"is new or empty"
                )
        lock = FolderLock(self.folder, "the folder of shards")
        for path in self.folder.iterdir():
            if _is_left_over(path):
                path.unlink()
        return lock

    def _missing(self) -> list[tuple[int, int, int]]:
        """What is still to be measured; what is there is checked. At rank 0."""
        chunks = range(len(self.plan.chunks))
        wanted = {self._path(piece): piece for chunk in chunks for piece in self._pieces(chunk)}
        whole = {self._path(self._all(chunk)): self._all(chunk) for chunk in chunks}
        there = [path for path in sorted(self.folder.iterdir()) if _SHARD.fullmatch(path.name)]
        for path in there:
            piece = (wanted | whole).get(path)
            _require_run(
                path, self.identities[0 if piece is None else piece.chunk], is_wanted=piece is not None
            )
        for path in there:
            _arrays(path)
        done = {whole[path].chunk for path in there if path in whole}
        missing = [piece for path, piece in wanted.items() if path not in there and piece.chunk not in done]
        n_bytes = self.plan.bytes_needed * len(missing) // (len(self.plan.chunks) or 1)
        free = shutil.disk_usage(self.folder).free
        if n_bytes > free:
            raise OSError(
                f"the shards take up to {n_bytes / 2**30:,.1f} GiB in {str(self.folder)!r}, where "
                f"{free / 2**30:,.1f} GiB are free; ask for fewer (--shards), or name a folder on another disk"
            )
        if self.verbose:
            print(self._plan(len(wanted), missing, n_bytes))
        return [(piece.chunk, piece.first, piece.end) for piece in missing]

    def _plan(self, n: int, missing: Sequence[_Piece], n_bytes: int) -> str:
        n_missing = len(missing)
        ranks = f"{self.ranks.n} process{'es' if self.ranks.n > 1 else ''}"
        lines = [
            f"shards: {n}, of which {n - n_missing} are there; {ranks}; they take up to "
            f"{n_bytes / 2**20:,.1f} MiB more in {self.folder} until they are merged"
        ]
        if n_missing < self.ranks.n:
            lines.append(
                f"{self.ranks.n - n_missing} of {ranks} have nothing to do: there can be as many shards as batches "
                f"({len(self.batches)}; --shards, --batch-size)"
            )
        n_read = 0
        for piece in missing:
            plan, corpus = self._run_of(piece)
            if isinstance(plan, StreamedPlan):
                n_read += plan.bytes_to_read(shapes_of(corpus) or [])
        if n_read:
            lines.append(
                f"each shard reads the layers for itself: {n_read / 2**20:,.1f} MiB from disk for all that are missing"
            )
        return "\n".join(lines)

    # ---- the run ----

    def _measure(self, missing: Sequence[_Piece]) -> None:
        """This rank's part of what is missing; returns when the others' is there too."""
        ranks, done = self.ranks, self.ranks.counter()
        runs = [self._run_of(piece) for piece in missing]
        total = sum(plan.n_steps(0, corpus, 0) or 0 for plan, corpus in runs)
        of_all = f"{self.plan.unit} of {ranks.n} processes" if ranks.n > 1 else self.plan.unit
        with tqdm(total=total, disable=not self.verbose, unit=of_all) as progress:

            def stepped(more: int = 1) -> None:
                progress.update(done(more) - progress.n)

            for piece in ranks.taking(missing):
                for by, result in (results := self._measured(piece, stepped)).items():
                    # A shard's own tokens are in its bounds; the whole's are what results are of.
                    provenance = {**result.provenance, "fingerprints": [self.identities[0]["fingerprint"]]}
                    results[by] = replace(result, provenance=provenance)
                self._write(piece, results)
            ranks.wait(meanwhile=lambda: stepped(0) if self.verbose else None)

    def _run_of(self, piece: _Piece) -> tuple[Plan, Corpus]:
        """A piece as a run of its own: its one pass, and its batches."""
        plan = replace(self.plan, chunks=[self.plan.chunks[piece.chunk]])
        return plan, Corpus(self.batches[piece.first : piece.end], True, self.corpus.description)

    def _measured(self, piece: _Piece, stepped: Callable[[], object]) -> dict[str, RoutingContributions]:
        plan, corpus = self._run_of(piece)
        return Run(
            self.model,
            corpus,
            plan,
            self.settings,
            state=None,
            save_every=0.0,
            allow_incomplete=self.allow_incomplete,
            verbose=False,
            stepped=stepped,
        ).results()

    def _write(self, piece: _Piece, results: dict[str, RoutingContributions]) -> None:
        arrays, facts = {}, {}
        for by, result in results.items():
            of_result, facts[by] = result.to_arrays()
            arrays |= {f"{by}/{name}": array for name, array in of_result.items()}
        run = self.identities[piece.chunk]
        write_atomically(self._path(piece), arrays, {"format": FORMAT, "run": run, "results": facts})
        sync_folder(self.folder)

    def _read(self, piece: _Piece) -> dict[str, RoutingContributions]:
        path = self._path(piece)
        if not became_visible(path):
            raise ValueError(f"the shard {str(path)!r} is gone")
        _require_run(path, self.identities[piece.chunk])
        arrays, facts = _arrays(path)
        return {
            by: RoutingContributions.from_arrays(
                {
                    name.removeprefix(f"{by}/"): array
                    for name, array in arrays.items()
                    if name.startswith(f"{by}/")
                },
                facts["results"][by],
                str(path),
            )
            for by in self.settings["by"]
        }

    def _whole(self) -> dict[str, RoutingContributions]:
        chunks = [self._merged(chunk) for chunk in range(len(self.plan.chunks))]
        return {by: joined_results([chunk.pop(by) for chunk in chunks]) for by in self.settings["by"]}

    def _merged(self, chunk: int) -> dict[str, RoutingContributions]:
        """A chunk's shards, merged in order; the file of the whole takes their place."""
        whole, pieces = self._all(chunk), self._pieces(chunk)
        if self._path(whole).exists():
            merged = self._read(whole)
        else:
            merged = self._read(pieces[0])
            for piece in pieces[1:]:
                other = self._read(piece)
                merged = {by: result.merged(other.pop(by)) for by, result in merged.items()}
            self._write(whole, merged)
        for piece in pieces:
            if piece != whole:
                self._path(piece).unlink(missing_ok=True)
        return merged


def _bounds(
    batches: Sequence[tuple[Tokens, Mask | None]], number: int, left_out: int | None
) -> list[tuple[int, int]]:
    """First batch and one past the last of each shard: `number` of them, as even as can be, but for those in which
    nothing is measured, because nothing but BOS is there, which join a neighbour."""
    with_lead = [
        bool(position_classes(tokens, real_tokens(tokens, mask), left_out)["lead"].any())
        for tokens, mask in batches
    ]
    if not any(with_lead):
        raise ValueError("there were no batches, so there is nothing to average over")
    cuts = [len(batches) * i // number for i in range(number + 1)]
    ends: list[int] = []
    for first, end in pairwise(cuts):
        if any(with_lead[first:end]) and any(with_lead[:first]):
            ends.append(first)
    return list(zip([0, *ends], [*ends, len(batches)], strict=True))


def _is_left_over(path: Path) -> bool:
    """Whether a run that was killed left it."""
    return bool(_UNFINISHED.fullmatch(path.name)) or path.name.startswith(SHARED_MARK)


def _arrays(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raises:
    ValueError: they are not as they were written.
    """
    return read_arrays(path, "a shard of contributions", "Delete it, and it is measured again")


def _require_run(path: Path, identity: dict[str, Any], *, is_wanted: bool = True) -> None:
    """Raises:
    ValueError: a file is damaged, or no shard of this run: by what it says, or because none of its name is wanted.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        saved, its_format = facts["run"], facts["format"]
    except Exception as error:
        raise ValueError(
            f"the shard {str(path)!r} is damaged: {error!r}; delete it, and it is measured again"
        ) from error
    if its_format != FORMAT:
        raise ValueError(f"the shard {str(path)!r} is of format {its_format}, not {FORMAT}")
    difference = "" if is_wanted else "it divided the corpus otherwise"
    for name in [*identity, *(saved.keys() - identity.keys())]:
        if saved.get(name) != identity.get(name):
            was, now = reprlib.repr(saved.get(name)), reprlib.repr(identity.get(name))
            difference = f"{name} was {was} and is {now}"
            break
    if difference:
        raise ValueError(
            f"the shard {str(path)!r} is of another run: {difference}; name another folder, or delete this one"
        )

"""Running shipped functions in traces, here or on a server; what that sends, planned before and counted after.

An *analysis* is one or more jobs and what is made of their results; a *job* is a session of one or more traces, which a
server runs as one request. With `remote=` every analysis runs in one of four places:

    False     in this process; nnsight loads the weights if they are not there
    "local"   in this process, from what would be sent
    True      on the server that nnsight is configured for (`nnsight.CONFIG.API.HOST`)
    a URL     on that server
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
import nnsight
import torch
from huggingface_hub.errors import HFValidationError
from nnsight import CONFIG
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from tqdm import tqdm

from moe_lens.interop.nnsight.received import read_plain

# Sends the source of shipped functions with a request: a server does not have this package.
nnsight.register("moe_lens")

Remote = bool | str
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass of a job.

    Attributes:
        inputs: of the trace.
        arguments: of the function, in this pass.
    """

    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Job:
    """A session of forward passes, one request of a server.

    Attributes:
        function: a shipped one, called in every pass as `function(lm, **arguments, **step.arguments)`. The forward pass
            ends where it returns.
        arguments: in all passes.
        steps: the passes.
        result_bytes: about what comes back.
        fold: a shipped function that makes of the results so far, a list, a shorter list.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    steps: Sequence[Step]
    result_bytes: int
    fold: Callable[[list[Any]], list[Any]] | None = None


@dataclass(frozen=True, eq=False)
class Analysis(Generic[Result]):
    """What a function of this package would run, and what it makes of the results.

    Attributes:
        name: of the function.
        jobs: in order.
        finish: makes the result of the results of all jobs, a list for each.
        kept: results that there are already, by the number of the job: those jobs are not run.
        keep: called with a job's number and results, after each.
    """

    name: str
    jobs: Sequence[Job]
    finish: Callable[[list[list[Any]]], Result]
    kept: Mapping[int, list[Any]] = field(default_factory=dict)
    keep: Callable[[int, list[Any]], None] | None = None


@dataclass
class Traffic:
    """What went over the wire.

    Attributes:
        jobs: requests.
        bytes_up: of their payloads, as they were sent (compressed, where nnsight compresses).
        bytes_down: of their results, as they came. With `remote="local"` both are what would have been sent.
    """

    jobs: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def add(self, other: Traffic) -> None:
        """Count what another has counted."""
        self.jobs += other.jobs
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down

    def __str__(self) -> str:
        jobs = f"{self.jobs} job{'' if self.jobs == 1 else 's'}"
        return f"{jobs}, {self.bytes_up:,} bytes up, {self.bytes_down:,} bytes down"


_recorders: ContextVar[tuple[Traffic, ...]] = ContextVar("recorders", default=())


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what the analyses inside of this send and get, in this thread.

    with traffic() as sent:
        router_logit_attrs(lm, text, receiver=5, remote=True)
    print(sent)
    """
    counted = Traffic()
    token = _recorders.set((*_recorders.get(), counted))
    try:
        yield counted
    finally:
        _recorders.reset(token)


# ---- plans ----


@dataclass(frozen=True)
class Plan:
    """What an analysis would send, before it sends anything.

    Attributes:
        analysis: the function's name.
        model_key: under which a server knows the model; None where nothing is sent.
        jobs, passes: requests, and forward passes in them.
        bytes_up: of the payloads, which are made, and not sent; compression varies by a few bytes.
        bytes_down: about what comes back, before compression.
        host: the server asked; None where there is none.
        served: whether it runs the model now; None where no server is asked.
    """

    analysis: str
    model_key: str | None
    jobs: int
    passes: int
    bytes_up: int
    bytes_down: int
    host: str | None
    served: bool | None

    def __str__(self) -> str:
        where = "in this process" if self.host is None else f"at {self.host}"
        lines = [
            f"{self.analysis}: {self.jobs} job{'' if self.jobs == 1 else 's'} of {self.passes} forward "
            f"pass{'' if self.passes == 1 else 'es'}, {where}",
            f"  up {self.bytes_up:,} bytes, down about {self.bytes_down:,}",
        ]
        if self.host is not None:
            lines.append(f"  {self.model_key} is {'' if self.served else 'not '}being served")
        return "\n".join(lines)


def plan_of(lm: TransformersModel, analysis: Analysis[Any], remote: Remote) -> Plan:
    """See `moe_lens.interop.nnsight.plan`."""
    host = host_of(remote)
    left = [job for i, job in enumerate(analysis.jobs) if i not in analysis.kept]
    return Plan(
        analysis=analysis.name,
        model_key=None if host is None else model_key_of(lm),
        jobs=len(left),
        passes=sum(len(job.steps) for job in left),
        bytes_up=sum(payload_bytes(lm, job) for job in left) if remote else 0,
        bytes_down=sum(job.result_bytes for job in left) if remote else 0,
        host=host,
        served=None if host is None else is_served(lm, host),
    )


def host_of(remote: Remote) -> str | None:
    """The server's address; None where the analysis runs in this process.

    Raises:
        ValueError: `remote` is none of the four.
    """
    if remote is False or remote == "local":
        return None
    if remote is True:
        return CONFIG.API.HOST
    if isinstance(remote, str) and remote.startswith(("http://", "https://")):
        return remote.rstrip("/")
    raise ValueError(f"remote={remote!r} must be False, True, 'local' or the URL of a server")


def model_key_of(lm: TransformersModel) -> str:
    """The name under which a server knows a model.

    Raises:
        ValueError: it was made from a folder, of which no server knows.
    """
    try:
        return lm.to_model_key()
    except HFValidationError as error:
        raise ValueError(
            f"a server knows a model by its name on the Hugging Face hub, and this one was made from {lm.repo_id!r}; "
            f"remote=False or 'local' runs it here"
        ) from error


def is_served(lm: TransformersModel, host: str) -> bool:
    """Whether a server runs the model now.

    Raises:
        ConnectionError: the server does not answer.
    """
    try:
        response = httpx.get(f"{host}/status", timeout=30.0)
        response.raise_for_status()
        deployments = response.json().get("deployments", {})
    except (httpx.HTTPError, ValueError) as error:
        raise ConnectionError(f"{host} does not say which models it serves: {error}") from error
    key = model_key_of(lm)
    return any(
        (entry.get("model_key") or name) == key and entry.get("application_state") == "RUNNING"
        for name, entry in deployments.items()
    )


class _NotSent(Exception):
    """Carries a payload's size out of the session that made it."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


class _DryBackend(RemoteBackend):
    def __call__(self, tracer: Any = None) -> Any:
        raise _NotSent(len(self._serialize(tracer)))


def payload_bytes(lm: TransformersModel, job: Job) -> int:
    """The size of a job's request, which is made and not sent."""
    try:
        _session(lm, job, _DryBackend("", host="http://nowhere"))
    except _NotSent as sent:
        return sent.size
    raise AssertionError("a session ran that should only have been serialized")


# ---- runs ----


class _CountedRemote(RemoteBackend):
    """nnsight's own way to a server, counting bytes; what comes back is read as tensors and plain values only."""

    def __init__(self, model_key: str, counted: Traffic, **settings: Any):
        super().__init__(model_key, **settings)
        self.counted = counted

    def _serialize(self, tracer: Any) -> bytes:
        blob = super()._serialize(tracer)
        self.counted.bytes_up += len(blob)
        return blob

    @staticmethod
    def parse(message: str | bytes) -> ResponseModel:
        if isinstance(message, (bytes, bytearray)):
            return ResponseModel(**read_plain(bytes(message)))
        return ResponseModel.model_validate_json(message)

    def finalize(self, content: bytes) -> Any:
        self.counted.bytes_down += len(content)
        if self.compress:
            import zstandard

            content = zstandard.ZstdDecompressor().decompress(content)
        return read_plain(content)


class _CountedLocal(LocalSimulationBackend):
    def __init__(self, model: TransformersModel, counted: Traffic):
        super().__init__(model)
        self.counted = counted

    def __call__(self, tracer: Any) -> None:
        self.counted.bytes_up += len(RequestModel.serialize(tracer, CONFIG.API.COMPRESS))
        super().__call__(tracer)


def run(
    lm: TransformersModel, analysis: Analysis[Result], remote: Remote = False, *, verbose: bool = False
) -> Result:
    """Run an analysis.

    Args:
        remote: see this module.
        verbose: print the plan first, nnsight's own messages, and after each job what it sent and got; show a progress
            bar of the jobs.

    Raises:
        ValueError: `remote` is none of the four.
        RuntimeError: a trace of the same model is running, around the call or in another thread; an answer that is not
            what was asked for.
        ConnectionError: the server does not answer (verbose only: the plan asks it).
        nnsight's RemoteError: what failed there.
    """
    host = host_of(remote)
    if lm.interleaver.interleaving:
        raise RuntimeError(
            f"{analysis.name} makes traces of its own, and one of this model is running; call it before or after "
            f"`with lm.trace(...)`, not inside of it, and one at a time, whatever the threads"
        )
    if verbose:
        print(plan_of(lm, analysis, remote))
    results = []
    jobs = tqdm(analysis.jobs, desc=analysis.name, unit="job", disable=not verbose)
    for number, job in enumerate(jobs):
        if number in analysis.kept:
            results.append(analysis.kept[number])
            continue
        counted = Traffic(jobs=1 if remote else 0)
        if host is not None:
            backend = _CountedRemote(
                model_key_of(lm), counted, host=host, env=lm._remoteable_get_env(), verbose=verbose
            )
        else:
            backend = _CountedLocal(lm, counted) if remote == "local" else None
        try:
            # Shipped functions give no gradients; without them the model keeps nothing for a backward pass either.
            with torch.no_grad():
                results.append(_session(lm, job, backend))
            if remote == "local":
                counted.bytes_down += _stored_bytes(results[-1])
            n_wanted = len(job.steps) if job.fold is None else 1
            if len(results[-1]) != n_wanted:
                raise RuntimeError(
                    f"{analysis.name}: {n_wanted} results were asked for, and {len(results[-1])} came back"
                )
        finally:
            # What was sent for a job that failed was sent as well.
            for recorder in _recorders.get():
                recorder.add(counted)
        if verbose and remote:
            tqdm.write(f"{analysis.name}, job {number + 1} of {len(analysis.jobs)}: {counted}")
        if analysis.keep is not None:
            analysis.keep(number, results[-1])
    return analysis.finish(results)


def _session(lm: TransformersModel, job: Job, backend: Any) -> list[Any]:
    """The results of a job's passes. The body of the `with` is what travels; it names these few values alone."""
    function, fold = job.function, job.fold
    arguments = dict(job.arguments)
    steps = [(dict(step.inputs), dict(step.arguments)) for step in job.steps]
    with lm.session(backend=backend):
        results = nnsight.save([])
        for inputs, own in steps:
            with lm.trace(inputs) as tracer:
                results.append(function(lm, **arguments, **own))
                tracer.stop()
            if fold is not None:
                results[:] = fold(results)
    return results


def _stored_bytes(results: list[Any]) -> int:
    """The size of results as a server would send them."""
    buffer = io.BytesIO()
    torch.save({"results": results}, buffer)
    content = buffer.getvalue()
    if CONFIG.API.COMPRESS:
        import zstandard

        content = zstandard.ZstdCompressor().compress(content)
    return len(content)

"""The models that the server holds, and running one request's block against one of them."""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import zstandard
from nnsight.intervention.serialization import UnknownPersistentIdError
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from nnsight.tracing.util import clean_traceback, filter_traceback

from .weightless import without_weights

CLASS = "nnsight.modeling.transformers.TransformersModel"
TASK = "text-generation"
HALVES = (torch.float16, torch.bfloat16)


class RequestError(Exception):
    """A request that cannot be run: reported as a sentence, where an error in the block is a traceback."""


@dataclass
class Held:
    """One model, as a server holds it, under the name of a repository of the Hugging Face Hub."""

    repo_id: str
    dtype: torch.dtype
    model: Any

    @property
    def model_key(self) -> str:
        """What a client of this model sends: see `TransformersModel._remoteable_model_key`."""
        return f"{CLASS}:{json.dumps({'repo_id': self.repo_id, 'revision': None, 'task': TASK})}"


def hold(repo_id: str, directory: str, dtype: str) -> Held:
    """Load a checkpoint as an NDIF server does: from its key, in one dtype, no parameter wanting a gradient."""
    suffix = json.dumps({"repo_id": directory, "revision": None, "task": TASK})
    resolved = getattr(torch, dtype)
    model = Remotable.from_model_key(f"{CLASS}:{suffix}", dispatch=True, dtype=resolved)
    model._module.requires_grad_(False)
    return Held(repo_id, resolved, model)


@contextlib.contextmanager
def sources_of_one_request() -> Iterator[None]:
    """Forget afterwards what a request put into the process's caches of source.

    A block's source is put under its client's file name, and blocks are kept by file and line: a later request from
    the same line would run the older block, or fail to find its own.
    """
    caches: list[dict[Any, Any]] = [linecache.cache, SOURCES, BLOCKS]
    before = [dict(cache) for cache in caches]
    try:
        yield
    finally:
        for cache, contents in zip(caches, before, strict=True):
            cache.clear()
            cache.update(contents)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """What an NDIF server runs a block under: the model's dtype, if that is a half-precision one.

    There on CUDA, here on the CPU; without the cache, because the region is the whole request.
    """
    return torch.autocast(
        "cpu", dtype=dtype if dtype in HALVES else None, enabled=dtype in HALVES, cache_enabled=False
    )


def rebuild(held: Held, payload: bytes, compress: bool) -> Any:
    """The tracer that the client sent, bound to the model that is held.

    Raises:
        RequestError: the payload cannot be read here: it asks for a module, or a part of the model, that is not there.
    """
    try:
        return RequestModel.deserialize(
            payload, held.model._remoteable_persistent_objects(), compress=compress
        )
    except UnknownPersistentIdError as error:
        raise RequestError(
            "The model architecture on this server doesn't match the one your code was traced against: "
            f"it has no {error}."
        ) from error
    except Exception as error:
        raise RequestError(
            f"Your request payload could not be read ({type(error).__name__}: {error})."
        ) from error


def run(held: Held, request: RequestModel, payload: bytes, trusted: bool) -> bytes:
    """Run a request's block, and give the values it saved as the client reads them.

    A block that is not `trusted` sees no weights: see `without_weights`.

    Raises:
        RequestError: see `rebuild`.
        Exception: whatever the block raises.
    """
    try:
        held.model._remoteable_set_env(request.env)
        tracer = rebuild(held, payload, request.compress)
        with autocast(held.dtype), contextlib.nullcontext() if trusted else without_weights(held.model):
            inc()
            try:
                tracer.execute(tracer.info.code)
                marked = _saves()
                saved = {n: v for n, v in tracer.info.frame.f_locals.items() if id(v) in marked}
            finally:
                dec()
        file = io.BytesIO()
        torch.save(saved, file)
    finally:
        held.model.interleaver.cancel()
    result = file.getvalue()
    return zstandard.ZstdCompressor(level=3).compress(result) if request.compress else result


def describe(error: BaseException) -> str:
    """What the client is told: a sentence, or the traceback, without the frames of nnsight and of the server."""
    if isinstance(error, RequestError):
        return str(error)
    own = os.path.dirname(__file__)
    frames = filter_traceback(
        clean_traceback(error.__traceback__), lambda frame: not frame.f_code.co_filename.startswith(own)
    )
    return "".join(traceback.format_exception(type(error), error, frames))

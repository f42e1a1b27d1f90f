"""Jobs: what is known of each, its status updates to the client, its printed text, its limit of time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from .models import Held, describe, run, sources_of_one_request


@dataclass
class Job:
    """One request. What is counted here is offered at `/stand-in/jobs`."""

    request: RequestModel
    payload: bytes
    body_bytes: int
    headers: dict[str, str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    latest: ResponseModel | None = None
    statuses: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    error: str | None = None
    update_bytes: int = 0
    result: bytes | None = None
    result_on_socket: bool = False
    downloaded_bytes: int = 0
    seconds: float | None = None

    def report(self) -> dict[str, Any]:
        """The job as JSON.

        `payload_bytes`: the blob of the request as it came, compressed if `compress`; `body_bytes`: the whole body of
        the request; `result_bytes`: the saved values as sent; `update_bytes`: all frames of status updates, with the
        result's if that came `on_socket`; `downloaded_bytes`: what was fetched by URL; `seconds`: of running.
        """
        return {
            "id": self.id,
            "model_key": self.request.model_key,
            "blocking": bool(self.request.session_id),
            "compress": self.request.compress,
            "env": self.request.env,
            "headers": self.headers,
            "payload_bytes": len(self.payload),
            "body_bytes": self.body_bytes,
            "result_bytes": None if self.result is None else len(self.result),
            "result_on_socket": self.result_on_socket,
            "update_bytes": self.update_bytes,
            "downloaded_bytes": self.downloaded_bytes,
            "statuses": self.statuses,
            "logs": self.logs,
            "error": self.error,
            "seconds": self.seconds,
        }


class Lines(io.TextIOBase):
    """A stream that hands on each whole line, and at the end what is left."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self.send = send
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.send(line)
        return len(text)

    def flush(self) -> None:
        if self.rest:
            self.send(self.rest)
            self.rest = ""


def interrupt(thread: int) -> None:
    """Raise SystemExit in a thread, as soon as it runs Python again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))


class Runner:
    """Runs jobs one after the other, and tells each job's client how it stands.

    `publish(session_id, frame)` sends a frame to the client that subscribed under `session_id`.
    """

    def __init__(
        self,
        held: dict[str, Held],
        publish: Callable[[str, str | bytes], None],
        url: Callable[[Job], str],
        seconds: float,
        largest_on_socket: int,
        trusted: bool,
    ) -> None:
        self.held = held
        self.publish = publish
        self.url = url
        self.seconds = seconds
        self.largest_on_socket = largest_on_socket
        self.trusted = trusted
        self.jobs: dict[str, Job] = {}
        self.waiting: asyncio.Queue[Job] = asyncio.Queue()

    def tell(self, job: Job, status: Status, description: str = "", data: Any = None) -> ResponseModel:
        """A status update: noted, and sent if the client listens. A result in `data` makes it a binary frame."""
        response = ResponseModel(id=job.id, status=status, description=description, data=data)
        if status == Status.LOG:
            job.logs.append(description)
        else:
            job.statuses.append(status.value)
            job.latest = response
        if job.request.session_id and status != Status.RECEIVED:
            frame = response.pickle() if isinstance(data, bytes) else response.model_dump_json()
            job.update_bytes += len(frame if isinstance(frame, bytes) else frame.encode())
            self.publish(job.request.session_id, frame)
        return response

    def fail(self, job: Job, message: str) -> None:
        job.error = message
        self.tell(job, Status.ERROR, message)

    async def forever(self) -> None:
        while True:
            job = await self.waiting.get()
            self.tell(job, Status.QUEUED, "Your job is number 1 in the queue.")
            held = self.held.get(job.request.model_key)
            if held is None:
                self.fail(job, f"Could not deploy this model. {job.request.model_key} is not served here.")
                continue
            self.tell(job, Status.DISPATCHED, "Your job has been sent to the model.")
            await self.run(job, held)

    async def run(self, job: Job, held: Held) -> None:
        """Run a job in a thread of its own, for so long as a job may take."""
        self.tell(job, Status.RUNNING, "Your job has started running.")
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[bytes | None, str | None]] = loop.create_future()

        def finish(result: bytes | None, error: str | None) -> None:
            if not done.done():
                done.set_result((result, error))

        def work() -> None:
            result, error = None, None
            with sources_of_one_request():
                try:
                    result = run(held, job.request, job.payload, self.trusted)
                except Exception as raised:
                    error = describe(raised)
                except SystemExit:
                    error = "The job was stopped."
            loop.call_soon_threadsafe(finish, result, error)

        def log(line: str) -> None:
            # Prints come from the job's thread; the sockets belong to the loop's.
            loop.call_soon_threadsafe(self.tell, job, Status.LOG, line)

        out, err = Lines(log), Lines(log)
        thread = threading.Thread(target=work, daemon=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            thread.start()
            try:
                result, error = await asyncio.wait_for(asyncio.shield(done), self.seconds)
            except TimeoutError:
                interrupt(thread.ident or 0)
                # The next job has the model for itself, unless this one is in a long call that is not Python's.
                await asyncio.wait({done}, timeout=10)
                result, error = None, f"Your job exceeded the execution timeout of {self.seconds}s."
            out.flush()
            err.flush()
        await asyncio.sleep(0)  # the last lines first
        job.seconds = time.perf_counter() - started
        if error is not None or result is None:
            self.fail(job, error or "The job gave no result.")
            return
        job.result = result
        job.result_on_socket = bool(job.request.session_id) and len(result) <= self.largest_on_socket
        self.tell(
            job,
            Status.COMPLETED,
            "Your job has been completed.",
            result if job.result_on_socket else self.url(job),
        )

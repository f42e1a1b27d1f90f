"""The endpoints of an NDIF server that nnsight's client asks for, and the stand-in's own."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from typing import Any

import pydantic
from nnsight.ndif import get_local_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status
from tornado import web, websocket

from .jobs import Job, Runner
from .models import Held, hold


class Service:
    """What the handlers share."""

    def __init__(self, api_key: str, **limits: Any) -> None:
        self.api_key = api_key
        self.url = ""
        self.sockets: dict[str, Subscribe] = {}
        self.held: dict[str, Held] = {}
        self.states: dict[str, str] = {}
        self.shown: list[str] = []
        self.environment = get_local_env()
        self.runner = Runner(self.held, self.publish, lambda job: f"{self.url}/results/{job.id}.pt", **limits)

    def publish(self, session_id: str, frame: str | bytes) -> None:
        if session_id in self.sockets:
            # The frames of one socket leave in the order of the writes; nobody needs to wait for them.
            self._writing = self.sockets[session_id].write_message(frame, binary=isinstance(frame, bytes))

    def add(self, repo_id: str, directory: str, dtype: str, state: str = "RUNNING") -> None:
        self.shown.append(os.path.realpath(directory))
        held = hold(repo_id, directory, dtype)
        self.states[held.model_key] = state
        self.held[held.model_key] = held

    def identity(self, key: str | None) -> None:
        """Refuse who has no key, or not the key.

        Raises:
            tornado.web.HTTPError: 401 without a key, 400 for what is no key, 403 for a key that is not known.
        """
        if not key:
            raise web.HTTPError(401, "An API key is required.")
        try:
            uuid.UUID(key)
        except ValueError as error:
            raise web.HTTPError(400, "The API key is malformed.") from error
        if key != self.api_key:
            raise web.HTTPError(403, "The API key is not known.")


class Handler(web.RequestHandler):
    def initialize(self, service: Service) -> None:
        self.service = service

    def write_error(self, status_code: int, **options: Any) -> None:
        error = options["exc_info"][1] if "exc_info" in options else None
        known = isinstance(error, web.HTTPError) and error.log_message
        self.finish({"detail": error.log_message if known else "Internal server error."})  # type: ignore[union-attr]


class Subscribe(websocket.WebSocketHandler):
    """A client that waits: it gets an id for its session, and then every update of the jobs sent under that id."""

    def initialize(self, service: Service) -> None:
        self.service = service
        self.session_id = uuid.uuid4().hex

    def open(self, *args: str, **options: str) -> None:
        self.service.sockets[self.session_id] = self
        self.write_message(json.dumps({"session_id": self.session_id}))

    def on_close(self) -> None:
        self.service.sockets.pop(self.session_id, None)


class Request(Handler):
    def post(self) -> None:
        self.service.identity(self.request.headers.get("ndif-api-key"))
        try:
            request = RequestModel.model_validate_json(self.get_body_argument("data"))
            [blob] = self.request.files["blob"]
        except (KeyError, ValueError, pydantic.ValidationError) as error:
            raise web.HTTPError(422, str(error).replace("%", "%%")) from error
        headers = {name.lower(): value for name, value in self.request.headers.get_all()}
        headers.pop("ndif-api-key")
        job = Job(request, blob["body"], len(self.request.body), headers)
        self.service.runner.jobs[job.id] = job
        received = self.service.runner.tell(
            job, Status.RECEIVED, "Your job has been received and is waiting to be queued."
        )
        self.service.runner.waiting.put_nowait(job)
        self.set_header("Content-Type", "application/json")
        self.finish(received.model_dump_json())


class Response(Handler):
    def get(self, job_id: str) -> None:
        job = self.service.runner.jobs.get(job_id)
        if job is None or job.latest is None or job.request.session_id:
            raise web.HTTPError(404, "No response for this id.")
        self.set_header("Content-Type", "application/json")
        self.finish(job.latest.model_dump_json())


class Result(Handler):
    """Saved values that are fetched by URL, in pieces; the length is said before."""

    async def get(self, job_id: str) -> None:
        job = self.service.runner.jobs.get(job_id)
        if job is None or job.result is None:
            raise web.HTTPError(404, "No result for this id.")
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Content-Length", str(len(job.result)))
        for start in range(0, len(job.result), 1 << 16):
            piece = job.result[start : start + (1 << 16)]
            self.write(piece)
            job.downloaded_bytes += len(piece)
            await self.flush()


class Deployments(Handler):
    def get(self) -> None:
        self.finish(
            {
                "deployments": {
                    f"{held.repo_id}:{number}": {
                        "model_key": held.model_key,
                        "repo_id": held.repo_id,
                        "revision": None,
                        "task": json.loads(held.model_key.partition(":")[2])["task"],
                        "trust_remote_code": False,
                        "deployment_level": "HOT",
                        "application_state": self.service.states[held.model_key],
                        "dtype": str(held.dtype).removeprefix("torch."),
                    }
                    for number, held in enumerate(self.service.held.values())
                }
            }
        )


class Environment(Handler):
    def get(self) -> None:
        self.finish(self.service.environment)


class WhoAmI(Handler):
    def get(self) -> None:
        known = self.request.headers.get("ndif-api-key") == self.service.api_key
        self.finish({"email": "tests@example.org" if known else None, "tags": []})


class Ping(Handler):
    def get(self) -> None:
        self.finish('"pong"')


class Jobs(Handler):
    """The stand-in's own: what every job sent and got, in the order of their coming."""

    def get(self) -> None:
        self.finish({"jobs": [job.report() for job in self.service.runner.jobs.values()]})


class Models(Handler):
    """The stand-in's own: serve one more model."""

    async def post(self) -> None:
        await asyncio.to_thread(self.service.add, **json.loads(self.request.body))
        self.finish({})


class Limits(Handler):
    """The stand-in's own: change what jobs may do; the answer is how it was."""

    def post(self) -> None:
        changes = json.loads(self.request.body)
        before = {name: getattr(self.service.runner, name) for name in changes}
        for name, value in changes.items():
            setattr(self.service.runner, name, value)
        self.finish(before)


def application(service: Service) -> web.Application:
    shared = {"service": service}
    return web.Application(
        [
            (r"/subscribe", Subscribe, shared),
            (r"/request", Request, shared),
            (r"/response/(\w+)", Response, shared),
            (r"/results/(\w+)\.pt", Result, shared),
            (r"/status", Deployments, shared),
            (r"/env", Environment, shared),
            (r"/whoami", WhoAmI, shared),
            (r"/ping", Ping, shared),
            (r"/stand-in/jobs", Jobs, shared),
            (r"/stand-in/models", Models, shared),
            (r"/stand-in/limits", Limits, shared),
        ],
        websocket_max_message_size=1 << 30,
        log_function=lambda handler: None,
    )

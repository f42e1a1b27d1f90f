"""Starting and stopping the stand-in, and being its client."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

API_KEY = "00000000-0000-4000-8000-000000000000"
OWNER = "moe-lens-tests"
# NDIF_MAX_SOCKET_RESULT_BYTES of a server as published: larger results are fetched by URL.
LARGEST_ON_SOCKET = 4 << 20

_START = "import runpy, sys; sys.path.append({!r}); runpy.run_module('stand_in', run_name='__main__', alter_sys=True)"


@dataclass
class Server:
    """A running stand-in. `url` is what nnsight calls the host; `directories` what is served, by repository name."""

    url: str
    directories: dict[str, Path] = field(default_factory=dict)

    def jobs(self) -> list[dict[str, Any]]:
        """What each job sent and got, oldest first: see `stand_in.jobs.Job.report`."""
        return httpx.get(f"{self.url}/stand-in/jobs").raise_for_status().json()["jobs"]

    def add(
        self, name: str, directory: Path, dtype: torch.dtype = torch.float32, state: str = "RUNNING"
    ) -> str:
        """Serve one more checkpoint, as the repository `moe-lens-tests/name`, whose id is returned."""
        repo_id = f"{OWNER}/{name}"
        model = dict(repo_id=repo_id, directory=str(directory), dtype=_name(dtype), state=state)
        httpx.post(f"{self.url}/stand-in/models", json=model, timeout=120).raise_for_status()
        self.directories[repo_id] = Path(directory)
        return repo_id

    @contextlib.contextmanager
    def limits(self, **changes: Any) -> Iterator[None]:
        """Other `seconds`, `largest_on_socket` or `trusted` than `serve` was given, for as long as this is open."""
        where = f"{self.url}/stand-in/limits"
        before = httpx.post(where, json=changes).raise_for_status().json()
        try:
            yield
        finally:
            httpx.post(where, json=before).raise_for_status()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _environment() -> dict[str, str]:
    """The process's environment: no path of ours, no setting of nnsight's, no network."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "NDIF_", "NNSIGHT_"))
    }
    return {**ours, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def serve(
    checkpoints: Mapping[str, Path] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 60.0,
    largest_on_socket: int = LARGEST_ON_SOCKET,
    trusted: bool = True,
) -> Iterator[Server]:
    """A server in a process of its own, on a free port of 127.0.0.1, that holds `checkpoints`.

    Args:
        checkpoints: directories of checkpoints by name; `name` is served as the repository `moe-lens-tests/name`.
        dtype: what their weights are held in.
        seconds: how long a job may run.
        largest_on_socket: the largest result, in bytes, that comes with the last update; others are fetched by URL.
        trusted: whether the key of `as_client_of` is one of those whose blocks run beside the weights. If not, a block
            that reads a parameter gets it on the meta device, without values, and no gradient flows through it.

    Raises:
        RuntimeError: the process ended before it served; the message ends with what it wrote to stderr.
    """
    named = {f"{OWNER}/{name}": Path(directory) for name, directory in (checkpoints or {}).items()}
    options = dict(
        models=[dict(repo_id=r, directory=str(d), dtype=_name(dtype)) for r, d in named.items()],
        hidden=[str(Path(__file__).parents[2]), os.getcwd(), tempfile.gettempdir()],
        api_key=API_KEY,
        seconds=seconds,
        largest_on_socket=largest_on_socket,
        trusted=trusted,
    )
    # -I: no PYTHONPATH, no current directory, no packages of the user's.
    command = [sys.executable, "-I", "-c", _START.format(str(Path(__file__).parent)), json.dumps(options)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(),
            cwd=tempfile.gettempdir(),
        )
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port.isdigit():
                process.wait(10)
                errors.seek(0)
                raise RuntimeError(f"The stand-in ended before it served:\n{errors.read()[-4000:]}")
            yield Server(f"http://127.0.0.1:{port}", named)
        finally:
            process.kill()
            process.communicate()


def client(directory: Path, **options: Any) -> Any:
    """A model as a client of a server has it: config and tokenizer, on the meta device, no weights.

    The tokenizer is given, because nnsight 0.8.1 does not find one for a meta model with transformers 5.23: the
    pipeline class that it asks which preprocessors it needs has become a name.
    """
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return TransformersModel(str(directory), task="text-generation", tokenizer=tokenizer, **options)


@contextlib.contextmanager
def as_client_of(server: Server, *, compress: bool = True) -> Iterator[None]:
    """Make nnsight a client of this server: `remote=True` goes there, with a key, and no text is shown of jobs.

    nnsight asks the Hub for a model's task, and how its repository is spelled, before it names the model to a server.
    The Hub is not asked here: a directory of a checkpoint counts as the repository that it is served as, and if it is
    not served, as one of `moe-lens-tests` that this server does not hold.
    """
    from huggingface_hub import HfApi
    from nnsight.modeling.huggingface import _ID_CACHE
    from nnsight.schema.config import CONFIG

    of_hub = HfApi.model_info

    def model_info(self: HfApi, repo_id: str, **options: Any) -> Any:
        served = {str(directory): name for name, directory in server.directories.items()}
        if not repo_id.startswith(f"{OWNER}/") and not Path(repo_id).is_dir():
            return of_hub(self, repo_id, **options)
        name = served.get(repo_id, f"{OWNER}/{Path(repo_id).name}")
        return SimpleNamespace(id=name, pipeline_tag="text-generation", library_name="transformers", tags=[])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HfApi, "model_info", model_info)
        patched.setattr(CONFIG.API, "HOST", server.url)
        patched.setattr(CONFIG.API, "APIKEY", API_KEY)
        patched.setattr(CONFIG.API, "COMPRESS", compress)
        patched.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
        patched.setattr("nnsight.ndif._REMOTE_ENV", None)
        known = dict(_ID_CACHE)
        _ID_CACHE.clear()
        try:
            yield
        finally:
            _ID_CACHE.clear()
            _ID_CACHE.update(known)

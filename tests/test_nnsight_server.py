"""The stand-in for an NDIF server: what nnsight's client gets from it, and that it lacks what a real one lacks."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight import CONFIG, TransformersModel, save
from nnsight.intervention.backends.remote import RemoteError
from nnsight.ndif import NdifStatus
from torch import Tensor

from tests.families import FAMILIES
from tests.nnsight_server import OWNER, Server, client, serve

TEXT = "The router sends every token"

Checkpoint = Callable[[str], Path]


def refused(pattern: str) -> Any:
    """The client raises its error for a job that failed, with a message that has `pattern`."""
    return pytest.raises(RemoteError, match=pattern)


@pytest.fixture
def lm(nnsight_server: Server, checkpoint: Checkpoint) -> Any:
    """A client's OLMoE: no weights."""
    return client(checkpoint("olmoe"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_gives_what_it_gives_locally(
    nnsight_server: Server, checkpoint: Checkpoint, family: str
) -> None:
    """From a client without weights, reads and the logits of an edited run, bit for bit."""
    lm, local = client(checkpoint(family)), TransformersModel(str(checkpoint(family)), dispatch=True)
    with lm.trace(TEXT, remote=True):
        theirs = lm.model.layers[0].output.clone().save()
        lm.model.layers[0].output[:] *= 2
        logits = lm.output.logits.save()
    with local.trace(TEXT):
        ours = local.model.layers[0].output.clone().save()
        local.model.layers[0].output[:] *= 2
        expected = local.output.logits.save()
    assert torch.equal(theirs, ours)
    assert torch.equal(logits, expected)
    assert next(iter(lm._module.parameters())).is_meta


def test_a_url_names_the_server(nnsight_server: Server, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`remote=url` goes there, whatever the configured host is."""
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    jobs = len(nnsight_server.jobs())
    with lm.trace(TEXT, remote=nnsight_server.url):
        hidden = lm.model.layers[0].output.save()
    assert hidden.shape[-1] == 64
    assert len(nnsight_server.jobs()) == jobs + 1


def test_several_traces_of_a_session_are_one_job(nnsight_server: Server, lm: Any) -> None:
    jobs = len(nnsight_server.jobs())
    with lm.session(remote=True):
        norms = save([])
        with lm.trace(TEXT):
            hidden = lm.model.layers[0].output
        for scale in (1.0, 2.0):
            with lm.trace(TEXT):
                lm.model.layers[0].output = scale * hidden
                norms.append(lm.model.layers[1].input.norm().item())
    assert norms[1] == pytest.approx(2 * norms[0])
    assert len(nnsight_server.jobs()) == jobs + 1


def test_jobs_that_are_not_waited_for(nnsight_server: Server, lm: Any) -> None:
    """`blocking=False`: the result is asked for, and comes by URL."""
    with lm.trace(TEXT, remote=True, blocking=False) as tracer:
        hidden = lm.model.layers[0].output.save()  # noqa: F841
    for _ in range(600):
        if (saved := tracer.backend()) is not None:
            break
    assert saved is not None
    assert saved["hidden"].shape[-1] == 64
    job = nnsight_server.jobs()[-1]
    assert not job["blocking"]
    assert job["downloaded_bytes"] == job["result_bytes"]


# What a server lacks


def test_what_cannot_be_imported_there(nnsight_server: Server, lm: Any) -> None:
    names = ["moe_lens", "tests", "jaxtyping", "transformer_lens", "pandas", "scipy", "plotly", "statsmodels"]
    with lm.trace(TEXT, remote=True):
        import importlib.util

        for name in [*names, "torch", "einops", "nnsight"]:
            print(name, importlib.util.find_spec(name) is not None)
        lm.output.logits.save()
    found = dict(line.split() for line in nnsight_server.jobs()[-1]["logs"])
    assert found == {
        **dict.fromkeys(names, "False"),
        "torch": "True",
        "einops": "True",
        "nnsight": "True",
    }
    with refused("ModuleNotFoundError: No module named 'moe_lens'"), lm.trace(TEXT, remote=True):
        import moe_lens

        print(moe_lens.__version__)
    assert not {"moe_lens", *names} & set(nnsight.compare().remote["packages"])


def test_files_of_the_client_are_not_there(lm: Any, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("text")
    for path in (__file__, str(tmp_path / "some.txt")):
        with refused(f"FileNotFoundError: .*{path}"), lm.trace(TEXT, remote=True):
            lm.output.logits.save()
            print(Path(path).read_text())


PACKAGE = """
import functools
import jaxtyping
from jaxtyping import Float
from torch import Tensor

FACTOR = 3


def scaled(hidden):
    return FACTOR * hidden


def annotated(hidden: Float[Tensor, "..."]):
    return hidden


def that_imports(hidden):
    import jaxtyping

    return hidden


def twice(function):
    @functools.wraps(function)
    def wrapper(hidden):
        return 2 * function(hidden)

    return wrapper


@twice
def decorated(hidden):
    return hidden
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An importable package of the client's, in a directory such as packages are installed in."""
    installed = tmp_path / "site-packages"
    (installed / "only_at_the_client").mkdir(parents=True)
    (installed / "only_at_the_client" / "__init__.py").write_text("")
    (installed / "only_at_the_client" / "functions.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(installed)
    import only_at_the_client.functions as functions  # type: ignore[import-not-found]

    yield functions
    for name in ("only_at_the_client", "only_at_the_client.functions"):
        sys.modules.pop(name, None)
        _PICKLE_BY_VALUE_MODULES.discard(name)


def through(lm: Any, function: Callable[[Tensor], Tensor], remote: bool | str) -> tuple[Tensor, Tensor]:
    """What `function` makes of a hidden state there, and the hidden state."""
    with lm.trace(TEXT, remote=remote):
        hidden = lm.model.layers[0].output.save()
        made = save(function(hidden))
    return made, hidden


def test_a_function_of_a_package_travels_only_when_registered(
    lm: Any, package: Any, checkpoint: Checkpoint
) -> None:
    """`remote="local"` passes either way, because the package can be imported there."""
    local = TransformersModel(str(checkpoint("olmoe")), dispatch=True)
    made, hidden = through(local, package.scaled, "local")
    assert torch.equal(made, 3 * hidden)
    with refused("payload could not be read .*'only_at_the_client'"):
        through(lm, package.scaled, True)
    nnsight.register("only_at_the_client")
    made, hidden = through(lm, package.scaled, True)
    assert torch.equal(made, 3 * hidden)


@pytest.mark.parametrize("name", ["annotated", "that_imports"])
def test_what_a_function_needs_and_the_server_lacks_is_named(lm: Any, package: Any, name: str) -> None:
    """An annotation that is an object travels with its function, an import is run with it."""
    nnsight.register("only_at_the_client")
    with refused("No module named 'jaxtyping'"):
        through(lm, getattr(package, name), True)


def test_a_decorator_is_lost(lm: Any, package: Any) -> None:
    """The source of a decorated function is that of the function inside: nothing says that the decorator went."""
    nnsight.register("only_at_the_client")
    made, hidden = through(lm, package.decorated, True)
    assert torch.equal(made, hidden)


# What a server says


def test_printed_text_and_states_come_back(nnsight_server: Server, lm: Any) -> None:
    with lm.trace(TEXT, remote=True):
        print("from the block")
        lm.output.logits.save()
    job = nnsight_server.jobs()[-1]
    assert job["logs"] == ["from the block"]
    assert job["statuses"] == ["RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED"]
    assert job["env"] == {"attn_implementation": "sdpa"}


def test_an_error_of_the_block_comes_back(nnsight_server: Server, lm: Any) -> None:
    with refused("ValueError: told by the block") as raised, lm.trace(TEXT, remote=True):
        hidden = lm.model.layers[0].output
        raise ValueError(f"told by the block of {tuple(hidden.shape)}")
    assert 'raise ValueError(f"told by' in str(raised.value).replace("'", '"')
    assert "stand_in" not in str(raised.value)
    assert nnsight_server.jobs()[-1]["statuses"][-1] == "ERROR"
    made, hidden = through(lm, torch.clone, True)  # and the next job runs
    assert torch.equal(made, hidden)


def test_a_job_that_takes_too_long_is_stopped(nnsight_server: Server, lm: Any) -> None:
    with (
        nnsight_server.limits(seconds=0.5),
        refused("execution timeout of 0.5s"),
        lm.trace(TEXT, remote=True),
    ):
        lm.output.logits.save()
        while True:
            pass
    made, hidden = through(lm, torch.clone, True)
    assert torch.equal(made, hidden)


def test_who_has_no_key_is_refused(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nnsight.whoami()["email"]
    for key, answer in ((None, "is required"), ("secret", "malformed"), ("0" * 32, "not known")):
        monkeypatch.setattr(CONFIG.API, "APIKEY", key)
        with refused(f"Failed to send request: .*{answer}"):
            through(lm, torch.clone, True)


def test_served_models_are_told(nnsight_server: Server, lm: Any, checkpoint: Checkpoint) -> None:
    status = nnsight.status()
    assert isinstance(status, NdifStatus)
    assert {f"{OWNER}/{family}" for family in FAMILIES} <= set(status.keys())
    assert status.status.value == "UP"
    assert status[f"{OWNER}/olmoe"]["state"] == "RUNNING"
    assert nnsight.is_model_running(f"{OWNER}/olmoe")
    assert not nnsight.is_model_running(f"{OWNER}/another")
    repository = nnsight_server.add("not_yet", checkpoint("olmoe_gqa_clip"), state="DEPLOYING")
    assert nnsight.status()[repository]["state"] == "DEPLOYING"
    assert not nnsight.is_model_running(repository)
    keys = {d["model_key"] for d in nnsight.status(raw=True)["deployments"].values()}  # type: ignore[index]
    assert lm.to_model_key() in keys


def test_a_model_that_is_not_served_is_refused(nnsight_server: Server, checkpoint: Checkpoint) -> None:
    lm = client(checkpoint("olmoe_bias_odd_width"))
    with refused("Could not deploy this model"):
        through(lm, torch.clone, True)


def test_another_architecture_than_the_clients_is_refused(
    nnsight_server: Server, checkpoint: Checkpoint
) -> None:
    """The server's model has fewer layers than what the client built under the same name."""
    directory = checkpoint("mixtral_head_dim_odd_width")
    repository = nnsight_server.add("changed", checkpoint("mixtral"))
    nnsight_server.directories[repository] = directory
    lm = client(directory)
    with refused("architecture .* doesn't match .*layers.2"):
        through(lm, torch.clone, True)


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended before it served.*nowhere"),
        serve({"a": tmp_path / "nowhere"}),
    ):
        pass


# What goes over the wire


@pytest.mark.parametrize("largest_on_socket", [0, 1 << 20], ids=["by URL", "on the socket"])
@pytest.mark.parametrize("compress", [True, False])
def test_bytes_are_counted(
    nnsight_server: Server,
    lm: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    largest_on_socket: int,
    compress: bool,
) -> None:
    """As many as the client says that it sent and got."""
    monkeypatch.setattr(CONFIG.API, "COMPRESS", compress)
    with (
        nnsight_server.limits(largest_on_socket=largest_on_socket),
        lm.trace(TEXT, remote=True, verbose=True),
    ):
        hidden = lm.model.layers[0].output.save()
    said = {
        w: int(n.replace(",", ""))
        for w, n in re.findall(r"(payload|result): ([\d,]+) bytes", capsys.readouterr().out)
    }
    job = nnsight_server.jobs()[-1]
    assert said == {"payload": job["payload_bytes"], "result": job["result_bytes"]}
    assert job["result_bytes"] > 0.8 * 4 * hidden.numel()
    assert job["body_bytes"] == int(job["headers"]["content-length"]) > job["payload_bytes"]
    assert job["downloaded_bytes"] == (0 if largest_on_socket else job["result_bytes"])
    assert (job["update_bytes"] > job["result_bytes"]) == bool(largest_on_socket)
    assert job["compress"] == compress


# How a server runs a block


def test_half_precision_models_run_under_autocast(nnsight_server: Server, checkpoint: Checkpoint) -> None:
    """A product of the block's own float32 tensors is rounded, unless the block turns autocast off."""
    directory = checkpoint("olmoe_yarn")
    nnsight_server.add("half", directory, torch.bfloat16)
    lm = client(directory)
    with lm.trace(TEXT, remote=True):
        hidden = lm.model.layers[0].output
        a = torch.full((4, 4), 1 + 2**-12)
        rounded = save(a @ a)
        with torch.autocast("cpu", enabled=False):
            exact = save(a @ a)
        kept = save(hidden.dtype)
        wanted = save(any(parameter.requires_grad for parameter in lm._module.parameters()))
    assert (kept, rounded.dtype, exact.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(rounded.float(), exact)
    assert wanted is False


def test_full_precision_models_run_without_autocast(lm: Any) -> None:
    with lm.trace(TEXT, remote=True):
        enabled = save(torch.is_autocast_enabled("cpu"))
        lm.output.logits.save()
    assert enabled is False


def test_attention_is_the_clients_and_experts_are_the_servers(
    nnsight_server: Server, checkpoint: Checkpoint
) -> None:
    """A request says how attention is computed, for itself alone, and nothing says how experts are."""
    directory = checkpoint("olmoe")
    for attention in ("eager", "sdpa"):
        lm = client(directory, attn_implementation=attention, experts_implementation="eager")
        with lm.trace(TEXT, remote=True):
            theirs = save([lm.config._attn_implementation, lm.config._experts_implementation])
            lm.output.logits.save()
        assert theirs[0] == attention
        assert theirs[1] != lm._module.config._experts_implementation == "eager"


def test_a_key_that_is_not_trusted_reaches_no_weights(nnsight_server: Server, lm: Any) -> None:
    """Calls of modules go to the model, parameters have shapes only."""
    with nnsight_server.limits(trusted=False), lm.trace(TEXT, remote=True):
        gate = lm.model.layers[0].mlp.gate
        without = [gate.weight, gate._module.weight, next(lm.parameters()), lm.state_dict()["lm_head.weight"]]
        meta = save([weight.is_meta for weight in without])
        output = lm.model.layers[0].output.save()
        logits = lm.lm_head(output).save()
        layers = lm.config.num_hidden_layers.save()
    with lm.trace(TEXT, remote=True):
        with_weights = lm.model.layers[0].mlp.gate.weight.is_meta.save()
        hidden = lm.model.layers[0].output.save()
        expected = lm.lm_head(hidden).save()
    assert meta == [True] * 4
    assert with_weights is False
    assert torch.equal(output, hidden)
    assert torch.equal(logits, expected)
    assert layers == 3


def test_nothing_refuses_what_is_made_of_weights_that_are_not_there(nnsight_server: Server, lm: Any) -> None:
    """It comes back without values, or with made-up ones: on the CPU torch multiplies by a meta tensor without a word.

    A function that runs there has to look at `weight.is_meta` itself.
    """
    with nnsight_server.limits(trusted=False), lm.trace(TEXT, remote=True):
        gate = lm.model.layers[0].mlp.gate
        into = gate.input
        empty = save(torch.einsum("td,ed->te", into, gate.weight))
        made_up = (into @ gate.weight.T).save()
        logits = gate.output[0].save()
    assert empty.is_meta
    assert made_up.shape == logits.shape
    assert not torch.allclose(made_up, logits)


def gradient(lm: Any) -> Tensor:
    with lm.trace(TEXT, remote=True):
        hidden = lm.model.layers[0].output
        hidden.requires_grad_(True)
        with lm.output.logits.sum().backward():
            found = hidden.grad.save()
    return found


def test_gradients_need_a_trusted_key(nnsight_server: Server, lm: Any) -> None:
    assert gradient(lm).norm() > 0
    with nnsight_server.limits(trusted=False), refused("does not require grad"):
        gradient(lm)

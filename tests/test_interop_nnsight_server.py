"""`routing_cache` through a server: a process that has no moe_lens, with and without the model's weights at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

from moe_lens.interop.nnsight import plan, routing_cache, traffic
from moe_lens.interop.nnsight.shipped.weights import bias_of, gain_of, matrix_of
from tests.families import FAMILIES, prompts
from tests.nnsight_cases import traced_model
from tests.nnsight_server import client
from tests.reference import assert_same
from tests.test_interop_nnsight_cache import assert_caches_agree

Load = Callable[[str], Any]
NEURONS = ("hook_expert_pre", "hook_expert_pre_linear", "hook_expert_post")


@pytest.fixture(params=["trusted", "not trusted"])
def server(request: pytest.FixtureRequest, nnsight_server: Any) -> Iterator[Any]:
    """The stand-in, for a key whose blocks run beside the weights, and for one whose blocks do not."""
    trusted = request.param == "trusted"
    with nullcontext() if trusted else nnsight_server.limits(trusted=False):
        yield nnsight_server


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_equals_hooked_moe(
    server: Any, checkpoint: Callable[[str], Path], model_of: Load, family: str, padding: str
) -> None:
    """Every point but neurons, from a client that has no weights either."""
    tokens, mask = prompts(padding)
    wanted = [name for name in model_of(family).hook_dict if not name.endswith((*NEURONS, "hook_result"))]
    wanted.append("blocks.0.attn.hook_result")
    _, expected = model_of(family).run_with_cache(tokens, attention_mask=mask, names_filter=wanted)
    lm = client(checkpoint(family))
    ours = routing_cache(lm, tokens, attention_mask=mask, names_filter=wanted, remote=server.url)
    assert_caches_agree(ours, expected, mask.bool())
    assert lm._module.lm_head.weight.is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_need_weights(
    nnsight_server: Any, checkpoint: Callable[[str], Path], model_of: Load, family: str
) -> None:
    """They are there for a trusted key; for another there is an error, and never made-up numbers."""
    tokens, _ = prompts()
    names = [f"blocks.1.mlp.{name}" for name in NEURONS]
    lm = client(checkpoint(family))
    _, expected = model_of(family).run_with_cache(tokens, names_filter=names)
    for name, value in routing_cache(lm, tokens, names_filter=names, remote=nnsight_server.url).items():
        assert_same(value, expected[name], name)
    with (
        nnsight_server.limits(trusted=False),
        pytest.raises(RemoteError, match="this key reaches none"),
    ):
        routing_cache(lm, tokens, names_filter=names, remote=nnsight_server.url)


def test_bytes_are_the_wires(nnsight_server: Any, checkpoint: Callable[[str], Path]) -> None:
    """What `traffic` counts, the server counts too; `plan` is within a few bytes, and nothing is sent for it."""
    lm, (tokens, _) = client(checkpoint("olmoe")), prompts()
    before = len(nnsight_server.jobs())
    planned = plan(routing_cache, lm, tokens, remote=nnsight_server.url)
    assert len(nnsight_server.jobs()) == before
    assert (planned.host, planned.served) == (nnsight_server.url, True)
    assert "olmoe" in str(planned.model_key)
    with traffic() as counted:
        routing_cache(lm, tokens, remote=nnsight_server.url)
    job = nnsight_server.jobs()[-1]
    assert counted.jobs == 1
    assert counted.bytes_up == job["payload_bytes"]
    assert counted.bytes_down == job["result_bytes"]
    assert abs(counted.bytes_up - planned.bytes_up) < 0.01 * planned.bytes_up
    # The server compresses.
    assert 0.5 * planned.bytes_down < counted.bytes_down < 1.1 * planned.bytes_down


def test_large_results_come_by_url(nnsight_server: Any, checkpoint: Callable[[str], Path]) -> None:
    lm, (tokens, _) = client(checkpoint("olmoe")), prompts()
    here = routing_cache(lm, tokens, remote=nnsight_server.url)
    with nnsight_server.limits(largest_on_socket=1000), traffic() as counted:
        by_url = routing_cache(lm, tokens, remote=True)
    job = nnsight_server.jobs()[-1]
    assert not job["result_on_socket"]
    assert counted.bytes_down == job["downloaded_bytes"]
    assert all(torch.equal(here[name], by_url[name]) for name in here)


def test_a_model_that_is_not_served(nnsight_server: Any, checkpoint: Callable[[str], Path]) -> None:
    """The plan says so before anything is sent; the run fails with nnsight's own error."""
    lm, (tokens, _) = client(checkpoint("qwen3_moe_sparse_step")), prompts()
    planned = plan(routing_cache, lm, tokens, remote=True)
    assert planned.served is False
    assert "is not being served" in str(planned)
    with pytest.raises(RemoteError):
        routing_cache(lm, tokens, remote=True)


def test_a_server_that_does_not_answer(checkpoint: Callable[[str], Path], nnsight_server: Any) -> None:
    lm, (tokens, _) = client(checkpoint("olmoe")), prompts()
    with pytest.raises(ConnectionError, match="does not say which models it serves"):
        plan(routing_cache, lm, tokens, remote="http://127.0.0.1:9")


def test_a_folder_is_no_name(checkpoint: Callable[[str], Path]) -> None:
    """A model of a folder that no server can know: said before anything is sent."""
    lm, (tokens, _) = traced_model(checkpoint("qwen3_moe_sparse_step")), prompts()
    for ask in (plan, run_now):
        with pytest.raises(ValueError, match="a server knows a model by its name on the Hugging Face hub"):
            ask(routing_cache, lm, tokens, remote="http://127.0.0.1:9")


def run_now(function: Any, *args: Any, **settings: Any) -> Any:
    return function(*args, **settings)


def test_what_a_failed_job_sent_is_counted(nnsight_server: Any, checkpoint: Callable[[str], Path]) -> None:
    lm, (tokens, _) = client(checkpoint("olmoe")), prompts()
    with nnsight_server.limits(trusted=False), traffic() as counted, pytest.raises(RemoteError):
        routing_cache(lm, tokens, names_filter="blocks.1.mlp.hook_expert_pre", remote=True)
    assert (counted.jobs, counted.bytes_up) == (1, nnsight_server.jobs()[-1]["payload_bytes"])


def test_verbose_prints_the_plan(
    nnsight_server: Any, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lm, (tokens, _) = client(checkpoint("mixtral")), prompts()
    name = "blocks.0.mlp.hook_router_logits"
    routing_cache(lm, tokens, names_filter=name, remote=True, verbose=True)
    printed = capsys.readouterr().out
    assert "routing_cache: 1 job of 1 forward pass, at " in printed
    assert "is being served" in printed
    assert "routing_cache, job 1 of 1: 1 job, " in printed


# ---- weights by calling modules ----


class WithoutWeights:
    """A module that can be called, with parameters that have shapes alone."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.weight = module.weight.detach().to("meta")  # type: ignore[union-attr, operator]
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach().to("meta")

    def __call__(self, x: torch.Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral_head_dim_odd_width"])
def test_weights_by_calling(checkpoint: Callable[[str], Path], family: str, dtype: torch.dtype) -> None:
    """Router, output map and gain are the weights, to the bit; also where eps is 0.01."""
    lm = traced_model(checkpoint(family), dtype)
    layer, like = lm._module.model.layers[1], torch.zeros(1, dtype=dtype)
    tolerance = 1e-30
    for module in (layer.mlp.gate, layer.self_attn.o_proj, lm._module.lm_head):
        assert_same(
            matrix_of(WithoutWeights(module), like), module.weight.detach().float(), tolerance=tolerance
        )
    for norm in (layer.post_attention_layernorm, lm._module.model.norm):
        assert_same(gain_of(WithoutWeights(norm), like), norm.weight.detach().float(), tolerance=tolerance)


def test_a_bias_by_calling() -> None:
    linear = torch.nn.Linear(5, 3)
    like = torch.zeros(1)
    assert torch.equal(bias_of(WithoutWeights(linear), like), linear.bias)  # type: ignore[arg-type]
    assert_same(matrix_of(WithoutWeights(linear), like), linear.weight.detach(), tolerance=1e-6)
    with pytest.raises(RuntimeError, match="a linear map with a bias in half precision"):
        matrix_of(WithoutWeights(linear.bfloat16()), like.bfloat16())


def test_registered(nnsight_server: Any) -> None:
    """Importing the package is what makes its functions travel by their source."""
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

    assert "moe_lens" in _PICKLE_BY_VALUE_MODULES
    assert nnsight_server.url == nnsight.CONFIG.API.HOST

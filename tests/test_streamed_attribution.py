"""What reads a streamed model's weights for itself: attributions of one run, and the command with its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens.cli import main
from moe_lens.routing.attribution import router_logit_attrs
from moe_lens.routing.explain import explain
from moe_lens.routing.logit_attribution import logit_attrs
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import GRANULARITIES
from moe_lens.routing_page_data import routing_decisions
from tests.checkpoints import load
from tests.routing_cases import assert_same_results, corpus


def test_the_command(streamed: Any, checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    """Files, page and exit status are those of the model in memory."""
    written = []
    corpus_options = "--n 5 --max-length 20 --batch-size 2 --dtype float32 --device cpu"
    for name, options in (("resident", ""), ("streamed", "--stream")):
        out = tmp_path / name
        arguments = f"--output {out} --by layer neuron {corpus_options} {options}"
        assert main(["contributions", str(checkpoint("qwen2_moe")), *arguments.split()]) == 0
        # Figures in a page have names that are drawn anew, and arrays lie in a file in any order.
        names = sorted(path.name for path in out.iterdir() if path.suffix != ".safetensors")
        plain = [
            re.sub(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", b"", (out / n).read_bytes()) for n in names
        ]
        results = [RoutingContributions.load(out / f"{by}.safetensors") for by in ("layer", "neuron")]
        written.append((names, plain, results))
        assert ("layers are read" in capsys.readouterr().out) == (name == "streamed")
    (names, plain, results), (its_names, its_plain, its_results) = written
    assert names == its_names
    assert [name for name, one, other in zip(names, plain, its_plain, strict=True) if one != other] == []
    for one, other in zip(results, its_results, strict=True):
        assert_same_results(one, other)
        assert one.provenance == other.provenance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_decisions_of_a_page(streamed: Any, checkpoint: Any, dtype: Any) -> None:
    """Their layers are read once to run, and once more for the heads, whatever the number of documents."""

    model = streamed("qwen2_moe", dtype=dtype)
    ours = routing_decisions(model, corpus())
    assert model.read_counts.layers_read == 2 * model.cfg.n_layers
    assert vars(ours) == vars(routing_decisions(load(checkpoint("qwen2_moe"), dtype=dtype), corpus()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", GRANULARITIES)
def test_attributions_read_the_layers_that_they_need(
    streamed: Any, checkpoint: Any, by: str, dtype: Any
) -> None:
    """Of a cache, of a router's logits and of the next token's; and of one token's decision, to be drilled into."""

    tokens = corpus()[1][0]
    found = []
    for model in (streamed("qwen2_moe", dtype=dtype), load(checkpoint("qwen2_moe"), dtype=dtype)):
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        explanation = explain(model, tokens[:1], pos=-1, router=2, expert=1, by=by)
        # Whatever this granularity leaves whole.
        finer = [explanation.drill(name) for name in ("A1", "M1") if name in explanation.senders]
        verified = explanation.verify(list(explanation.senders[1:4]))
        found.append(
            (
                router_logit_attrs(model, cache, receiver=2, by=by).values,
                logit_attrs(model, cache, 3, by=by).values,
                [part.to_json() for part in (explanation.table(), *(p.table() for p in finer), verified)],
            )
        )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2]

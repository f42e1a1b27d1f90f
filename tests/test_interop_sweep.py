"""`attach` on every type of the installed transformers that uses the experts interface, a tiny random model each."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import transformers

from moe_lens.interop.transformers import attach
from tests.interop_table import LIMIT, PAGE, WORKS, page
from tests.interop_table import row as tried
from tests.interop_types import inputs, interface_types, tiny_model

TYPES = interface_types()

row = cache(tried)

# Where a router does not allow an edit: the type, and what is said of it.
NOT_REROUTED = {
    "deepseek_v4": "DeepseekV4HashRouter: .* its choice of experts does not follow from its logits"
}
NOT_FORCED = {
    "deepseek_ocr2": "its group is not among the best",
    "phimoe": "its routing weights are not read for the experts that it returns",
    "zaya": "its routing weights are not read for the experts that it returns",
}


@pytest.mark.parametrize("folder", TYPES)
def test_type(folder: str) -> None:
    """Same output bit for bit, slots that sum, edited logits as a router with edited rows, forced choices."""
    found = row(folder)
    assert found.exact
    assert found.sum_error < LIMIT
    for outcome, exceptions in ((found.rerouted, NOT_REROUTED), (found.forced, NOT_FORCED)):
        if folder in exceptions:
            assert re.search(exceptions[folder], outcome)
        else:
            assert outcome == WORKS


@pytest.mark.parametrize("folder", TYPES)
def test_half_precision(folder: str) -> None:
    """In bfloat16 too the output is the same bit for bit, and no layer's slots fail to sum."""
    if folder == "inkling2":
        pytest.skip(
            "transformers itself does not run a randomly made inkling2 in bfloat16: its router is float32"
        )
    model, given = tiny_model(folder).bfloat16(), inputs(folder)
    with torch.no_grad():
        unhooked = model(**given)[0]
        with attach(model) as attached:
            assert torch.equal(attached.run_with_cache(**given)[0][0], unhooked)


def test_page_is_what_the_script_writes() -> None:
    """The page in the docs is of the transformers that it names, and at least forty types work."""
    rows = [row(folder) for folder in TYPES]
    assert sum(found.works for found in rows) >= 40
    if f"transformers {transformers.__version__}," not in PAGE.read_text():
        pytest.skip(f"the page is of another transformers than {transformers.__version__}")
    assert PAGE.read_text() == page(rows)

"""What a server sends is read as tensors and plain values, and nothing of it is run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight.schema.response import ResponseModel, Status
from torch import Tensor

from moe_lens.interop.nnsight.received import read_plain


def written(value: Any, protocol: int = 2) -> bytes:
    with io.BytesIO() as file:
        torch.save(value, file, pickle_protocol=protocol)
        return file.getvalue()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors(dtype: torch.dtype, protocol: int) -> None:
    tensor = torch.arange(12).reshape(3, 4).T.to(dtype)
    got = read_plain(written({"results": [tensor, tensor[1:]]}, protocol))["results"]
    assert all(isinstance(value, Tensor) and value.dtype == dtype for value in got)
    assert torch.equal(got[0], tensor)
    assert torch.equal(got[1], tensor[1:])


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values(protocol: int) -> None:
    value = {
        "a": [1, 2.5, None, True, "text", b"bytes", (1, {2, 3})],
        "d": torch.bfloat16,
        "o": OrderedDict(x=1),
    }
    assert read_plain(written(value, protocol)) == value


def test_a_servers_answer() -> None:
    """The last message of a job, whose data is another blob, as nnsight writes it."""
    data = written({"results": [torch.eye(2)]}, 4)
    answer = ResponseModel(
        id="1", status=Status.COMPLETED, description="done", data=data, meta={"seconds": 1.5}
    )
    read = ResponseModel(**read_plain(answer.pickle()))
    assert read == answer
    assert torch.equal(read_plain(read.data)["results"][0], torch.eye(2))  # type: ignore[arg-type]


class Writes:
    """Pickled, it is a call that writes a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "was run")


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "trace"
    blob = written({"results": [torch.eye(2), Writes(path)]}, protocol)
    with pytest.raises(
        pickle.UnpicklingError, match="which is neither a tensor nor a plain value; it was not read"
    ):
        read_plain(blob)
    assert not path.exists()
    torch.load(io.BytesIO(blob), weights_only=False)
    assert path.exists()  # the blob is a real one


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "torch.nn.Linear"]
)
def test_names_that_are_no_tensors(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with io.BytesIO() as file:
        torch.save({}, file)
        whole = file.getvalue()
    # A stored file with its pickle replaced by one that names the function.
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.infolist():
            content = old.read(item.filename)
            if item.filename.endswith("data.pkl"):
                content = f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")
            new.writestr(item, content)
    with pytest.raises(pickle.UnpicklingError, match=f"the server sent {name}"):
        read_plain(out.getvalue())

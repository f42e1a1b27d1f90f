"""Reading what a server sends, as tensors and plain values alone.

nnsight's client reads answers with Python's unpickler, which runs whatever the sender wrote. Here the same bytes are
read by one that makes tensors, and nothing else that has to be imported. (Torch's own restricted reader would do, but
it does not know the newer pickle protocol in which answers come.)
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch

_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    # How the older protocol writes bytes and sets.
    ("_codecs", "encode"),
    ("__builtin__", "set"),
    ("builtins", "set"),
    ("nnsight.schema.response", "Status"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"the server sent {module_name}.{global_name}, which is neither a tensor nor a plain value; it was not "
                f"read"
            )
        return super().find_class(module_name, global_name)


_READER = SimpleNamespace(
    Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError, load=None, __name__=__name__
)


def read_plain(content: bytes) -> Any:
    """What `torch.save` wrote, of tensors (on the CPU), numbers, text, dicts and lists.

    Raises:
        pickle.UnpicklingError: there is something else in it, which is named and was not run.
    """
    with io.BytesIO(content) as file:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_READER)

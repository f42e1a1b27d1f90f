"""A named place in the forward pass where a researcher can look or cut."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint as TransformerLensHookPoint

# Where nnsight keeps its state on a module that it has wrapped. It registers no torch hook.
_NNSIGHT_STATE = "__nnsight__"


class HookPoint(TransformerLensHookPoint):
    """TransformerLens's hook point, with in-place edits that are safe or refused.

    Args:
        pos_dim: the axis of the query position, for `pos_slice`.
        may_change_shape: whether a returned edit may have another shape (forced experts may be more or fewer).
        shares_memory: the value handed over is also held under another name (`hook_resid_pre` is the
            layer before's `hook_resid_post`); a listener then gets a clone, so that an in-place edit here
            does not rewrite what was cached there.

    In-place edits: without grad they act on what is handed over. With grad a clone is handed over, because
    the operation that made the value may have saved it for its backward pass. Where a backward hook sits on
    the point, torch itself refuses the edit with a RuntimeError: it would be lost to the hook's gradient.

    Returned edits keep the shape, or raise: broadcasting would change the run without a word. A floating edit
    in another dtype (a float32 steering vector in a bfloat16 model) is cast to the value's.
    """

    def __init__(self, pos_dim: int = 1, *, shares_memory: bool = False, may_change_shape: bool = False):
        super().__init__()
        self.pos_dim = pos_dim
        self.may_change_shape = may_change_shape
        self.shares_memory = shares_memory
        self.n_edits = 0
        """How often a value was handed on other than it came, in place or as another tensor."""

    @property
    def is_listened_to(self) -> bool:
        """Whether anything would notice that this point runs: any hook of TransformerLens's or torch's, or a
        tool that has wrapped the module."""
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _NNSIGHT_STATE in self.__dict__
        )

    def __call__(self, value: Tensor, *args: Any) -> Tensor:
        if self.is_listened_to:
            carries_grad = torch.is_grad_enabled() and value.requires_grad
            if self.shares_memory or (carries_grad and not self._backward_hooks):
                value = value.clone()
        # Torch counts in-place edits, except in inference mode.
        version = None if value.is_inference() else value._version
        edited = super().__call__(value, *args)
        if edited is not value:
            self.n_edits += 1
            return self._checked(edited, value)
        if version is not None and value._version != version:
            self.n_edits += 1
        return edited

    def _checked(self, edited: Any, value: Tensor) -> Tensor:
        if not isinstance(edited, Tensor):
            raise TypeError(f"{self.name}: an edit must be a tensor, not {type(edited).__name__}")
        if edited.shape != value.shape and not self.may_change_shape:
            raise ValueError(
                f"{self.name}: an edit must keep the shape {list(value.shape)}, and this one has {list(edited.shape)}"
            )
        if edited.is_floating_point() and value.is_floating_point():
            return edited.to(value.dtype)
        return edited


Module = TypeVar("Module", bound=nn.Module)


def with_own_hook_points(module: Module) -> Module:
    """The same module on the same weights, with hook points of its own: whoever listens hears nothing of its runs."""
    twin = copy.copy(module)
    if _NNSIGHT_STATE in twin.__dict__:
        # What nnsight put on the module runs that module's forward, hook points and all, also on a copy of it.
        twin.__dict__.pop(_NNSIGHT_STATE)
        twin.__dict__.pop("forward", None)
    twin._modules = {
        name: HookPoint(
            child.pos_dim or 1, shares_memory=child.shares_memory, may_change_shape=child.may_change_shape
        )
        if isinstance(child, HookPoint)
        else child
        for name, child in module._modules.items()
    }
    return twin

"""A model whose layers stay on disk: each is read when it runs, and the next one while it does.

Embedding, final norm, unembedding, routers and all gains and biases are in memory; a layer's matrices are there while
it runs. A plain run of one batch reads every layer it goes through, so it takes as long as the disk does; `run_corpus`
reads each layer once for any number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.config import MoEConfig
from moe_lens.model.attend import Attend
from moe_lens.model.block import Block
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.loss import LOGITS_BUDGET
from moe_lens.model.weight_bits import sums_of_bits

if TYPE_CHECKING:
    from moe_lens.model.corpus_passes import Batch, MakeAttend
    from moe_lens.model.layer_major import CorpusRun, Listening

# What may be asked of a weight that is on disk: what it is, not what it holds.
_FACTS = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "is_leaf",
        "grad",
        "ndim",
        "layout",
        "nbytes",
        "_version",
    )
} | {
    Tensor.is_inference,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.stride,
    Tensor.is_floating_point,
}


class LayerSource(Protocol):
    """Where layers come from: `moe_lens.converters.layer_store.LayerStore`."""

    counts: Any

    @property
    def bytes_needed(self) -> int: ...

    def stored_bytes(self, layers: Sequence[int]) -> int: ...

    def reading(
        self, layers: Sequence[int]
    ) -> AbstractContextManager[Iterable[tuple[int, Mapping[str, Tensor]]]]: ...


class OnDisk(nn.Parameter):
    """A weight that is not in memory: it has a shape and a dtype, and whatever would read it raises by its name."""

    path: str

    @staticmethod
    def of(parameter: nn.Parameter, path: str) -> OnDisk:
        on_disk = OnDisk(parameter.detach(), requires_grad=False)
        on_disk.path = path
        return on_disk

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        given = [*args, *(kwargs or {}).values()]
        given += [inner for outer in given if isinstance(outer, list | tuple) for inner in outer]
        weight = next(value for value in given if isinstance(value, OnDisk))
        raise RuntimeError(
            f"{weight.path} is on disk: a streamed model's layers are in memory only while they run, or in "
            f"`with model.layers_in_memory([{weight.path.split('.')[1]}])`; a model loaded without "
            f"stream=True holds them all"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDisk({self.path}, {list(self.shape)}, {self.dtype})"


def is_streamed(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is read with its layer: a block's matrices are, but for the routers', which readouts need
    of all layers at once."""
    return name.startswith("blocks.") and parameter.ndim > 1 and not name.endswith(".mlp.router.weight")


class StreamedMoE(HookedMoE):
    """A `HookedMoE` whose layers stay on disk. `HookedMoE.from_pretrained(..., stream=True)` makes one.

    Hooks, caches, interventions, padding, `stop_at_layer` and `start_at_layer` are as in a `HookedMoE`, and so are the
    numbers, bit by bit: the same kernels run on the same weights. `generate` is right and slow: every layer is read
    for every token. Its weights carry no gradients, and none go through it: a run in which a stream would carry one
    raises. It stays where it was loaded, and has no `state_dict`: the weights are in the checkpoint.

    One run at a time: a hook that runs the model inside of its run raises.
    """

    store: LayerSource | None = None

    def keep_on_disk(self, store: LayerSource, cfg: MoEConfig) -> None:
        """Leave the layers to a store, and make room for the rest on `cfg.device`; whoever loads fills that.

        Args:
            cfg: the model's, with the device where it will run: so far the model is on the meta device.
        """
        self.cfg = cfg
        for name, parameter in list(self.named_parameters()):
            self._put(
                name,
                OnDisk.of(parameter, name)
                if is_streamed(name, parameter)
                else nn.Parameter(torch.empty_like(parameter, device=cfg.device), requires_grad=False),
            )
        self.tie_embeddings()
        self.store = store
        self._sums_of_bits: dict[int, dict[str, tuple[int, int]]] = {}

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, attribute = name.rpartition(".")
        self.get_submodule(owner)._parameters[attribute] = parameter

    @property
    def read_counts(self) -> Any:
        """What was read from disk so far: `bytes_read`, `layers_read`, `tensors_read`, `seconds_waiting` for the disk,
        `seconds_reading`, and `peak_bytes` of the layers' memory."""
        return self._required_store().counts

    @property
    def layer_memory(self) -> int:
        """Bytes that layers take while they run: two of them, and the piece that is being converted."""
        return self._required_store().bytes_needed

    def stored_bytes(self, layers: Sequence[int]) -> int:
        """How many bytes are read from disk for these layers."""
        return self._required_store().stored_bytes(layers)

    def reading_time(self, n_bytes: int) -> str:
        """How long it takes to read so many bytes, in words, at the rate of what was read so far. Where that is
        nothing, a layer is read to see, which must not be within a run."""
        if not self.read_counts.layers_read:
            with self.layers_in_memory([0]) as blocks:
                next(blocks)
        rate = self.read_counts.bytes_read / max(self.read_counts.seconds_reading, 1e-9)
        return (
            f"about {n_bytes / rate:,.0f} s at the {rate / 2**20:,.0f} MiB/s of what was read so far, while the layers "
            f"before are computed"
        )

    def _required_store(self) -> LayerSource:
        """Where its layers come from.

        Raises:
            RuntimeError: nowhere: it was not loaded from a checkpoint.
        """
        if self.store is None:
            raise RuntimeError(
                "this streamed model has no checkpoint; HookedMoE.from_pretrained(..., stream=True) makes one that has"
            )
        return self.store

    @contextmanager
    def layers_in_memory(self, layers: Sequence[int]) -> Iterator[Iterator[Block]]:
        """Go through some layers, each with its weights in memory until the next is asked for.

            with model.layers_in_memory([3]) as blocks:
                for block in blocks:
                    block.mlp.experts.W_down

        While one is used, the next is read. What is kept of a layer's weights is not taken back, and takes the memory
        that it takes.

        Args:
            layers: in the order they are wanted.

        Raises:
            ValueError: a layer that the model does not have.
            RuntimeError: a run is under way.
            CheckpointChanged: a file is no longer what it was when the model was loaded.
            CheckpointMismatch: a tensor holds NaN or infinity.
        """
        wrong = [layer for layer in layers if layer not in range(self.cfg.n_layers)]
        if wrong:
            raise ValueError(
                f"there is no layer {wrong[0]}; {self.cfg.model_name} has {self.cfg.n_layers} layers"
            )
        with self._required_store().reading(layers) as reading:
            blocks = self._blocks(reading)
            try:
                yield blocks
            finally:
                blocks.close()

    def _blocks(self, reading: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Generator[Block, None, None]:
        for layer, weights in reading:
            on_disk = {name: self.get_parameter(name) for name in weights}
            try:
                for name in weights:
                    self._put(name, nn.Parameter(weights[name], requires_grad=False))
                if layer not in self._sums_of_bits:
                    self._sums_of_bits[layer] = {name: sums_of_bits(weights[name]) for name in weights}
                yield self.blocks[layer]  # type: ignore[misc]
            finally:
                for name, parameter in on_disk.items():
                    self._put(name, parameter)

    @contextmanager
    def copies_in_memory(self, layers: Sequence[int], wanted: Callable[[str], bool]) -> Iterator[None]:
        """While open, copies of some weights are in memory: the layers are read once for these.

            with model.copies_in_memory(range(3), lambda name: name.endswith("o_proj.weight")):
                model.blocks[0].attn.W_O

        Args:
            layers: which to read.
            wanted: whether a weight of theirs is copied, by its name.

        Raises:
            ValueError, RuntimeError: see `layers_in_memory`.
        """
        copies: dict[str, nn.Parameter] = {}
        with self.layers_in_memory(layers) as blocks:
            for layer, block in zip(layers, blocks, strict=True):
                for name, parameter in block.named_parameters():
                    whole_name = f"blocks.{layer}.{name}"
                    if is_streamed(whole_name, parameter) and wanted(whole_name):
                        copies[whole_name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        on_disk = {name: self.get_parameter(name) for name in copies}
        for name, parameter in copies.items():
            self._put(name, parameter)
        try:
            yield
        finally:
            for name, parameter in on_disk.items():
                self._put(name, parameter)

    def layer_sums_of_bits(self) -> dict[str, tuple[int, int]]:
        """`sums_of_bits` of every weight that is on disk, by its name. Layers that were not read so far are read; the
        files are found to be what they were whenever they are read, so it is done once."""
        self._required_store()
        unread = [layer for layer in range(self.cfg.n_layers) if layer not in self._sums_of_bits]
        if unread:
            with self.layers_in_memory(unread) as blocks:
                for _ in blocks:
                    pass
        return {name: sums for layer in self._sums_of_bits.values() for name, sums in layer.items()}

    def run_blocks(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        attend: Attend,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        layers = range(self.cfg.n_layers)[first:last]
        with self.layers_in_memory(layers) as blocks:
            for block in blocks:
                residual = self.run_block(block, residual, attend)
        return residual

    def run_block(
        self, block: Block, residual: Float[Tensor, "batch pos d_model"], attend: Attend
    ) -> Float[Tensor, "batch pos d_model"]:
        """One layer, which must be in memory.

        Raises:
            RuntimeError: the stream carries a gradient, before the layer or after it.
        """
        _refuse_gradient(residual)
        residual = block(residual, attend)
        _refuse_gradient(residual)
        return residual

    def run_corpus(
        self,
        batches: Iterable[Batch],
        listening: Listening | None = None,
        *,
        return_type: Literal["loss"] | None = None,
        stop_at_layer: int | None = None,
        memory_budget: int = 2**30,
        logits_budget: int = LOGITS_BUDGET,
        spill_directory: str | Path | None = None,
        attend: MakeAttend | None = None,
        verbose: bool = False,
    ) -> CorpusRun:
        """Run many batches, reading each layer once for all of them; see `moe_lens.model.layer_major.run_corpus`."""
        from moe_lens.model.layer_major import run_corpus

        return run_corpus(
            self,
            batches,
            listening,
            return_type=return_type,
            stop_at_layer=stop_at_layer,
            memory_budget=memory_budget,
            logits_budget=logits_budget,
            spill_directory=spill_directory,
            attend=attend,
            verbose=verbose,
        )

    # ---- what a model on disk is not ----

    def run_with_cache(self, *model_args: Any, incl_bwd: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `HookedMoE.run_with_cache`.

        Raises:
            RuntimeError: with `incl_bwd`, for there are no gradients.
        """
        if incl_bwd:
            raise _no_gradients("incl_bwd=True asks for them")
        return super().run_with_cache(*model_args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> StreamedMoE:  # type: ignore[override]
        if requires_grad:
            raise _no_gradients("requires_grad_(True) asks for them")
        return self

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """As `HookedMoE.accumulated_bias`; biases are in memory."""
        total = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        for block in list(self.blocks)[: layer + int(mlp_input)]:
            bias = block.attn.o_proj.bias  # type: ignore[union-attr]
            total = total if bias is None else total + bias  # type: ignore[operator]
        return total

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"a streamed model has no state_dict: its weights are in the checkpoint {self.cfg.model_name!r}, from "
            f"which HookedMoE.from_pretrained loads them all where there is room"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a streamed model reads its weights from its checkpoint, and cannot be given others; load the model "
            "without stream=True"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a streamed model is neither copied nor stored: it reads its layers from a checkpoint; load it once more "
            "with HookedMoE.from_pretrained(..., stream=True)"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HookedMoE:
        if self.store is not None:
            raise RuntimeError(
                f"a streamed model stays where and what it was loaded as, on {self.cfg.device} in {self.cfg.dtype}; "
                f"give device= and dtype= to HookedMoE.from_pretrained(..., stream=True)"
            )
        return super()._apply(fn, recurse)


def _refuse_gradient(residual: Tensor) -> None:
    if residual.requires_grad and torch.is_grad_enabled():
        raise _no_gradients("the residual stream carries one (from the input, or from a hook)")


def _no_gradients(why: str) -> RuntimeError:
    return RuntimeError(
        f"a streamed model has no gradients, and {why}: going back needs layers that are no longer in memory; load the "
        f"model without stream=True"
    )

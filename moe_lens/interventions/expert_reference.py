"""What experts write over a reference corpus: their mean outputs, and samples of them, for `mean` and `resample`.

    reference = expert_reference(model, batches)
    reference.mean_output(1, torch.tensor([9, 3]))

An ablation may put something else in the place of an expert's output E_i(x) (`hook_expert_out`, before the routing
weight): its mean over the tokens where it was active, or its output at one of those tokens. A token is known by its
prefix: a causal model computes the same output wherever the same tokens come before, so an output that is to come from
elsewhere must come from another prefix.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.expert_outputs import SHARED, LayerOutputs
from moe_lens.interventions.token_hashes import FOR_DRAW, hash_of, prefix_hashes
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few, positive_integer
from moe_lens.routing.contributions import Batches, corpus_of
from moe_lens.routing.provenance import TokenDigest, edit_counts, weights_fingerprint
from moe_lens.routing.runs import Mask
from moe_lens.routing.storage import read_arrays, write_atomically

__all__ = ["SHARED", "ExpertReference", "expert_reference", "prefix_hashes"]

_FORMAT = "moe_lens expert reference 1"
_ARRAYS = ("count", "mean", "samples", "sample_prefix", "n_samples")


# ---- the result ----


@dataclass(frozen=True, eq=False)
class ExpertReference:
    """Means and samples of expert outputs over a corpus, by layer; `expert_reference` gathers them.

    Every array has a row for each routed expert and, in a model with shared experts, one more row at the end for
    these: there index -1 is the shared experts, whose output is `hook_shared_out` at all real tokens.

    Attributes:
        layers: the MoE layers gathered.
        n_experts: routed experts of a layer.
        has_shared: whether there are shared experts.
        count: tokens where the expert was active.
        mean: of its output there, float32; NaN where it was never active.
        samples: its outputs at some of these tokens, each of another prefix, in the model's dtype. They are in random
            order, and NaN beyond the first `n_samples`.
        sample_prefix: `prefix_hashes` of the tokens sampled; 0 beyond the first `n_samples`.
        n_samples: how many samples there are of each expert.
        provenance: model, revision, dtype, weights (fingerprint), edited (hook points that other hooks edited
            meanwhile), corpus, fingerprint (of its tokens), n_documents, n_tokens, seed, moe_lens (version).
    """

    layers: tuple[int, ...]
    n_experts: int
    has_shared: bool
    count: dict[int, Int[Tensor, " expert"]]
    mean: dict[int, Float[Tensor, "expert d_model"]]
    samples: dict[int, Float[Tensor, "expert sample d_model"]]
    sample_prefix: dict[int, Int[Tensor, "expert sample"]]
    n_samples: dict[int, Int[Tensor, " expert"]]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        samples = max(array.shape[1] for array in self.sample_prefix.values())
        shared = " and the shared ones" if self.has_shared else ""
        return (
            f"<ExpertReference of {self.provenance.get('model', '?')}: {self.n_experts} experts{shared} of layers "
            f"{', '.join(map(str, self.layers))}; up to {samples} samples each, from "
            f"{self.provenance.get('n_tokens', '?')} tokens>"
        )

    def mean_output(self, layer: int, experts: Int[Tensor, "*place"]) -> Float[Tensor, "*place d_model"]:
        """The mean output of an expert for every place, in float32 on the device of `experts`.

        Args:
            experts: routed experts of the layer, or -1 for its shared experts.

        Raises:
            ValueError: the layer was not gathered, or has no such expert, or it was never active.
        """
        rows = self._rows(layer, experts)
        return self.mean[layer][rows].to(experts.device)

    def resampled_output(
        self, layer: int, experts: Int[Tensor, "*place"], prefixes: Int[Tensor, "*place"], seed: int
    ) -> Float[Tensor, "*place d_model"]:
        """An output of the same expert at another token, for every place; in float32 on the device of `experts`.

        It is drawn from the samples of other prefixes than the place's own, all of them equally likely. Seed, layer,
        expert and prefix decide it, whatever else is asked for with them.

        Args:
            experts: routed experts of the layer, or -1 for its shared experts.
            prefixes: `prefix_hashes` at each place.

        Raises:
            ValueError: the layer was not gathered, or has no such expert, or there is no sample of another prefix.
        """
        rows, draws = self._rows(layer, experts), self.draws(layer, experts, prefixes, seed)
        if bool((draws < 0).any()):
            row = int(rows[draws < 0].flatten()[0])
            raise ValueError(
                f"{self._name(layer, row)} has no output in the reference at another prefix than the token's own, so "
                f"there is none to put in its place; gather the reference over more text"
            )
        return self.samples[layer][rows, draws].to(experts.device, torch.float32)

    def draws(
        self, layer: int, experts: Int[Tensor, "*place"], prefixes: Int[Tensor, "*place"], seed: int
    ) -> Int[Tensor, "*place"]:
        """Which of an expert's samples `resampled_output` takes at every place, on the reference's device; -1 where
        there is none of another prefix.

        Args:
            experts, prefixes: as for `resampled_output`.

        Raises:
            ValueError: the layer was not gathered, or has no such expert, or it was never active.
        """
        if prefixes.shape != experts.shape:
            raise ValueError(
                f"there must be a prefix for every expert: {tuple(prefixes.shape)} for {tuple(experts.shape)}"
            )
        rows = self._rows(layer, experts)
        there, prefixes = self.sample_prefix[layer], prefixes.to(rows.device).long()
        n_samples = self.n_samples[layer][rows]
        in_use = torch.arange(there.shape[1], device=rows.device) < n_samples[..., None]
        is_own = (there[rows] == prefixes[..., None]) & in_use
        # Samples are of distinct prefixes, so at most one of them is the place's own.
        n_other = n_samples - is_own.sum(dim=-1)
        draw = hash_of(FOR_DRAW, operator.index(seed), layer, rows, prefixes) % n_other.clamp(min=1)
        draw = draw + (is_own.any(dim=-1) & (draw >= is_own.long().argmax(dim=-1)))
        return draw.masked_fill(n_other == 0, -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all arrays: what results that used them are of. The same on every device."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
            digest.update(array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ExpertReference:
        """The same with its arrays on a device."""
        moved = {
            name: {layer: array.to(device) for layer, array in getattr(self, name).items()}
            for name in _ARRAYS
        }
        return replace(self, **moved)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        facts = {name: getattr(self, name) for name in ("layers", "n_experts", "has_shared", "provenance")}
        return write_atomically(path, self._arrays(), {"format": _FORMAT, **facts})

    @classmethod
    def load(cls, path: str | Path) -> ExpertReference:
        """What `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        arrays, facts = read_arrays(path, "an expert reference")
        if facts.get("format") != _FORMAT:
            raise ValueError(f"{Path(path).name} is no file of an expert reference: {facts.get('format')!r}")
        layers = tuple(facts["layers"])
        return cls(
            layers=layers,
            n_experts=facts["n_experts"],
            has_shared=facts["has_shared"],
            provenance=facts["provenance"],
            **{name: {layer: arrays[f"{name}/{layer}"] for layer in layers} for name in _ARRAYS},
        )

    def _arrays(self) -> dict[str, Tensor]:
        return {f"{name}/{layer}": getattr(self, name)[layer] for name in _ARRAYS for layer in self.layers}

    def _name(self, layer: int, expert: int) -> str:
        return f"M{layer}E{expert}" if 0 <= expert < self.n_experts else f"M{layer}S"

    def _rows(self, layer: int, experts: Int[Tensor, "*place"]) -> Int[Tensor, "*place"]:
        """The experts on the arrays' device, after each was found to have an output. They are rows of the arrays, of
        which the last, -1, is the shared experts'."""
        if layer not in self.layers:
            raise ValueError(
                f"layer {layer!r} was not gathered; the reference is of layers {', '.join(map(str, self.layers))}"
            )
        if experts.is_floating_point() or experts.dtype == torch.bool:
            raise ValueError(f"experts are integers, not {experts.dtype}")
        experts = experts.to(self.count[layer].device).long()
        unknown = (experts < (SHARED if self.has_shared else 0)) | (experts >= self.n_experts)
        if bool(unknown.any()):
            shared = "and the shared experts, -1" if self.has_shared else "and no shared ones"
            raise ValueError(
                f"there is no expert {int(experts[unknown].flatten()[0])} at layer {layer}: it has experts "
                f"0..{self.n_experts - 1} {shared}"
            )
        never = self.count[layer][experts] == 0
        if bool(never.any()):
            raise ValueError(
                f"{self._name(layer, int(experts[never].flatten()[0]))} was never active in the reference, so there is "
                f"no output of it; gather the reference over more text"
            )
        return experts


# ---- gathering ----


def expert_reference(
    model: HookedMoE,
    batches_or_texts: Batches,
    *,
    attention_mask: Mask | None = None,
    layers: Layers = None,
    n_samples: int = 16,
    seed: int = 0,
    batch_size: int = 8,
    verbose: bool = False,
) -> ExpertReference:
    """Run a corpus, and keep the mean and some samples of every expert's output where it is active.

    The samples of an expert are drawn without replacement from all real tokens where it was active, all of them
    equally likely, but one whose prefix is in the sample already is passed over (as the first token of every document
    is, where all begin with BOS). Neither batch size nor padding changes which they are, and the samples for a smaller
    `n_samples` are the first of those for a larger one.

    They take layers x experts x n_samples x d_model numbers in the model's dtype, on its device: for OLMoE 16 x 64 x 16
    x 2,048, which is 64 MiB in bfloat16. The means take 8 MiB in float32, and twice that in float64 on the way.

    Args:
        model: run without gradients, up to the last of the layers. Hooks on it stay, and what they edited is said in
            the provenance. Of a streamed model each layer is read once for the whole corpus.
        batches_or_texts: a text or several (one document each); tokens `[batch, pos]`, with `attention_mask`; what
            `corpus.token_batches` gives; or any iterable of batches, each tokens `[batch, pos]` or a tuple of tokens,
            the mask of real ones (or None), and whatever else, which is not read. Every row is one document.
        attention_mask: of tokens given as one tensor.
        layers: MoE layers; None is all of them.
        n_samples: the most samples kept of an expert. To resample, an expert needs two.
        seed: of the draw.
        batch_size: documents run at once, of texts and of tokens given as one tensor.
        verbose: show a progress bar, and of a streamed model what is read and held.

    Raises:
        ValueError: no batches; a layer that is no MoE layer; `n_samples` below 1; an output that is not finite.
    """
    layers = _moe_layers(model, layers)
    n_samples, seed = positive_integer(n_samples, "n_samples"), operator.index(seed)
    corpus = corpus_of(model, batches_or_texts, attention_mask, batch_size)
    gathered = {layer: LayerOutputs(model, layer, n_samples, seed) for layer in layers}
    digest, before = TokenDigest(), edit_counts(model)
    n_documents = n_tokens = 0

    def listening(batch: CorpusBatch) -> AbstractContextManager[None]:
        nonlocal n_documents, n_tokens
        real = batch.real
        digest.add(batch.tokens, real)
        prefixes = prefix_hashes(batch.tokens, real)[real]
        hooks = [hook for outputs in gathered.values() for hook in outputs.hooks(real, prefixes, n_documents)]
        n_documents += len(real)
        n_tokens += int(real.sum())
        return model.listening(hooks)

    run_batches(
        model, corpus, listening, stop_at_layer=layers[-1] + 1, n_batches=corpus.n_batches, verbose=verbose
    )
    return ExpertReference(
        layers=layers,
        n_experts=model.cfg.n_experts,
        has_shared=model.cfg.shared is not None,
        count={layer: outputs.count for layer, outputs in gathered.items()},
        mean={layer: outputs.mean for layer, outputs in gathered.items()},
        samples={layer: outputs.samples for layer, outputs in gathered.items()},
        sample_prefix={layer: outputs.prefixes for layer, outputs in gathered.items()},
        n_samples={layer: outputs.n_samples for layer, outputs in gathered.items()},
        provenance={
            "model": model.cfg.model_name,
            "revision": model.cfg.revision,
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(model),
            "edited": sorted(name for name, n in edit_counts(model).items() if n != before[name]),
            "corpus": corpus.description,
            "fingerprint": digest.hexdigest(),
            "n_documents": n_documents,
            "n_tokens": n_tokens,
            "seed": seed,
            "moe_lens": version("moe-lens"),
        },
    )


def _moe_layers(model: HookedMoE, layers: Layers) -> tuple[int, ...]:
    there = model.cfg.moe_layers
    asked = there if layers is None else layers
    named = {f"M{layer}": layer for layer in there}
    listed = tuple(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else (asked,)
    chosen: tuple[Any, ...] = tuple(
        named.get(layer, layer) if isinstance(layer, str) else layer for layer in listed
    )
    wrong = [layer for layer in chosen if isinstance(layer, bool) or layer not in there]
    if wrong or not chosen:
        problem = f"layer {wrong[0]!r} is no MoE layer" if wrong else "there is no MoE layer to gather"
        raise ValueError(f"{problem}; {model.cfg.model_name} has MoE layers {few(there) or 'nowhere'}")
    return tuple(sorted({operator.index(layer) for layer in chosen}))

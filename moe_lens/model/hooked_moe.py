"""The hooked Mixture-of-Experts language model: embed, blocks, final norm, unembed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_lens.config import MoEConfig
from moe_lens.model.attend import Attend
from moe_lens.model.block import Block
from moe_lens.model.caching import HookedModel
from moe_lens.model.conveniences import logit_difference, routing_table
from moe_lens.model.generation import generate_tokens
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.loss import loss_per_token as per_token_cross_entropy
from moe_lens.model.loss import mean_loss
from moe_lens.model.norm import RMSNorm
from moe_lens.model.observers import ObservedModel, Run, RunObservers
from moe_lens.model.text import Text, TextInterface

ReturnType = Literal["logits", "loss", "both"] | None
_TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class HookedMoE(HookedModel, TextInterface, ObservedModel):
    """A Mixture-of-Experts language model with a named hook point on every quantity of its routing.

    `HookedMoE.from_pretrained` loads a checkpoint; `HookedMoE(cfg)` alone makes the modules with whatever
    memory held (`from_pretrained` fills them). The model is in `eval()` mode and its parameters carry
    gradients; wrap runs in `torch.no_grad()` where you need none.
    """

    cfg: MoEConfig

    def __init__(self, cfg: MoEConfig, tokenizer: Any = None):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.hook_embed = HookPoint()
        self.run_observers = RunObservers()
        self.tie_embeddings()
        self.setup()
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        stream: bool = False,
        verbose: bool = True,
    ) -> HookedMoE:
        """Load a checkpoint from a directory, the Hugging Face hub, or the package (`"mini"`).

        Weights are read from safetensors, tensor by tensor, straight into their stacked places; no
        transformers model is made, nothing is unpickled and no remote code runs. Before anything is read the
        checkpoint's tensors are matched with the model's, and its size with the memory that is free.

        Args:
            path_or_hub_id: a checkpoint directory, a hub id (`"allenai/OLMoE-1B-7B-0924"`), or `"mini"`.
            dtype: None is the checkpoint's own.
            device: None is a CUDA device where there is one, else the CPU.
            revision: of a hub id.
            stream: leave the layers on disk and read each when it runs, for a checkpoint larger than memory; gives a
                `StreamedMoE`.
            verbose: say what memory it takes, and show a progress bar.

        Raises:
            UnsupportedCheckpoint: an unknown model type, or a config feature that is not implemented.
            CheckpointMismatch: missing, surplus or misshapen tensors.
            NotEnoughMemory: the model cannot fit.
        """
        from moe_lens.converters import load_pretrained

        return load_pretrained(
            path_or_hub_id, dtype=dtype, device=device, revision=revision, stream=stream, verbose=verbose
        )

    def forward(
        self,
        tokens_or_text: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"] | Text,
        *,
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
    ) -> Any:
        """Run the model.

        Args:
            tokens_or_text: tokens `[batch, pos]` (or `[pos]`, one row), one or more texts, or with
                `start_at_layer` the residual stream `[batch, pos, d_model]` that enters that layer.
            attention_mask: true (or 1) where tokens are real; made from the text when text is given. Padding
                may lie on either side. A padded query attends to itself; its outputs mean nothing.
            return_type: `"logits"` `[batch, pos, d_vocab]`; `"loss"`, the mean next-token cross-entropy over
                real tokens in nats; `"both"`; or None to run for the hooks alone.
            loss_per_token: the loss as `[batch, pos - 1]`, NaN where a position or its next token is padding.
            stop_at_layer: return the residual stream that would enter this layer (negative counts from the
                end; `n_layers` is before the final norm).
            start_at_layer: begin at this layer, from the residual stream given.

        Raises:
            ValueError: arguments that do not fit together; tokens outside the vocabulary; a row with no real
                token.
        """
        first, last = self._layer_range(start_at_layer, stop_at_layer)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}")
        if stop_at_layer is not None and return_type in ("loss", "both"):
            raise ValueError("with stop_at_layer the residual stream is returned; there is no loss to return")
        if start_at_layer is None:
            tokens, mask = self.tokens_and_mask(tokens_or_text, attention_mask)
            residual, (batch, n_columns) = None, tokens.shape
        else:
            if return_type in ("loss", "both"):
                raise ValueError(
                    "a loss needs tokens; with start_at_layer, return_type must be 'logits' or None"
                )
            tokens, residual = None, self._check_residual(tokens_or_text)
            batch, n_columns, _ = residual.shape
            mask = self._check_mask(attention_mask, residual.shape[:2])
        self.warn_beyond_context(n_columns)
        attend = Attend(self.cfg.rotary, (batch, n_columns), self.cfg.device, attention_mask=mask)
        real = (
            torch.ones(batch, n_columns, dtype=torch.bool, device=self.cfg.device) if mask is None else mask
        )
        with self.observed(Run(real, first, last, tokens)):
            if tokens is not None:
                residual = self.hook_embed(self.embed(tokens))
            assert residual is not None
            residual = self.run_blocks(residual, attend, first, last)
            if stop_at_layer is not None:
                return residual
            normalized = self.ln_final(residual)
            if return_type is None:
                return None
            logits = self.unembed(normalized)
        if return_type == "logits":
            return logits
        assert tokens is not None
        loss = per_token_cross_entropy(logits, tokens, mask)
        loss = loss if loss_per_token else mean_loss(loss, mask)
        return loss if return_type == "loss" else (logits, loss)

    def run_blocks(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        attend: Attend,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after layers first..last-1."""
        for block in list(self.blocks)[first:last]:
            residual = block(residual, attend)
        return residual

    @contextmanager
    def layers_in_memory(self, layers: Sequence[int]) -> Iterator[Iterator[Block]]:
        """Go through some layers, each with its weights in memory: here they always are, and in a streamed model
        (`StreamedMoE.layers_in_memory`) they are read."""
        yield (self.blocks[layer] for layer in layers)  # type: ignore[misc]

    # ---- input checks ----

    def warn_beyond_context(self, n_columns: int) -> None:
        """Say so where a sequence is longer than what the model was made for."""
        if n_columns > self.cfg.n_ctx:
            warnings.warn(
                f"{n_columns} positions are more than the {self.cfg.n_ctx} that {self.cfg.model_name} was made for; "
                f"what it does beyond them was never trained",
                stacklevel=3,
            )

    def tokens_and_mask(
        self,
        tokens_or_text: Int[Tensor, "batch pos"] | Text,
        attention_mask: Tensor | None = None,
        *,
        prepend_bos: bool | None = None,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
        """Checked tokens `[batch, pos]`, and the mask of real ones (None where all are)."""
        if isinstance(tokens_or_text, (str, list, tuple)):
            if attention_mask is not None:
                raise ValueError("attention_mask goes with tokens; for text it is made from the text")
            tokens, mask = self.tokenize(tokens_or_text, prepend_bos=prepend_bos)
            return tokens, None if bool(mask.all()) else mask
        tokens = tokens_or_text
        if not isinstance(tokens, Tensor) or tokens.dtype not in _TOKEN_DTYPES or tokens.ndim not in (1, 2):
            described = (
                f"{tokens.dtype} {tuple(tokens.shape)}"
                if isinstance(tokens, Tensor)
                else type(tokens).__name__
            )
            hint = (
                "; give its 'input_ids', and its 'attention_mask' as attention_mask="
                if isinstance(tokens, Mapping)
                else ""
            )
            raise ValueError(f"tokens must be integers [batch, pos] (or text), not {described}{hint}")
        tokens = (tokens if tokens.ndim == 2 else tokens[None]).to(self.cfg.device, torch.long)
        if tokens.numel() == 0:
            raise ValueError(f"there are no tokens: shape {tuple(tokens.shape)}")
        low, high = tokens.aminmax()
        if int(low) < 0 or int(high) >= self.cfg.d_vocab:
            raise ValueError(
                f"tokens {int(low)}..{int(high)} go beyond the vocabulary, 0..{self.cfg.d_vocab - 1}"
            )
        return tokens, self._check_mask(attention_mask, tokens.shape)

    def _check_mask(self, mask: Tensor | None, shape: torch.Size) -> Bool[Tensor, "batch pos"] | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask must be a tensor [batch, pos], not {type(mask).__name__}")
        mask = mask if mask.ndim == 2 else mask[None]
        if mask.shape != shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)} must have the tokens' shape {tuple(shape)}")
        mask = mask.to(self.cfg.device)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask must hold 1 (real) and 0 (padding) only")
        mask = mask.bool()
        if not bool(mask.any(dim=1).all()):
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"row {row} of attention_mask has no real token")
        return None if bool(mask.all()) else mask

    def _check_residual(self, residual: Any) -> Float[Tensor, "batch pos d_model"]:
        if (
            not isinstance(residual, Tensor)
            or not residual.is_floating_point()
            or residual.ndim != 3
            or residual.shape[-1] != self.cfg.d_model
        ):
            described = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
            raise ValueError(
                f"with start_at_layer the input is a residual stream [batch, pos, {self.cfg.d_model}], not {described}"
            )
        return residual.to(self.cfg.device, self.cfg.dtype)

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        first = 0 if start is None else start + n if start < 0 else start
        last = n if stop is None else stop + n if stop < 0 else stop
        if not 0 <= first <= last <= n:
            raise ValueError(
                f"start_at_layer={start} and stop_at_layer={stop} must be in order within this model's {n} layers"
            )
        return first, last

    # ---- conveniences ----

    def routing(
        self, tokens_or_text: Int[Tensor, "batch pos"] | Text, *, attention_mask: Tensor | None = None
    ) -> pd.DataFrame:
        """Which experts each token chose, with weights and ranks; see `routing_table`."""
        return routing_table(self, tokens_or_text, attention_mask=attention_mask)

    def logit_diff(
        self,
        prompts: Int[Tensor, "batch pos"] | Text,
        correct: Any,
        incorrect: Any,
        *,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        """logit(correct) - logit(incorrect) at each prompt's last real token; see `logit_difference`."""
        return logit_difference(
            self, prompts, correct, incorrect, attention_mask=attention_mask, prepend_bos=prepend_bos
        )

    def intervene(self, *specs: Any) -> AbstractContextManager[Any]:
        """A context in which every run is changed by interventions, and which says what they did.

            with model.intervene(Ablate("M1E9", pos=-1), TopK(4, layers=3)) as receipt:
                logits = model(tokens)
            print(receipt)

        Args:
            specs: from `moe_lens.interventions`: `Ablate`, `ForceExperts`, `ForbidExperts`, `SwapRanks`, `TopK`,
                `RouterOnly`.

        Returns:
            A context manager, which gives the `Receipt`: how many (token, layer, expert) were asked for and how many
            fired, over all runs inside.

        Raises:
            ValueError: what makes no sense in this model, at once; or for the tokens of a run, before it begins.
            UnfiredIntervention: a run in which not everything happened, or no run at all.
        """
        from moe_lens.interventions.hooks import intervene

        return intervene(self, *specs)

    def generate(
        self,
        tokens_or_text: Int[Tensor, "batch pos"] | Text,
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        stop_at_eos: bool = True,
        prepend_bos: bool | None = None,
        seed: int | None = None,
    ) -> Int[Tensor, "batch longer"] | str | list[str]:
        """Continue tokens or text, with a key-value cache; greedy, or sampled with `do_sample=True`.

        Args:
            tokens_or_text: tokens give tokens back, text gives text.
            attention_mask: for tokens padded on the left; texts are padded there.
            temperature, top_k, top_p: shape the distribution that is sampled from.
            eos_token_id: None is what the checkpoint's generation config or config says, else the tokenizer's.
            stop_at_eos: False ignores the end-of-text token.
            seed: makes a sample repeatable.
        """
        if eos_token_id is None:
            eos_token_id = list(self.cfg.eos_token_ids) or getattr(self.tokenizer, "eos_token_id", None)
        if isinstance(tokens_or_text, Tensor):
            tokens, mask = self.tokens_and_mask(tokens_or_text, attention_mask)
        else:
            if attention_mask is not None:
                raise ValueError("attention_mask goes with tokens; for text it is made from the text")
            tokens, mask = self.tokenize(tokens_or_text, prepend_bos=prepend_bos, padding_side="left")
        out = generate_tokens(
            self,
            tokens,
            mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id if stop_at_eos else None,
            seed=seed,
        )
        if isinstance(tokens_or_text, Tensor):
            return out
        assert mask is not None
        rows = [row[int((~real).sum()) :] for row, real in zip(out, mask, strict=True)]
        texts = [self._require_tokenizer().decode(row.tolist(), skip_special_tokens=True) for row in rows]
        return texts[0] if isinstance(tokens_or_text, str) else texts

    # ---- what TransformerLens's ActivationCache and patching read ----

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """No family has an unembedding bias: zeros."""
        return self.unembed.weight.new_zeros(self.cfg.d_vocab)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """The directions whose inner product with a normalised (not yet multiplied by the final gain) stream
        is the token's logit: columns of W_U with the final norm's gain folded in."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.cfg.device)
        return self.unembed.weight[index] * self.ln_final.w

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The attention output biases written before `layer` (and, with `mlp_input`, by its own attention).
        MLPs have none, so `include_mlp_biases` changes nothing."""
        total = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        for block in list(self.blocks)[: layer + int(mlp_input)]:
            total = total + block.attn.b_O  # type: ignore[union-attr,operator]
        return total

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Compute every head's output apart, at `attn.hook_result`, on every run."""
        self.cfg = replace(self.cfg, use_attn_result=use_attn_result)
        for block in self.blocks:
            block.attn.use_attn_result = use_attn_result  # type: ignore[union-attr]

    def tie_embeddings(self) -> None:
        """Let the unembedding share the embedding's weight, where the checkpoint does."""
        if self.cfg.tied_embeddings:
            self.unembed.weight = self.embed.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HookedMoE:
        """Moving the model (`to`, `half`, `cuda`, ...) also moves what `cfg` says, and keeps weights tied."""
        super()._apply(fn, recurse)
        self.tie_embeddings()
        self.cfg = replace(self.cfg, device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return self

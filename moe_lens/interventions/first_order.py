"""What linear arithmetic predicts of a removal: first-order attribution and direct logit attribution.

    first_order = - <dL_t/dc_t, c_t>                                     nats
    direct      = <c_t, gamma * (W_U[:, next] - mean W_U)> / s_final(t)  logits, relative to the mean logit

with c_t an expert's contribution at a token and L_t the loss at the same token only. The gradient is that of a replay's
null branch, where the keys and values of earlier tokens are constants: each L_t depends on one branch alone, so one
backward pass of their sum gives every dL_t/dc_t apart. A backward pass of the summed loss of a plain run would add the
effects on later positions.

Source: first-order (gradient times activation) attribution as in Molchanov et al. 2017, arXiv:1611.06440, eq. 7, with
its sign; direct logit attribution as in Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.replay_attend import ReplayAttend
from moe_lens.interventions.replay_plan import HELP, branch_bytes
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import require_gradients_of
from moe_lens.out_of_memory import InParts


def require_gradients(model: HookedMoE) -> None:
    """Raises:
    ValueError: there can be none here.
    """
    require_gradients_of(model, "first_order")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "first_order needs gradients, and torch.inference_mode() forbids them; torch.no_grad() does not"
        )


def loss_gradients(
    clean: CleanRun, rows: Int[Tensor, " n"], memory_budget: int = 2**30
) -> Float[Tensor, "layer n d_model"]:
    """dL_t / d(stream after each layer at t), of the loss at t alone; nats per unit, in float32.

    What any component of a layer adds to the stream has this gradient: the stream is their sum.

    Args:
        clean: the document.
        rows: tokens that have a next one, as places among the document's, ascending.
        memory_budget: bytes for what the backward pass keeps.

    Raises:
        ValueError: inside of `torch.inference_mode()`; a streamed model.
    """
    model = clean.model
    require_gradients(model)
    step = max(1, memory_budget // (branch_bytes(model, len(clean.tokens)) * model.cfg.n_layers))
    in_parts = InParts("tokens' gradients", HELP, step)
    return torch.cat(in_parts.run(lambda part: _gradients(clean, rows[part]), len(rows)), dim=1)


def _gradients(clean: CleanRun, rows: Int[Tensor, " n"]) -> Float[Tensor, "layer n d_model"]:
    model, attend = clean.model, ReplayAttend(clean, rows)
    streams: list[Tensor] = []
    with torch.enable_grad():
        stream = model.embed(clean.tokens[rows])[:, None].detach().requires_grad_()
        for block in model.blocks:
            stream = block(stream, attend)
            streams.append(stream)
        logits = model.unembed(model.ln_final(stream))[:, 0].float()
        loss = F.cross_entropy(logits, clean.next_tokens[rows], reduction="sum")
        gradients = torch.autograd.grad(loss, streams)
    return torch.stack([gradient[:, 0].float() for gradient in gradients])


def first_order(
    gradients: Float[Tensor, "layer n d_model"], values: MoEValues, rows: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"] | None]:
    """-<dL_t/dc_t, c_t> of every slot, and of the shared experts; nats.

    Args:
        gradients: of the same rows (`loss_gradients`).
        values: the layer.
    """
    return _read(-gradients[values.layer], values, rows)


def direct(
    clean: CleanRun, values: MoEValues, rows: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"] | None]:
    """What every slot, and the shared experts, add to the next token's logit beyond the mean logit; logits."""
    with torch.no_grad():
        return _read(_next_token_directions(clean, rows) / final_scale(clean, rows), values, rows)


def direct_before_scale(
    clean: CleanRun, values: MoEValues, rows: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"] | None]:
    """`direct` times `final_scale`, for a clean run whose final stream is not known yet."""
    with torch.no_grad():
        return _read(_next_token_directions(clean, rows), values, rows)


def _next_token_directions(clean: CleanRun, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    model = clean.model
    unembedding = model.unembed.weight
    # Never all of it in float32: for a large vocabulary that is gigabytes.
    wanted = unembedding[clean.next_tokens[rows]].float() - unembedding.mean(dim=0, dtype=torch.float32)
    return wanted * model.ln_final.w.float()


@torch.no_grad()
def final_scale(clean: CleanRun, rows: Int[Tensor, " n"]) -> Float[Tensor, "n 1"]:
    """s_final at some tokens, in float32."""
    return (clean.final[rows].float().square().mean(dim=-1, keepdim=True) + clean.model.cfg.eps).sqrt()


def _read(
    directions: Float[Tensor, "n d_model"], values: MoEValues, rows: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"] | None]:
    with torch.no_grad():
        slots = torch.linalg.vecdot(values.contrib[rows].float(), directions[:, None])
        if values.shared_out is None:
            return slots, None
        return slots, torch.linalg.vecdot(values.shared_out[rows].float(), directions)

"""What must not pass in silence: broken numbers, and edits that would change a run without a word."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lens import HookedMoE
from moe_lens.converters import CheckpointMismatch, UnsupportedCheckpoint, loading
from tests.families import FAMILIES, hf_model, prompts, write_checkpoint

# --- broken numbers -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_nan_at_a_real_position_reaches_the_mean_loss(hooked: Any) -> None:
    """The mean takes positions by the mask: a broken one is not mistaken for padding."""
    model, (tokens, mask) = hooked("olmoe"), prompts()

    def break_one(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[0, 2] = torch.nan
        return value

    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    for attention_mask in (None, mask):
        loss = model.run_with_hooks(
            tokens, attention_mask=attention_mask, return_type="loss", fwd_hooks=[(last, break_one)]
        )
        assert loss.isnan()
        assert model(tokens, attention_mask=attention_mask, return_type="loss").isfinite()


@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_rot_q", "hook_rot_k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_nan_in_queries_and_keys_does_not_vanish(hooked: Any, variant: str, bad: float, point: str) -> None:
    """torch's fused attention on the CPU gives z = 0 for a NaN query; a run must show it."""
    model, (tokens, _) = hooked(variant), prompts()

    def break_one(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, 1, 0, -1] = bad
        return value

    logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.attn.{point}", break_one)])
    assert not logits.isfinite().all()
    assert model(tokens).isfinite().all()


def test_weights_that_are_not_finite_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "broken"))
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"layers.1.self_attn.q_proj.weight holds NaN or infinity"):
        HookedMoE.from_pretrained(directory, device="cpu", verbose=False)


def test_a_narrower_dtype_that_overflows_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "large"))
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() * 1e6
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"model.norm.weight holds NaN or infinity in torch.float16"):
        HookedMoE.from_pretrained(directory, dtype=torch.float16, device="cpu", verbose=False)


def test_float64_is_refused(checkpoint: Any) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="float64 is not implemented"):
        HookedMoE.from_pretrained(checkpoint("olmoe"), dtype=torch.float64, verbose=False)


# --- edits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_an_edit_of_another_shape_raises_at_every_hook(hooked: Any, variant: str) -> None:
    model, (tokens, _) = hooked(variant), prompts()
    for name in model.hook_dict:
        if name.endswith("hook_expert_indices"):
            continue
        with pytest.raises(ValueError, match=rf"{name}: an edit must keep the shape"):
            model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value[:1])])


@torch.no_grad()
def test_an_edit_that_is_no_tensor_raises(hooked: Any) -> None:
    with pytest.raises(TypeError, match=r"blocks.0.hook_mlp_out: an edit must be a tensor, not float"):
        hooked("olmoe").run_with_hooks(
            prompts()[0], fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 0.0)]
        )


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_a_float32_edit_works_at_every_hook_in_half_precision(checkpoint: Any, variant: str) -> None:
    """It is cast to the value's dtype: the same as casting it oneself."""
    model = HookedMoE.from_pretrained(checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False)
    tokens = prompts()[0]
    for name in model.hook_dict:
        if name.endswith("hook_expert_indices"):
            continue
        wide = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value.float() * 1.25)])
        cast = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda value, hook: (value.float() * 1.25).to(value.dtype))]
        )
        assert wide.dtype == torch.bfloat16
        assert torch.equal(wide, cast), name


# --- routing ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_banned_experts_do_not_let_others_in_from_outside_the_best_groups(hooked: Any) -> None:
    """With logits at -inf every probability in a group may be 0; experts outside the best groups stay out."""
    model, (tokens, _) = hooked("deepseek_v2_groups"), prompts()
    layer, cfg = model.cfg.moe_layers[0], model.cfg.router
    names = [
        f"blocks.{layer}.mlp.{p}"
        for p in ("hook_expert_weights", "hook_expert_indices", "hook_routing_weights")
    ]
    cache: dict[str, torch.Tensor] = {}

    def ban(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.masked_fill(torch.arange(cfg.n_experts) % 2 == 0, -torch.inf)

    def keep(value: torch.Tensor, hook: Any) -> None:
        cache[hook.name] = value

    hooks = [(f"blocks.{layer}.mlp.hook_router_logits", ban), *((name, keep) for name in names)]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    probabilities, indices, weights = (cache[name] for name in names)
    groups = probabilities.unflatten(-1, (cfg.n_groups, -1))
    best = groups.amax(-1).topk(cfg.top_k_groups).indices
    group_of = indices // (cfg.n_experts // cfg.n_groups)
    assert (group_of[..., :, None] == best[..., None, :]).any(-1).all()
    assert torch.allclose(weights, probabilities.gather(-1, indices) * cfg.scaling_factor)
    assert (probabilities.gather(-1, indices) == 0).any(), (
        "no token was short of experts: the test shows nothing"
    )


@torch.no_grad()
def test_ranks_of_a_forced_choice_go_by_weight(hooked: Any) -> None:
    model, (tokens, _) = hooked("olmoe"), prompts()
    plain = model.routing(tokens)
    model.add_hook(
        lambda name: name.endswith("hook_expert_indices"),
        lambda value, hook: value.flip(-1),
        is_permanent=False,
    )
    try:
        forced = model.routing(tokens)
    finally:
        model.reset_hooks()
    columns = ["document", "position", "layer", "rank", "expert"]
    assert forced[columns].equals(plain[columns])


# --- checkpoints --------------------------------------------------------------------------------------------


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """Saving again, in one file, leaves an old index behind; transformers reads the file, and so do we."""
    write_checkpoint("olmoe", tmp_path, max_shard_size="20KB", seed=0)
    assert (tmp_path / "model.safetensors.index.json").exists()
    write_checkpoint("olmoe", tmp_path, max_shard_size="1GB", seed=1)
    if not (tmp_path / "model.safetensors.index.json").exists():
        pytest.skip("this version of transformers removes the old index")
    tokens = prompts()[0]
    with torch.no_grad():
        ours = HookedMoE.from_pretrained(tmp_path, device="cpu", verbose=False)(tokens)
        theirs = hf_model(tmp_path)(tokens).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-5


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_unembedding_under_a_tied_config(tmp_path: Path, same: bool) -> None:
    """It may be stored twice, if it is the same; transformers would not tie another one."""
    write_checkpoint("qwen2_moe", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if not same:
        with pytest.raises(CheckpointMismatch, match=r"tie_word_embeddings=true, but lm_head.weight"):
            HookedMoE.from_pretrained(tmp_path, device="cpu", verbose=False)
        return
    model = HookedMoE.from_pretrained(tmp_path, device="cpu", verbose=False)
    assert model.unembed.weight is model.embed.weight


def test_a_config_without_dtype_takes_the_files(tmp_path: Path) -> None:
    write_checkpoint("olmoe", tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None), config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert HookedMoE.from_pretrained(tmp_path, device="cpu", verbose=False).cfg.dtype == torch.bfloat16


def test_nothing_large_is_fetched_for_a_checkpoint_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub the config comes first; weights only when everything it says can be done."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    asked: list[list[str]] = []

    def fetch(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    with pytest.raises(UnsupportedCheckpoint, match="no converter for model type 'llama'"):
        HookedMoE.from_pretrained("someone/something")
    assert asked
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)


def test_generation_ends_where_the_checkpoint_says(checkpoint: Any, tmp_path: Path) -> None:
    """Several end tokens in generation_config.json, no tokenizer: the same tokens as transformers' generate."""
    directory = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "ends"))
    for tokenizer_file in directory.glob("tokenizer*"):
        tokenizer_file.unlink()
    tokens = prompts()[0]
    free = HookedMoE.from_pretrained(directory, device="cpu", verbose=False).generate(
        tokens, 8, stop_at_eos=False
    )
    ends = [int(free[0, tokens.shape[1] + 2]), int(free[-1, tokens.shape[1] + 4])]
    stored = {"eos_token_id": ends, "pad_token_id": 3, "bos_token_id": 1}
    (directory / "generation_config.json").write_text(json.dumps(stored))
    ours = HookedMoE.from_pretrained(directory, device="cpu", verbose=False).generate(tokens, 8)
    theirs = hf_model(directory).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, free[:, : ours.shape[1]])


def test_more_positions_than_the_context_warn(hooked: Any) -> None:
    model = hooked("olmoe")
    tokens = torch.zeros(1, model.cfg.n_ctx + 1, dtype=torch.long)
    with torch.no_grad(), pytest.warns(UserWarning, match="more than the") as raised:
        model(tokens, return_type=None)
    assert len(raised) == 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens[:, 1:], return_type=None)

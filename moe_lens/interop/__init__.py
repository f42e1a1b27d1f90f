"""The routing vocabulary on models that are held elsewhere: `moe_lens.interop.transformers` for any transformers MoE
that uses transformers' experts interface."""

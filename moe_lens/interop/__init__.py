"""The routing vocabulary on models that are held elsewhere: `moe_lens.interop.transformers` for any transformers MoE
that uses transformers' experts interface, `moe_lens.interop.transformer_lens` for a TransformerBridge of one,
`moe_lens.interop.shared_weights` for a HookedMoE on a transformers model's own memory, and `moe_lens.interop.nnsight`
for a model in nnsight, here or on a server."""

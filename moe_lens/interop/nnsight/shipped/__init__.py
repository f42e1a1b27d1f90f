"""What runs inside a trace, here or on a server: functions that travel by their source.

A server has nnsight, torch, transformers and einops, and not this package. So everything here is a plain function: it
has no decorator and no `self`, reads nothing of the package but these modules, imports torch, einops and math alone,
and gives tensors, numbers, dicts and lists. What it has to know of a model comes as a dict of plain `facts`
(`moe_lens.interop.nnsight.model.facts_of`). A test sees to all of this.

A server may run its models under autocast. The model's own values are what they are there; what is computed from them
here is computed as written, with autocast off. Only computations are inside of that `with`: a value that is waited for
is made by the model meanwhile, on the same thread, and would be made without autocast too.
"""

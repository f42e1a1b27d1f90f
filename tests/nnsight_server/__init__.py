"""A small stand-in for an NDIF server, in a process of its own, so that what fails on a real one fails in tests.

It speaks the protocol of nnsight's client (0.8): a websocket for the updates of a job, a request with the traced
block, its result on the socket or by URL. The block is rebuilt and run by nnsight's own functions, against models
that the process holds, as an NDIF server does for a trusted key (github.com/ndif-team/ndif,
`services/ray/deployments/modeling`): no gradients for parameters, autocast for half-precision models, a limit of
time, printed text sent as it comes, errors of the block as tracebacks. moe_lens, and all that nnsight, torch and
transformers do not need, cannot be imported there, and the client's files cannot be opened.

    with serve({"olmoe": directory}) as server, as_client_of(server):
        lm = client(directory)  # config and tokenizer only, on the meta device
        with lm.trace("some text", remote=True):  # or remote=server.url
            ...
        server.jobs()[-1]["payload_bytes"]

Tests take the fixture `nnsight_server` of `tests/conftest.py`: one server for all of them, which holds every family.

    nnsight_server.add("half", directory, torch.bfloat16)  # one more model
    with nnsight_server.limits(trusted=False):  # as for a key whose blocks reach no weights
        ...

What it does not show: a GPU, several jobs at once, models that are loaded when first asked for, the pickling of every
value that a block reads for a key that is not trusted, and what NDIF's runner has instead of nnsight's `.source`.
"""

from tests.nnsight_server.running import (
    API_KEY,
    LARGEST_ON_SOCKET,
    OWNER,
    Server,
    as_client_of,
    client,
    serve,
)

__all__ = ["API_KEY", "LARGEST_ON_SOCKET", "OWNER", "Server", "as_client_of", "client", "serve"]

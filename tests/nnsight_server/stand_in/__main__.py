"""Start the server: hide what a server does not have, load the models, say the port, serve until stdin closes.

The one argument is JSON: `models` (a list of `Service.add`'s arguments), `hidden` (directories whose files are only the
client's), `api_key`, and `seconds`, `largest_on_socket` and `trusted`, for which see `tests.nnsight_server.serve`.
The first line of stdout is the port.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from .environment import hide_all_else, hide_files


async def main(options: dict[str, Any]) -> None:
    # Only now, so that what these import is chosen from what is left.
    import torch
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets

    from .service import Service, application

    torch.set_num_threads(1)
    models, hidden = options.pop("models"), options.pop("hidden")
    service = Service(**options)
    hide_files(hidden, service.shown)
    for model in models:
        service.add(**model)
    sockets = bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    service.url = f"http://127.0.0.1:{port}"
    server = HTTPServer(application(service), max_buffer_size=1 << 30, max_body_size=1 << 30)
    server.add_sockets(sockets)
    print(port, flush=True)
    jobs = asyncio.create_task(service.runner.forever())
    # Whoever started this holds the other end of stdin: when it goes, so does this.
    closed = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    done, _ = await asyncio.wait({jobs, closed}, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


if __name__ == "__main__":
    hide_all_else(__package__ or "stand_in")
    asyncio.run(main(json.loads(sys.argv[1])))

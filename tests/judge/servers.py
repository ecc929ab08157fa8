"""A lexicon judge behind a socket, for as long as a test needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.judge.fakes import lexicon_judge


@contextmanager
def serving(**options: Any) -> Iterator[Any]:
    """The server; its `url`, `hits` and `num_faults`."""
    module = lexicon_judge()
    server = module.LexiconServer(0, module.Options(**options))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def api(server: Any, **given: Any) -> dict[str, Any]:
    """The `api` section that leads to it."""
    return {"provider": "local", "model": "lexicon", "base_url": server.url} | given

"""A server over a quick run, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from orchard.serving.running import make_server


@contextmanager
def serving(folders: Sequence[Path], **options: Any) -> Iterator[str]:
    """Serve runs and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = {"key_file": None, "max_models": 2, "is_insecure": False, **options}
    server: uvicorn.Server = make_server(folders, host="127.0.0.1", port=port, **asked)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()

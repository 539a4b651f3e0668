"""Commands of a shell without the seconds that each would spend on imports.

A process that has imported everything forks for every command. What a shell finds under the
command's name is a few lines that hand over their arguments, folder, environment and open files,
and exit as the fork does.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_FILES = 3
_SHELL_COMMAND = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    asked = {{"script": {script!r}, "argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ)}}
    content = json.dumps(asked).encode()
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(content)
    sys.exit(int(connection.recv(16) or b"70"))
"""


@contextlib.contextmanager
def warm(path: Path) -> Iterator[Path]:
    """Keep such a process behind the socket ``path`` until the context is left."""
    process = subprocess.Popen([sys.executable, __file__, path])
    try:
        while not path.exists():
            assert process.poll() is None, "the warm process must start"
            time.sleep(0.05)
        yield path
    finally:
        process.terminate()
        process.wait()


def write_command(file: Path, script: str, path: Path) -> None:
    """Write an executable that runs ``script`` with its arguments in the warm process."""
    text = _SHELL_COMMAND.format(python=sys.executable, path=str(path), script=script)
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)


def _serve(path: str) -> None:
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401

    import orchard.api
    import orchard.cli  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    code = 70
    try:
        size, files, *_ = socket.recv_fds(connection, 4, _FILES)
        content = b""
        while len(content) < int.from_bytes(size, "big"):
            content += connection.recv(2**16)
        asked = json.loads(content)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv = asked["argv"]
        try:
            runpy.run_path(asked["script"], run_name="__main__")
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        connection.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])

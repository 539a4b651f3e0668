"""The two apps that Flower looks up by name; both hand over at once.

A ClientApp process lives for one message. It passes it to the site's worker and waits. It
imports no model code.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from orchard.communication.refusals import Code
from orchard.engine.flower_messages import pack, unpack
from orchard.engine.worker import WorkerError, ask

log = logging.getLogger(__name__)
client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Let the site's worker train."""
    return _answer(message, context)


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Let the site's worker answer what is no training: who it is, whether it joins, evaluation."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    # What this process may say is a code: an error's message may hold what is private here.
    try:
        header, body = unpack(message.content)
        socket = Path(str(context.node_config["socket"]))
        reply, content = ask(
            socket, header, body, seconds=float(context.node_config["patience_seconds"])
        )
    except WorkerError as error:
        log.warning("%s", error)
        reply, content = {"error": str(error.code)}, b""
    except Exception:
        log.exception("a message could not be handed to the worker")
        reply, content = {"error": str(Code.FAILED)}, b""
    return Message(pack(reply, content), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run whose folder the coordinator names."""
    from orchard.deployment.server_app import run_in_server_app

    run_in_server_app(Path(str(context.run_config["folder"])), grid)

"""The two apps that Flower looks up by name; both hand over at once.

A ClientApp process lives for one message. It passes it to the site's worker and waits. It
imports no model code.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from orchard.engine.flower_messages import pack, unpack
from orchard.engine.worker import WorkerError, ask

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
    try:
        header, body = unpack(message.content)
        socket = Path(str(context.node_config["socket"]))
        reply, content = ask(
            socket, header, body, seconds=float(context.node_config["patience_seconds"])
        )
    except (WorkerError, ValueError) as error:
        reply, content = {"error": str(error)}, b""
    return Message(pack(reply, content), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run whose folder the coordinator names."""
    from orchard.deployment.server_app import run_in_server_app

    run_in_server_app(Path(str(context.run_config["folder"])), grid)

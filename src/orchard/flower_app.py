"""The two apps that Flower looks up by name; both hand over at once.

A ClientApp process lives for one message. It passes it to the site's worker and waits. It
imports no model code. Our own SuperNode (``engine/supernode.py``) starts none; Flower's would.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from orchard.engine.handing_over import answered

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
    told = context.node_config
    seconds = float(told["patience_seconds"])
    return Message(
        answered(message.content, Path(str(told["socket"])), seconds=seconds), reply_to=message
    )


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run whose folder the coordinator names."""
    from orchard.deployment.server_app import run_in_server_app

    run_in_server_app(Path(str(context.run_config["folder"])), grid)

"""The commands that look into a trained model: which experts it uses, how far its grafts open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchard.cli.errors import BAD_INPUT, clear_errors
from orchard.cli.models import ClientOption, DeviceOption, ModelOption, RoundOption, choose_model
from orchard.cli.parameters import JsonOption, Traceback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from orchard.personal.observing import LayerLoad, Openness

RunArgument = Annotated[
    Path, typer.Argument(help="A run's folder, or a site's store.", show_default=False)
]


def load(
    run: RunArgument,
    data: Annotated[Path, typer.Option(help="Text: rows with a column of it, or a .txt.")],
    client: ClientOption = None,
    round_number: RoundOption = None,
    column: Annotated[str, typer.Option(help="Which column holds the text.")] = "text",
    max_texts: Annotated[int, typer.Option(help="No more texts than these.", min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(help="Of each text.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 8,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Count which experts a text's tokens choose: in the base, the global and a client's model."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.engine.progress import make_console
        from orchard.experiment.run_folder import recipe_digest
        from orchard.personal.observing import (
            deviation_of_all,
            file_digest,
            measure_load,
            read_texts,
        )
        from orchard.results import environment
        from orchard.tables import print_table

        texts = read_texts(data, column=column, max_texts=max_texts)
        own = choose_model(run, client=client, round_number=round_number, model=model)
        states = {"base": own.as_base()}
        if own.shared:
            states["global"] = (
                choose_model(run, is_global=True, round_number=round_number, model=model)
                if own.client_id is not None
                else own
            )
        if own.client_id is not None:
            states["personal"] = own
        found = measure_load(
            states, texts, max_tokens=max_tokens, batch_size=batch_size, device=device
        )
        if as_json:
            about: dict[str, Any] = {
                "client": own.client_id,
                "round": own.round_number,
                "method": own.recipe.strategy.name,
                "seed": own.recipe.seed,
                "recipe_digest": recipe_digest(own.recipe),
                "base_digest": own.base_digest,
                "text": data.name,
                "text_digest": file_digest(data),
                "num_texts": len(texts),
                "max_tokens": max_tokens,
            }
            models = {
                name: {
                    "deviation": deviation_of_all(loads),
                    "layers": [layer.as_record() for layer in loads],
                }
                for name, loads in found.items()
            }
            print(json.dumps({**about, **environment(), "models": models}, indent=1))
        else:
            title = f"Tokens per expert, {len(texts)} texts of {data.name}"
            print_table(make_console(), load_table(found, title=title))


def load_table(found: Mapping[str, Sequence[LayerLoad]], *, title: str) -> Table:
    """Return layers as rows, and deviation and entropy of each model as columns."""
    from rich.table import Table

    from orchard.personal.observing import deviation_of_all

    table = Table("layer", title=title, title_justify="left")
    for name in found:
        table.add_column(f"{name}: deviation", justify="right")
        table.add_column("entropy", justify="right")
    for layers in zip(*found.values(), strict=True):
        cells = [(f"{own.deviation:,.1f}", f"{own.entropy:.3f}") for own in layers]
        table.add_row(layers[0].layer, *(cell for pair in cells for cell in pair))
    totals = [(f"{deviation_of_all(own):,.1f}", "") for own in found.values()]
    table.add_row("all", *(cell for pair in totals for cell in pair))
    return table


def gates(
    run: RunArgument,
    data: Annotated[Path, typer.Option(help="Examples, as the run's own are.")],
    client: ClientOption = None,
    round_number: RoundOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Show how far a client's grafts open, by layer and kind of token."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from dataclasses import asdict

        from orchard.engine.progress import make_console
        from orchard.personal.observing import measure_gates
        from orchard.tables import print_table

        state = choose_model(run, client=client, round_number=round_number, model=model)
        found = measure_gates(state, data, device=device)
        if as_json:
            print(json.dumps([asdict(own) for own in found], indent=1))
        else:
            title = f"How far the grafts of {state.client_id} open, on {data.name}"
            print_table(make_console(), gates_table(found, title=title))


def gates_table(found: Sequence[Openness], *, title: str) -> Table:
    """Return layers as rows and kinds of tokens as columns."""
    from rich.table import Table

    from orchard.personal.observing import KINDS

    values = {(own.layer, own.kind): own for own in found}
    kinds = [kind for kind in KINDS if any(own.kind == kind for own in found)]
    table = Table("layer", title=title, title_justify="left")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for layer in dict.fromkeys(own.layer for own in found):
        table.add_row(layer, *(f"{100 * values[layer, kind].mean:.2f} %" for kind in kinds))
    counts = {own.kind: own.num_tokens for own in found}
    table.add_row("tokens", *(f"{counts[kind]:,}" for kind in kinds))
    return table

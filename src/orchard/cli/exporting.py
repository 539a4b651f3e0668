"""Commands that hand a trained model on, and take one back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchard.cli.errors import BAD_INPUT, clear_errors
from orchard.cli.models import ModelOption, RoundOption
from orchard.cli.parameters import Traceback
from orchard.cli.resuming import is_run


def export(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, or a site's store.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The new folder.", show_default=False)],
    client: Annotated[str, typer.Option(help="Whose personal model.")] = "",
    is_global: Annotated[bool, typer.Option("--global", help="The global model.")] = False,
    round_number: RoundOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="What was trained of the base, for PEFT.")
    ] = False,
    graft: Annotated[
        bool, typer.Option("--graft", help="The client's grafts and gates alone.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; by default as the run computed.")
    ] = "",
    layout: Annotated[
        str,
        typer.Option("--as", help="family or qwen2_moe; by default one without code if there is."),
    ] = "auto",
    model: ModelOption = None,
    traceback: Traceback = False,
) -> None:
    """Write a trained model as a folder that transformers, or PEFT, loads without Orchard."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        if bool(client) == is_global and (client or is_run(run)):
            raise ValueError(
                f"one of --client ID and --global must be given, got "
                f"{'both' if client else 'neither'}; a run has a model for each client, and one "
                "for all"
            )
        if adapter and graft:
            raise ValueError("one of --adapter and --graft must be given, got both")
        if dtype not in ("", "float32", "bfloat16"):
            raise ValueError(
                f"--dtype must be float32 or bfloat16, got {dtype}; leave it out for the run's"
            )
        if layout not in ("auto", "family", "qwen2_moe"):
            raise ValueError(
                f"--as must be family or qwen2_moe, got {layout}; leave it out for one without "
                "code where there is"
            )
        if layout != "auto" and (adapter or graft):
            raise ValueError(
                f"--as must be left out with --adapter and --graft, got {layout}; it says how a "
                "whole folder is written"
            )
        from orchard.export.parts import export_adapter, export_graft
        from orchard.export.writing import check_new
        from orchard.personal.choosing import choose_state

        check_new(out)
        state = choose_state(
            run,
            client=client or None,
            model="global" if is_global else None,
            round_number=round_number,
        )
        if model is not None:
            state = state.on_base(model)
        if graft:
            num_bytes = export_graft(state, out)
            print(f"{out}: {num_bytes:,} bytes, for the base {state.base_digest[:12]}")
        elif adapter:
            num_bytes = export_adapter(state, out)
            print(f"{out}: {num_bytes:,} bytes; PeftModel.from_pretrained(base, {str(out)!r})")
        else:
            from orchard.export.folder import export_model
            from orchard.models.stored.sources import without_progress_bars

            with without_progress_bars():
                done = export_model(
                    state,
                    out,
                    dtype=dtype or None,
                    layout=layout,  # type: ignore[arg-type]
                    run=run,
                )
            trust = "" if done.is_stock else ", trust_remote_code=True"
            print(
                f"{out}: {done.num_bytes:,} bytes; "
                f"{done.loader}.from_pretrained({str(out)!r}{trust})"
            )


def import_part(
    parts: Annotated[
        list[Path],
        typer.Argument(help="Folders of orchard export --graft or --adapter.", show_default=False),
    ],
    into: Annotated[
        Path,
        typer.Option(
            "--into",
            help="A run's folder or a site's store, for grafts; a new folder becomes a run.",
            show_default=False,
        ),
    ],
    client: Annotated[str, typer.Option(help="Whose grafts they become.")] = "",
    model: Annotated[str, typer.Option(help="Where the base of a new run is.")] = "",
    traceback: Traceback = False,
) -> None:
    """Put exported grafts back into a run on the same base, or make a run of exported parts."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.export.importing import import_into, make_run

        if not into.exists():
            print(make_run(parts, into, model=model or None, client=client or None))
            return
        if model:
            raise ValueError(
                f"--model must be left out where --into is a run, got {model}; the run knows its "
                "base"
            )
        if len(parts) != 1:
            raise ValueError(
                f"PART must be one folder where --into is a run, got {len(parts)}; import one "
                "after the other"
            )
        print(import_into(parts[0], into, client=client or None))

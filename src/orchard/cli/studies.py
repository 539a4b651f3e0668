"""The command that runs a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchard.cli.errors import BAD_INPUT, FAILED, clear_errors
from orchard.cli.parameters import Overrides, Traceback


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of its runs and report; by default runs/STUDY.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="So many runs at once, a process of one thread each.", min=1)
    ] = 1,
    traceback: Traceback = False,
) -> None:
    """Run what a study lacks, and write its report: methods beside a reference, with intervals."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.studies.design import read_design
        from orchard.studies.running import check_study

        design = read_design(file, overrides or ())
        check_study(design)
    folder = out or Path("runs") / file.stem
    with clear_errors(code=FAILED, traceback=traceback):
        from orchard.engine.processes import leaves_on_termination, only_one
        from orchard.studies.reporting import write_report
        from orchard.studies.running import Progress, run_study

        def report(progress: Progress) -> None:
            write_report(design, progress, folder)

        alone = only_one(folder / "study.lock", seconds=1.0, what="writer of a study's folder")
        with leaves_on_termination(), alone:
            progress = run_study(
                design,
                folder,
                jobs=jobs,
                tell=lambda text: print(text, flush=True),
                changed=report,
            )
            report(progress)
    print(f"the report is {folder / 'report.md'}")

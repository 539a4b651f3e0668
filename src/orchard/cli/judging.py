"""The command that has two models' answers judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchard.cli.errors import BAD_INPUT, FAILED, clear_errors
from orchard.cli.models import ClientOption, DeviceOption, ModelOption, choose_model
from orchard.cli.parameters import Traceback


def judge(
    run_a: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    questions: Annotated[Path, typer.Option(help="Rows with turns or question.")],
    endpoint: Annotated[str, typer.Option(help="Base URL of the judge, with its /v1.")],
    judge_model: Annotated[str, typer.Option("--judge", help="The judge's name there.")],
    out: Annotated[Path, typer.Option(help="File for answers, judgments and result.")],
    run_b: Annotated[
        Path | None,
        typer.Argument(help="Another run's; without it, RUN_A's base.", show_default=False),
    ] = None,
    client: ClientOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for one judgment.", min=0.1)] = 120.0,
    retries: Annotated[int, typer.Option(help="Tries after the first.", min=0)] = 3,
    model: ModelOption = None,
    device: DeviceOption = None,
    traceback: Traceback = False,
) -> None:
    """Have two models' answers compared by a judge, in both orders; go on where it was cut off."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.personal import judging
        from orchard.personal.judge_endpoint import Endpoint

        asked = judging.read_questions(questions)
        where = Endpoint(endpoint, judge_model, timeout_seconds=timeout, retries=retries)
        first = choose_model(run_a, client=client, model=model)
        second = (
            first.as_base() if run_b is None else choose_model(run_b, client=client, model=model)
        )
    with clear_errors(code=FAILED, traceback=traceback):
        result = judging.judge(
            (first, second),
            asked,
            where.ask,
            out,
            about={"endpoint": where.url, "judge": where.model},
            max_new_tokens=max_new_tokens,
            device=device,
            tell=lambda text: print(text, flush=True),
        )
    interval = ""
    if result["lead"] is not None:
        lead, low, high = (100 * result[key] for key in ("lead", "low", "high"))
        seen = "" if low > 0 or high < 0 else ", no difference seen"
        interval = f"; lead {lead:+.1f} % [{low:+.1f}, {high:+.1f}]{seen}"
    print(
        f"A against B: {result['win']} won, {result['tie']} tied, {result['loss']} lost, "
        f"{result['not_scored']} not scored ({result['malformed']} malformed judgments){interval}"
    )

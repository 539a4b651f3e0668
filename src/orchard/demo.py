"""The demo: four offices of an invented country, and what federation with experts gives them."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from orchard.catalog import find_recipe
from orchard.data import world
from orchard.engine.progress import choose_reporter, format_bytes, make_console
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.extras import lacking
from orchard.personal.opening import open_model
from orchard.personal.state import read_state
from orchard.recipe.reading import read_recipe
from orchard.results import write_json
from orchard.tables import print_table

# Which of a run's models a person uses at the end of each method.
_MODEL = {"local": "personal", "fedavg": "global", "orchard": "personal", "flex": "personal"}
_OFFICE = "harbor"  # whose model answers at the end
_LABEL = {
    "base": "base",
    "local": "Local",
    "fedavg": "FedAvg",
    "orchard": "Orchard",
    "flex": "FLEx",
}


def run_demo(folder: Path, *, seed: int) -> dict[str, Any]:
    """Run every method on the same data and steps, print a table, write a summary.

    Args:
        folder: Each method runs in a folder below it; ``summary.json`` is written here. A demo
            that was cut off there is continued, a finished one starts over.
        seed: Of the whole demo.

    Returns:
        The content of ``summary.json``: what it ran on and on what, as in ``result.json``, with a
        ``recipe_digest`` for each method; ``seed``, ``seconds``, and ``methods``, each with
        ``exact_match`` (mean over offices, in [0, 1]), ``exact_match_per_client``,
        ``facts_retained`` (share of what the base was taught about the country that is still
        answered right, mean over offices) and ``uplink_bytes_per_round`` (per client).
    """
    console = make_console()
    started = time.monotonic()
    if (folder / "summary.json").exists():
        (folder / "summary.json").unlink()
        for method in _MODEL:
            shutil.rmtree(folder / method, ignore_errors=True)
    console.print(
        "Four offices of Veloria fine-tune one small Mixture-of-Experts model. Some skills they "
        "have in common, some instructions each answers in its own way, and nobody shows anybody "
        "its data.\n",
        highlight=False,
    )
    results: dict[str, dict[str, Any]] = {}
    for method, model in _MODEL.items():
        recipe = find_recipe(Path(f"recipes/tiny/{method}.toml"))
        # The base is the same for all: it is evaluated once, with the first method.
        models = model if results else f"base,{model}"
        overrides = [f"seed={seed}", f"evaluation.models={models}"]
        experiment = prepare_experiment(read_recipe(recipe, overrides).recipe)
        results[method] = run_experiment(
            experiment, folder=folder / method, reporter=choose_reporter(console)
        )
    methods = summarize_methods(results)
    last = next(reversed(results.values()))
    summary = {
        **{key: last[key] for key in ("versions", "commit", "hardware", "data_digest")},
        "recipe_digest": {method: result["recipe_digest"] for method, result in results.items()},
        "seed": seed,
        "seconds": time.monotonic() - started,
        "methods": methods,
    }
    write_json(folder / "summary.json", summary)
    console.print()
    print_table(console, _table(methods))
    console.print(f"\n{conclude(methods)}", highlight=False)
    office, question = _OFFICE, _ask_what_offices_differ_in(seed)
    console.print(f"\nAsked: {question}", highlight=False, markup=False)
    for name, answer in side_by_side(folder, question, client=office).items():
        console.print(f"  {name}: {answer}", highlight=False, markup=False)
    flex = shlex.quote(str(folder / "flex"))
    console.print(
        f"\n{summary['seconds']:.0f} seconds; everything is in {folder}. {_draw(folder)} Talk to "
        f"an office's model: orchard chat {flex} --client {office}. Next: "
        "orchard show recipes/tiny/flex.toml",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return summary


def _draw(folder: Path) -> str:
    """Write the page about the runs where that can be drawn; return where it is."""
    runs = [folder / method for method in _MODEL]
    if missing := lacking("report"):
        return f"With {', '.join(missing)} installed, there would be a page with charts too."
    from orchard.pages.writing import write_page

    page = folder / "report.html"
    write_page(runs, page)
    return f"The charts are in {page}: open it in a browser."


def _ask_what_offices_differ_in(seed: int) -> str:
    """Return an instruction of the test that each office answers in its own way."""
    office = next(office for office in world.offices(seed) if office.name == _OFFICE)
    return next(e.instruction for e in office.test if e.instruction.startswith("Greet "))


def side_by_side(folder: Path, question: str, *, client: str) -> dict[str, str]:
    """Ask the base, the averaged model and a client's personal one of the demo the same.

    Args:
        folder: The demo's.
        question: What they are asked.
        client: Whose personal model.

    Returns:
        What each is called to what it answers.
    """
    fedavg, flex = read_state(folder / "fedavg"), read_state(folder / "flex", client=client)
    states = {
        "the base": fedavg.as_base(),
        "averaged (FedAvg)": fedavg,
        f"{client}'s own (FLEx)": flex,
    }
    answers = {}
    for name, state in states.items():
        with open_model(state) as opened:
            answers[name] = opened.generate(question)
    return answers


def summarize_methods(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Reduce each method's ``result.json`` to what the demo shows; the base comes first."""
    first = next(iter(results.values()))
    chosen = {"base": (first["metrics"]["base"], 0.0)}
    for method, result in results.items():
        uplink = fmean(result["uplink_bytes_per_round"]) / len(result["clients"])
        chosen[method] = (result["metrics"][_MODEL[method]], uplink)
    return {
        method: {
            "exact_match": fmean(metrics["exact_match"].values()),
            "exact_match_per_client": dict(metrics["exact_match"]),
            "facts_retained": fmean(metrics["retention_exact_match"].values()),
            "uplink_bytes_per_round": uplink,
        }
        for method, (metrics, uplink) in chosen.items()
    }


def conclude(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence what was seen, whatever it was."""
    points = {method: 100 * values["exact_match"] for method, values in methods.items()}
    flex, fedavg, alone = points["flex"], points["fedavg"], points["local"]

    def than(other: float, name: str) -> str:
        if round(flex - other, 1) == 0:
            return f"as many as {name}"
        return f"{abs(flex - other):.1f} points {'more' if flex > other else 'fewer'} than {name}"

    facts = {method: 100 * values["facts_retained"] for method, values in methods.items()}
    return (
        f"An office's own FLEx model answers {flex:.1f} % of its test instructions exactly, "
        f"{than(fedavg, 'the averaged FedAvg model')} and {than(alone, 'training alone')}, and "
        f"still knows {facts['flex']:.1f} % of the facts that the base was taught "
        f"(FedAvg {facts['fedavg']:.1f} %, alone {facts['local']:.1f} %)."
    )


def _table(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    clients = list(methods["base"]["exact_match_per_client"])
    table = Table(title="Exact match on held-out instructions, %", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (*clients, "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("facts\nretained", justify="right")
    table.add_column("sent a round\nper client", justify="right")
    for method, values in methods.items():
        uplink = values["uplink_bytes_per_round"]
        table.add_row(
            _LABEL[method],
            *(f"{100 * values['exact_match_per_client'][client]:.1f}" for client in clients),
            f"{100 * values['exact_match']:.1f}",
            f"{100 * values['facts_retained']:.1f}",
            format_bytes(uplink) if uplink else "-",
            style="bold" if method == "flex" else "",
        )
    return table

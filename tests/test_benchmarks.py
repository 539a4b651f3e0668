"""Pages of benchmarks are what their results make of them, and results say where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.blocks import Finding, Page, findings
from benchmarks.flex_hfedmoe import run as joined
from benchmarks.flex_table1 import run as table1
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu_run
from benchmarks.hfedmoe_fig10 import run as fig10
from benchmarks.pages import PAGES
from benchmarks.records import is_marked, lacks, origin, origins, read
from benchmarks.running import run_recipe
from benchmarks.wire import run as wire
from orchard.results import environment

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORDS = sorted(path for path in BENCHMARKS.rglob("*.json") if "__pycache__" not in path.parts)
# These measure without a recipe, or, as studies, with one for each run.
# Folders, and records in other folders.
WITHOUT_RECIPE = (
    *("export", "gpu", "kernels", "placement", "planner", "serving", "studies", "workers"),
    *("privacy/results/step.json", "privacy/results/secure_aggregation.json"),
)
FULL = {**environment(), "commit": "c0ffee", "recipe_digest": "r", "data_digest": "d"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_its_results_make_it(name: str) -> None:
    stale = [str(path.relative_to(BENCHMARKS)) for path in PAGES[name]().stale()]
    assert not stale, f"stale; run python -m benchmarks.pages {name}"


def test_every_benchmark_has_a_page_that_is_made() -> None:
    assert {path.parent.name for path in BENCHMARKS.glob("*/README.md")} == PAGES.keys()


def test_every_result_says_where_it_comes_from_or_that_it_is_unknown() -> None:
    assert RECORDS
    wrong = {}
    for path in RECORDS:
        record = json.loads(path.read_text())
        own = path.relative_to(BENCHMARKS)
        has_recipe = not {own.parts[0], own.as_posix()} & {*WITHOUT_RECIPE}
        missing = lacks(record, has_recipe=has_recipe)
        if bool(missing) != is_marked(record):
            wrong[str(path)] = missing
    assert not wrong


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ("commit", ["commit"]),
        ("versions", ["versions"]),
        ("hardware", ["hardware"]),
        ("recipe_digest", ["recipe_digest"]),
        ("data_digest", ["data_digest"]),
        ("", []),
    ],
)
def test_what_a_result_lacks_is_seen(left_out: str, missing: list[str]) -> None:
    record = {key: value for key, value in FULL.items() if key != left_out}
    assert lacks(record, has_recipe=True) == missing
    assert lacks(record, has_recipe=False) == [m for m in missing if not m.endswith("digest")]


def test_a_machine_without_its_instruction_sets_is_not_known() -> None:
    hardware = {key: value for key, value in FULL["hardware"].items() if key != "cpu_features"}
    assert lacks({**FULL, "hardware": hardware}, has_recipe=True) == ["hardware.cpu_features"]


def test_a_kept_result_takes_over_where_it_comes_from_and_nothing_else() -> None:
    assert origin({**FULL, "summary": {}, "seed": 3}) == FULL


def test_origins_are_told_apart_and_counted() -> None:
    hardware = {"cpu": "Some CPU", "num_cpus": 2, "cpu_features": ["avx2"]}
    known = {**FULL, "versions": {"torch": "1"}, "hardware": hardware}
    assert origins([known]) == (
        "Origin of the results: commit c0ffee; Some CPU, 2 CPUs, avx2; torch 1."
    )
    text = origins([known, known, {"provenance": "unknown: old"}])
    assert "2 of 3 results: commit c0ffee" in text
    assert text.endswith("1 of 3 results: unknown: old.")


@pytest.fixture
def page(tmp_path: Path) -> Page:
    text = "# Title\n\n<!-- made from the results: a -->\n<!-- end of a -->\n\nProse.\n"
    (tmp_path / "README.md").write_text(text)
    return Page(tmp_path, {"a": "| 1 |"}, {"table.md": "| 2 |\n"})


def test_a_written_page_is_fresh_and_keeps_its_prose(page: Page) -> None:
    assert page.stale() == [page.readme, page.folder / "table.md"]
    page.write()
    assert page.stale() == []
    text = page.readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nProse.\n")
    assert "\n| 1 |\n" in text


def test_a_figure_changed_by_hand_or_by_new_results_is_stale(page: Page) -> None:
    page.write()
    page.readme.write_text(page.readme.read_text().replace("| 1 |", "| 3 |"))
    assert page.stale() == [page.readme]
    page.write()
    newer = Page(page.folder, {"a": "| 4 |"}, page.files)
    assert newer.stale() == [page.readme]


@pytest.mark.parametrize("blocks", [{}, {"b": ""}, {"a": "", "b": ""}])
def test_a_page_has_exactly_the_blocks_that_are_made(page: Page, blocks: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^blocks of .*README.md must be .*, got a; "):
        Page(page.folder, blocks).contents()


def test_a_sentence_that_no_longer_holds_is_refused() -> None:
    holds = Finding("**Ahead** by 2 points.", 2 > 1)
    assert findings([holds]) == "- **Ahead** by 2 points."
    with pytest.raises(ValueError, match=r"^a finding must hold in the results, got: Ahead; "):
        findings([holds, Finding("Ahead", holds=False)])


TINY = ("client.steps=1", "server.rounds=2", "evaluation.max_examples=8")


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    kinds = ("closed_qa", "information_extraction", "classification", "summarization")
    rows = [
        {
            "instruction": f"word {n}",
            "context": "",
            "response": f"fig {n}",
            "category": kinds[n % 4],
        }
        for n in range(440)
    ]
    path = tmp_path / "dolly.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def news(tmp_path: Path) -> Path:
    topics = ("World", "Sports", "Business", "Sci/Tech")
    rows = [{"text": f"word {n} fig", "label": topics[n % 4]} for n in range(600)]
    path = tmp_path / "news.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let scripts run few steps, below a folder of their own, and keep results in it."""
    (tmp_path / "recipes").symlink_to(BENCHMARKS.parent / "recipes")
    monkeypatch.chdir(tmp_path)

    def run_quickly(name: str, overrides: Sequence[str], *, out: Path) -> None:
        run_recipe(name, [*overrides, *TINY], out=out)

    for module in (wire, fig10, joined, table1):
        monkeypatch.setattr(module, "HERE", tmp_path / "kept" / module.__name__)
        monkeypatch.setattr(module, "run_recipe", run_quickly)
    return tmp_path / "kept"


@pytest.mark.long
def test_scripts_keep_what_their_pages_need_and_where_it_comes_from(
    dolly: Path, news: Path, kept: Path
) -> None:
    given = {"model": "orchard:tiny", "data": str(dolly)}
    wire.run("int8", 0, **given)
    joined.run("fedavg", 0, **given)
    table1.run("fedavg", **given)
    fig10.run("fedavg", 0, model="orchard:tiny", data=str(news))
    records = read(kept, "**/*.json")
    assert len(records) == 4
    for record in records:
        # Outside a checkout there is no commit to keep.
        assert set(lacks(record, has_recipe=True)) <= {"commit"}
    losses = [record["loss"] for record in records if record.get("encoding") == "int8"]
    assert len(losses) == 1


def test_what_no_gpu_measured_is_called_so_and_what_one_did_is_shown() -> None:
    assert {row[2] for row in gpu_report.rows(None)} == {"not measured"}
    record = {
        "device": "A GPU",
        "step": {"speedup": 2.5, "peak_ratio": 0.6},
        "grafts": {"layers": 24, "seconds_of_choice": 31.0},
    }
    shown = [row[2] for row in gpu_report.rows(record)]
    assert shown == ["A GPU", "2.50", "0.60", "31.0 (24 layers)"]


def test_without_a_gpu_its_benchmark_checks_what_a_cpu_can_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[Path, dict[str, object]] = {}
    monkeypatch.setattr(gpu_run, "keep", kept.__setitem__)
    monkeypatch.setattr(gpu_run, "page", lambda: Page(tmp_path, {}))
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "README.md").write_text("nothing is made\n")
    gpu_run.main()
    [record] = kept.values()
    assert record["left_out"] == ["step", "memory", "grafts"]
    product = record["product"]
    assert isinstance(product, dict)
    assert product["largest_relative_difference"] < 1e-5
    assert capsys.readouterr().out.startswith("no GPU is here: step, memory and grafts")

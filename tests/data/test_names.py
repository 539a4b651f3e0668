"""Names that come with data and are shown in terminals, tables and logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import quick_recipe
from orchard.data.turns import valid_name
from orchard.experiment.holdings import build_federation

UNSHOWN = (
    "a\x1b[31mred",
    "a\x1b]0;title\x07",
    "b\u202egnp",
    "c\u2067d",
    "e\u0085f",
    "g\nh",
    "i\x00",
)
SHOWN = ("ward 14", "Łódź", "‰ — €", "می‌خواهم", "病棟", "👩‍⚕️", "a\xa0b")


@pytest.mark.parametrize("name", UNSHOWN)
def test_a_name_that_would_command_a_terminal_or_turn_its_text_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="must be a name that can be shown, got the character"
    ) as c:
        valid_name(name, where="here")
    assert str(c.value).isprintable()


@pytest.mark.parametrize("name", SHOWN)
def test_names_of_any_script_stay(name: str) -> None:
    assert valid_name(name, where="here") == name


def rows(category: str) -> str:
    return "".join(
        json.dumps({"instruction": f"{i}?", "response": "x", "category": category}) + "\n"
        for i in range(9)
    )


def test_a_category_a_file_and_a_client_of_several_files_are_such_names(tmp_path: Path) -> None:
    good, bad, folder = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "clients"
    good.write_text(rows("a"))
    bad.write_text(rows("a") + rows(UNSHOWN[0]))
    folder.mkdir()
    (folder / f"{UNSHOWN[2]}.jsonl").write_text(rows("a"))
    for path, partition, where in (
        (bad, "iid", "a category of the data"),
        (bad, "category", "the name of a client"),
        (f"x={good},{UNSHOWN[2]}={good}", "file", "the name of a client"),
        (folder, "file", "the name of a client"),
    ):
        options = (f"data.path={path}", f"data.partition={partition}", "data.test_size=0.3")
        with pytest.raises(ValueError, match=f"^{where} must be a name that can be shown"):
            build_federation(quick_recipe("fedavg", *options))

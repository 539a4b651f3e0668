"""Two clients never share a folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard.experiment.run_folder import folder_name

# Ids that are nearly the same, beside any at all.
_NEAR = st.lists(
    st.sampled_from(["a", "A", " ", "%", "~", "-", "20", "\u00e9", "e\u0301", "\ufb01", "ß"])
)
_IDS = st.one_of(st.text(), _NEAR.map("".join))
TWINS = [
    (" aca", "€a"),
    ("ward 14", "ward—"),
    ("Ward", "ward"),
    ("\u00e9", "e\u0301"),
    ("\ufb01", "fi"),
    ("STRASSE", "straße"),
    ("a.b", "a b"),
    ("x" * 300, "x" * 301),
    ("", "client"),
    ("\udc80", "\udc81"),
]


def seen(name: str) -> str:
    """Return a name as a file system that ignores case and normalizes Unicode compares it."""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())


@given(_IDS, _IDS)
def test_different_ids_have_different_folders(one: str, other: str) -> None:
    assert (seen(folder_name(one)) == seen(folder_name(other))) == (one == other)


@pytest.mark.parametrize(("one", "other"), TWINS)
def test_ids_that_look_alike_have_different_folders(one: str, other: str) -> None:
    assert seen(folder_name(one)) != seen(folder_name(other))


@given(_IDS)
def test_the_name_of_a_folder_is_no_id_whose_folder_is_another(client_id: str) -> None:
    name = folder_name(client_id)
    assert folder_name(name) == name if name == client_id else folder_name(name) != name


@given(_IDS)
def test_a_folder_can_be_made_for_any_id(client_id: str) -> None:
    name = folder_name(client_id)
    assert 0 < len(name.encode()) <= 64
    assert not {*name} - {*"abcdefghijklmnopqrstuvwxyz0123456789_-~"}
    assert name[0] not in "~-"


def test_plain_ids_keep_their_names_and_others_stay_readable(tmp_path: Path) -> None:
    assert folder_name("client_00") == "client_00"
    assert folder_name("ward-14") == "ward-14"
    assert folder_name("Ward 14").startswith("ward-14~")
    assert folder_name("Peñón/Süd").startswith("penon-sud~")
    assert folder_name("con").startswith("con~")
    assert folder_name("lpt1").startswith("lpt1~")
    assert folder_name("contact") == "contact"
    (tmp_path / folder_name("ñandú-" * 40)).mkdir()

"""Names on the hub: told from paths, asked for once, and never waited for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from orchard import hub
from orchard.data.datasets import read_dataset
from orchard.data.reading import Reader
from orchard.hub import ASK_SECONDS, find_on_hub, looks_like_path, spelled_like
from orchard.models.stored.loading import check_model, load_base, load_tokenizer
from orchard.models.stored.tensors import open_checkpoint
from orchard.models.trainable.targets import LoraSettings

NO_LORA = LoraSettings(1, 1.0, 0.0, ())


class Hub:
    """Stands for the hub, and keeps what it was asked."""

    def __init__(self, answer: Exception | None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Any]] = []

    def repo_info(self, name: str, *, timeout: float, **_: Any) -> None:
        self.asked.append((name, timeout))
        if self.answer is not None:
            raise self.answer


def put(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> Hub:
    own = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: own)
    return own


def not_found() -> RepositoryNotFoundError:
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, "404\nmore")
    return error


@pytest.mark.parametrize("path", ["./x", "/a/b", "~/x", "a/b/c", "../x", "here/x"])
def test_what_looks_like_a_path_is_one(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_path(path)
    assert not looks_like_path("owner/name")
    assert not looks_like_path("name")


def test_a_mistyped_folder_is_told_without_asking_and_with_what_is_spelled_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "base-9m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    own = put(monkeypatch, None)
    with pytest.raises(
        FileNotFoundError, match=r"got models/base-9n; .* \(models holds base-9m\)$"
    ):
        check_model("models/base-9n", NO_LORA)
    assert own.asked == []
    assert spelled_like("models/other") == spelled_like("nowhere/base-9m") == ""


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (OSError("no network\nmore"), ConnectionError, "while the hub can be reached, got o/n "),
        (RuntimeError("a client of the network"), ConnectionError, "spelling, or the network$"),
        (not_found(), FileNotFoundError, "got o/n, which the hub does not know; check the spelli"),
    ],
)
def test_a_name_that_cannot_be_found_is_asked_for_once_and_refused_in_one_line(
    answer: Exception, error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached_copy", lambda name, *, kind: None)
    for read in (
        lambda: check_model("o/n", NO_LORA),
        lambda: load_tokenizer("o/n"),
        lambda: load_base("o/n", dtype="float32"),
        lambda: open_checkpoint("o/n"),
    ):
        own = put(monkeypatch, answer)
        with pytest.raises(error, match=match) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
        assert own.asked == [("o/n", ASK_SECONDS)]


def test_a_data_set_that_cannot_be_found_is_asked_for_once_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(hub, "cached_copy", lambda name, *, kind: None)
    monkeypatch.setattr("orchard.data.datasets._is_kept", lambda name: False)
    monkeypatch.setattr(datasets, "load_dataset_builder", None)  # would try six times
    own = put(monkeypatch, OSError("no network"))
    with pytest.raises(ConnectionError, match=r"^dataset must be .* got o/n ") as caught:
        read_dataset("o/n", Reader())
    assert len(str(caught.value).splitlines()) == 1
    assert own.asked == [("o/n", ASK_SECONDS)]


def test_a_copy_in_the_cache_is_taken_where_the_hub_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(monkeypatch, OSError("no network"))
    monkeypatch.setattr(hub, "cached_copy", lambda name, *, kind: tmp_path)
    assert find_on_hub("o/n", kind="dataset", option="data.path") == str(tmp_path)


def test_a_name_that_the_hub_knows_stays_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, None)
    assert find_on_hub("o/n", kind="model", option="model.path") == "o/n"


def test_a_name_that_no_hub_can_have_is_told_from_one() -> None:
    with pytest.raises(ValueError, match=r"^model\.path must be .*, got a b/c, which is neither"):
        find_on_hub("a b/c", kind="model", option="model.path")

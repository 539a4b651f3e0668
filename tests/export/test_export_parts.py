"""An adapter that stock PEFT loads, and grafts alone."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from federations import quick_recipe, run_quickly, short_model
from orchard.cli import app
from orchard.export.folder import export_model
from orchard.export.importing import import_into
from orchard.export.parts import export_adapter, export_graft
from orchard.personal.opening import open_model
from orchard.personal.state import find_models, read_state
from orchard.trees import equal
from tiny_exports import FAMILIES, checkpoint, logits_of, recipe_on, state_of


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
def test_peft_loads_every_tensor_of_an_adapter(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, tmp_path / "base")
    # Another rank than there are experts, of which each may be mistaken for the other.
    state = state_of(recipe_on(path, family, "fedavg", "model.lora_rank=3"))
    export_adapter(state, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    plain = logits_of(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    placed = {
        name.replace(".default.", "."): tensor
        for name, tensor in loaded.named_parameters()
        if ".lora_" in name
    }
    assert placed.keys() == saved.keys()
    assert all(torch.equal(placed[name].float(), tensor) for name, tensor in saved.items())
    with open_model(state) as opened:
        expected = logits_of(opened.model)
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5 * largest, rtol=0)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flex")
    run_quickly(
        folder,
        quick_recipe(
            "flex", "server.rounds=1", "evaluation.models=base,personal", "evaluation.metrics=loss"
        ),
    )
    return folder


def test_grafts_go_back_into_a_run(run: Path, tmp_path: Path) -> None:
    first, second = find_models(run)[:2]
    before = read_state(run, client=first)
    size = export_graft(before, tmp_path / "graft")
    assert size == sum(file.stat().st_size for file in (tmp_path / "graft").iterdir())
    assert not equal(read_state(run, client=second).own, before.own)
    copy = shutil.copytree(run, tmp_path / "run")
    assert (
        CliRunner()
        .invoke(app, ["import", str(tmp_path / "graft"), "--into", str(copy), "--client", second])
        .exit_code
        == 0
    )
    after = read_state(copy, client=second)
    assert equal(after.own, before.own)
    assert after.graft_experts == before.graft_experts


def spoiled(graft: Path) -> None:
    (graft / "graft.safetensors").write_bytes(b"short")


def on_another_base(graft: Path) -> None:
    about = json.loads((graft / "graft.json").read_text())
    (graft / "graft.json").write_text(json.dumps(about | {"base_digest": "ab" * 32}))


@pytest.mark.parametrize(
    ("change", "says"),
    [(spoiled, "must be a whole safetensors file"), (on_another_base, "abababab")],
)
def test_what_does_not_fit_a_run_is_refused(
    run: Path, change: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    client = find_models(run)[0]
    before = read_state(run, client=client)
    export_graft(before, tmp_path / "graft")
    change(tmp_path / "graft")
    with pytest.raises(ValueError, match=says):
        import_into(tmp_path / "graft", run, client=client)
    assert equal(read_state(run, client=client).own, before.own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--global", "--out", "HERE"), "must be a new folder"),
        (("--client", "nort", "--out", "new"), "did you mean"),
        (("--global", "--round", "7", "--out", "new"), "must hold a finished round 7"),
        (("--out", "new"), "one of --client ID and --global"),
        (("--global", "--graft", "--out", "new"), "must be asked of a client with grafts"),
    ],
)
def test_a_bad_wish_is_one_line(
    run: Path, options: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [str(tmp_path) if option == "HERE" else option for option in options]
    done = CliRunner().invoke(app, ["export", str(run), *own])
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_space_on_the_disk_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orchard.export.folder.write_shards", full)
    with pytest.raises(OSError, match="must have space"):
        export_model(read_state(run), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    code, _, error = told("export", run, "--global", "--out", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert "the disk of --out must have space for the export, got none left at" in error
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_whole_folder(run: Path, tmp_path: Path) -> None:
    client, out = find_models(run)[0], tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(run), "--client", client, "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "trust_remote_code=True" in done.stdout
    card = (out / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| loss ")]
    base, personal = (float(cell) for cell in line.split("|")[2:4])
    assert 0 < personal < base + 1
    assert card.count("FILL IN") == 4
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "orchard.json").read_text())["client"] == client
    place = str(Path(short_model()).parent)
    assert all(place not in file.read_text() for file in out.glob("*.[jm][sd]*"))


def told(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_a_folder_with_grafts_is_measured_as_its_run_is(run: Path, tmp_path: Path) -> None:
    client, out = find_models(run)[0], tmp_path / "out"
    data = tmp_path / "new.jsonl"
    data.write_text('{"instruction": "Greet Mila", "response": "Hello, Mila"}\n')
    export_model(read_state(run, client=client), out)
    code, shown, error = told("evaluate", run, "--client", client, "--data", data, "--json")
    assert code == 0, error
    wanted = json.loads(shown)
    code, shown, error = told("evaluate", out, "--data", data, "--json")
    assert code == 0, error
    assert "is not here" in error  # a card names no folder of the machine that trained it
    (exported,) = json.loads(shown).values()
    assert exported["loss"] == pytest.approx(wanted["personal"]["loss"], abs=1e-5)
    code, shown, error = told(
        *("evaluate", out, "--data", data, "--json", "--model", short_model())
    )
    assert code == 0, error
    assert json.loads(shown)["base"] == wanted["base"]


def changed_file(folder: Path, mark: Path) -> None:
    file = folder / "modeling_grafted.py"
    file.write_text(file.read_text() + f"\nopen({str(mark)!r}, 'w')\n")


def another_file(folder: Path, mark: Path) -> None:
    (folder / "other.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "other.GraftedConfig"
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer_code(folder: Path, mark: Path) -> None:
    (folder / "other.py").write_text(f"open({str(mark)!r}, 'w')\n")
    file = folder / "tokenizer_config.json"
    own = json.loads(file.read_text())
    own |= {"auto_map": {"AutoTokenizer": ["other.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(own))


@pytest.mark.parametrize("change", [changed_file, another_file, tokenizer_code])
def test_code_of_others_is_never_run(
    run: Path, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    out, mark = tmp_path / "out", tmp_path / "was_run"
    data = tmp_path / "new.jsonl"
    data.write_text('{"instruction": "Greet Mila", "response": "Hello, Mila"}\n')
    export_model(read_state(run, client=find_models(run)[0]), out)
    change(out, mark)
    code, _, error = told("evaluate", out, "--data", data)
    assert code == 2
    assert error.strip().count("\n") <= 1
    assert not mark.exists()

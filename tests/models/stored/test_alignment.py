"""A model's tensors begin at the same places in memory, whatever file they are from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from federations import prepared, quick_recipe, short_model
from orchard.engine.progress import Silent
from orchard.experiment.running import run_experiment
from orchard.models.stored.alignment import ALIGNMENT_BYTES, align
from orchard.models.stored.loading import load_base
from orchard.models.stored.submodel import load_skeleton, load_submodel


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)


def places(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() % ALIGNMENT_BYTES for tensor in tensors}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return copies of one base, whose files hold their tensors at different places."""
    made = []
    for padding in (0, 8, 24):
        folder = tmp_path_factory.mktemp("base") / "model"
        shutil.copytree(short_model(), folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            tensors, folder / "model.safetensors", metadata={"format": "pt", "x": "x" * padding}
        )
        made.append(str(folder))
    starts = set()
    for path in made:
        content = (Path(path) / "model.safetensors").read_bytes()
        starts.add((8 + int.from_bytes(content[:8], "little")) % ALIGNMENT_BYTES)
    assert len(starts) == len(made)
    return made


# The packaged model is stored in bfloat16: read as such, it is mapped and not converted.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_loaded_begins_where_torch_lets_tensors_begin(
    dtype: str, copies: list[str]
) -> None:
    digests = set()
    for path in copies:
        base = load_base(path, dtype=dtype)
        assert places(tensors_of(base.view.model)) == {0}
        digests.add(base.digest)
    assert len(digests) == 1


def test_so_does_what_a_client_carves_or_streams(copies: list[str]) -> None:
    for path in copies:
        carved = load_submodel(path, [[0, 3], [1, 2]], dtype="bfloat16")
        assert places(tensors_of(carved.model)) == {0}
        skeleton = load_skeleton(path, dtype="bfloat16")
        assert places(tensors_of(skeleton.model)) == {0}


def test_tied_tensors_stay_tied() -> None:
    memory = torch.arange(100.0)
    model = nn.Module()
    model.first = nn.Parameter(memory[1:9])
    model.second = nn.Parameter(memory[1:9])
    model.third = model.first
    align(model)
    assert places(model.parameters()) == {0}
    assert model.third is model.first
    assert model.first.data_ptr() == model.second.data_ptr()
    assert model.first.tolist() == list(range(1, 9))


def test_a_run_is_the_same_to_the_bit_from_another_copy_of_its_base(
    copies: list[str], tmp_path: Path
) -> None:
    found = set()
    for number, path in enumerate(copies[:2]):
        brief = ["model.dtype=bfloat16", "server.rounds=1"]
        recipe = quick_recipe("fedavg", f"model.path={path}", *brief)
        folder = tmp_path / str(number)
        run_experiment(prepared(recipe), folder=folder, reporter=Silent())
        found.add(json.loads((folder / "result.json").read_text())["shared_digest"])
    assert len(found) == 1

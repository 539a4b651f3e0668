"""Experts mapped from disk are those in memory, bit for bit, and what cannot be mapped is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from federations import build, quick_recipe, short_model
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.preparation import prepare_experiment
from orchard.models.stored import expert_cache
from orchard.models.stored.loading import Base, load_base
from orchard.models.stored.placing import Placement, open_base
from orchard.models.view.unbinding import unbound_experts
from orchard.strategies.strategy import evaluate_client, start_server, train_client
from orchard.trees import digest

MAPPED = "model.placement=mapped"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the short model, to which a cache can be written."""
    folder = tmp_path / "model"
    shutil.copytree(short_model(), folder, ignore=shutil.ignore_patterns(expert_cache.FOLDER))
    return folder


def cache_of(folder: Path) -> Path:
    (file,) = (folder / expert_cache.FOLDER).glob("*.cache")
    return file


def opened(folder: Path, **placement: str) -> Base:
    return open_base(str(folder), dtype="bfloat16", placement=Placement(**placement))


def mapped(folder: Path, *, dtype: str = "bfloat16", cache: str = "") -> Base:
    return open_base(str(folder), dtype=dtype, placement=Placement("mapped", cache))


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedavg", ()),
        ("fedavg", ("model.expert_cache=none",)),
        ("flex", ()),
        ("flex", ("model.expert_cache=none",)),
        ("hfedmoe", ("selection.mode=mask",)),
        pytest.param(
            *("hfedmoe", ("selection.mode=carve", "selection.cadence=round")),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_round_on_mapped_experts_is_the_round_in_memory(
    method: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    ends = []
    where = (MAPPED, f"model.expert_cache={tmp_path / 'cache'}")
    options = [o for o in overrides if not o.startswith("model.expert_cache")]
    for placement in (options, (*where, *overrides)):
        recipe = quick_recipe(method, *placement)
        strategy, clients, model, _ = build(recipe, tmp_path / str(len(ends)))
        state = start_server(strategy, model.fresh)
        task = Task(1, state.shared, LocalSettings(2, 0, 1e-3))
        update = train_client(strategy, clients[0], task)
        kept = clients[0].store.load(before_round=2)
        measured = evaluate_client(
            strategy, clients[0], Task(2, state.shared, LocalSettings(2, 0, 1e-3)), ("personal",)
        )
        assert digest(model.base_state) == model.base_digest
        ends.append(
            (model.base_digest, digest(update.delta), kept and digest(kept.tensors), measured)
        )
    assert ends[0] == ends[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_experts_have_the_digest_of_those_in_memory(dtype: str, checkpoint: Path) -> None:
    base = mapped(checkpoint, dtype=dtype)
    assert base.digest == load_base(str(checkpoint), dtype=dtype).digest
    assert base.digest == mapped(checkpoint, dtype=dtype, cache="none").digest
    assert not any(p.requires_grad for p in base.view.model.parameters())


def test_the_cache_is_made_once_and_found_again(checkpoint: Path) -> None:
    mapped(checkpoint)
    made = cache_of(checkpoint).stat()
    mapped(checkpoint)
    assert cache_of(checkpoint).stat() == made


def test_mapped_experts_cannot_reach_the_file_and_lie_at_pages(checkpoint: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says how a file is mapped")
    base = mapped(checkpoint)
    for layer in base.view.layers:
        assert all(p.data_ptr() % 4096 == 0 for p in layer.storage.parameters())
    lines = [line for line in maps.read_text().splitlines() if str(cache_of(checkpoint)) in line]
    assert lines
    assert all(line.split()[1] == "r--s" for line in lines)


def test_a_cache_is_a_safetensors_file(checkpoint: Path) -> None:
    base = mapped(checkpoint)
    shutil.copy(cache_of(checkpoint), checkpoint / "copy.safetensors")
    tensors = load_file(checkpoint / "copy.safetensors")
    named = dict(base.view.model.named_parameters())
    assert {*base.view.routed_parameters()} == {n for n in tensors if not n.startswith("__gap")}
    assert all(torch.equal(tensors[name], named[name]) for name in base.view.routed_parameters())


@pytest.mark.long
def test_two_that_convert_at_once_get_one_whole_cache(checkpoint: Path) -> None:
    # Processes, for transformers' loading is not made for threads.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = list(pool.map(_mapped_digest, [checkpoint] * 2))
    assert digests == [load_base(str(checkpoint), dtype="bfloat16").digest] * 2
    assert sorted(p.name for p in (checkpoint / expert_cache.FOLDER).iterdir()) == [
        "experts-bf16.cache",
        "lock",
    ]


def _mapped_digest(checkpoint: Path) -> str:
    return mapped(checkpoint).digest


def truncate(folder: Path) -> None:
    mapped(folder)
    os.truncate(cache_of(folder), cache_of(folder).stat().st_size - 1)


def empty(folder: Path) -> None:
    mapped(folder)
    cache_of(folder).write_bytes(b"")


def change_checkpoint(folder: Path) -> None:
    mapped(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if ".experts.3." in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")


def drop_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-2.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_expert(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if ".experts.3." in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "must be whole, got"),
        (empty, "must be whole, got no header; delete it"),
        (change_checkpoint, "got the experts of another checkpoint; delete it"),
        (drop_tensor, "must hold every tensor of its model, got .*experts.3"),
        (drop_shard, "got model-2.safetensors missing; download them again"),
        (spoil_expert, "must hold finite weights, got NaN or infinity"),
    ],
)
def test_what_cannot_be_mapped_is_said_in_one_line(
    spoil: Callable[[Path], None], said: str, checkpoint: Path
) -> None:
    spoil(checkpoint)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        mapped(checkpoint)
    assert "\n" not in str(caught.value)
    assert not list(checkpoint.glob("**/*.partial"))


def test_a_cache_without_space_is_refused_before_and_while_it_is_written(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "model.expert_cache must be a folder with .* free for the experts of"
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(checkpoint)
        patch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
        with pytest.raises(ValueError, match=f"{said} .*, got 0.001 MB free"):
            mapped(checkpoint)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=f"{said} .*, got No space left on device"):
        mapped(checkpoint)
    assert [p.name for p in (checkpoint / expert_cache.FOLDER).iterdir()] == ["lock"]


def test_a_folder_that_is_none_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    with pytest.raises(ValueError, match=r"must be a folder that can be written, got .*config"):
        mapped(checkpoint, cache=str(file / "cache"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("model.full_targets=experts", "model.dtype=float32", "model.lora_targets=q_proj"),
            "model.placement must be memory with experts in model.full_targets, got mapped",
        ),
        (("model.device=meta",), "model.device must be cpu with model.placement = mapped"),
    ],
)
def test_what_does_not_go_with_mapped_experts_is_refused(
    overrides: tuple[str, ...], said: str
) -> None:
    recipe = quick_recipe("fedavg", MAPPED, *overrides)
    with pytest.raises(ValueError, match=said):
        prepare_experiment(recipe)


def test_mapped_experts_with_adapters_are_folded_again_and_not_kept(tmp_path: Path) -> None:
    kept = {}
    where = (MAPPED, f"model.expert_cache={tmp_path / 'cache'}")
    for name, options in (("memory", ()), ("mapped", where)):
        recipe = quick_recipe("hfedmoe", "selection.mode=mask", *options)
        _, _, model, _ = build(recipe, tmp_path / name)
        model.set_trainable(model.adapter_names)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with unbound_experts(model.view), hooks:
            ids_BS = torch.arange(2, 34)[None]
            loss = model.model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        layer = model.view.layers[0]
        own = sum(p.numel() * p.element_size() for p in layer.storage.parameters())
        gradients = model.gradients(model.adapter_names)
        kept[name] = (sum(sizes.values()) // own, digest(gradients), loss.item())
    # Of both layers' experts, and of none.
    assert kept["memory"][0] >= 2 > kept["mapped"][0]
    assert kept["memory"][1:] == kept["mapped"][1:]

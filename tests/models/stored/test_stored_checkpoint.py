"""Reading tensors from disk: as safetensors reads them, one at a time, and never by accident."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchard.models.stored.conversion import check_fused, match_checkpoint
from orchard.models.stored.streaming import checkpoint_reader
from orchard.models.stored.tensors import Checkpoint, open_checkpoint
from orchard.models.view.detection import view_moe
from tiny_checkpoints import FUSED, load_whole, save
from tiny_models import EXPERTS, FAMILIES, dense

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "b": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_are_those_of_safetensors(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.num_bytes == sum(t.nbytes for t in TENSORS.values())
    for name, expected in TENSORS.items():
        stored, got = checkpoint.tensors[name], checkpoint.read(name)
        assert (stored.dtype, stored.shape) == (expected.dtype, expected.shape)
        assert stored.num_bytes == expected.nbytes
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_an_entry_is_a_slice(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.read("a", index=1), TENSORS["a"][1])
    assert torch.equal(checkpoint.read("b", index=4), TENSORS["b"][4])


def test_what_was_read_is_private(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])


def test_unknown_names_and_entries_are_errors(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(KeyError, match="name must be a tensor of the checkpoint, got 'c'"):
        checkpoint.read("c")
    with pytest.raises(IndexError, match="index must be in the first dimension of a, got 2"):
        checkpoint.read("a", index=2)
    with pytest.raises(IndexError, match="index must be in the first dimension of scalar"):
        checkpoint.read("scalar", index=0)


def test_the_single_file_counts_alone(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert set(Checkpoint(folder).tensors) == set(TENSORS)


def test_files_without_an_index_count_together(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b"}
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"got a in one\.safetensors and two.safetensors"):
        Checkpoint(tmp_path)


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["b"]}, tmp_path / "old.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors"}}))
    assert Checkpoint(tmp_path).tensors["a"].shape == (2, 3, 4)
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"got two\.safetensors missing; download them again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [4, 60, -1])
def test_a_damaged_file_is_an_error(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"must hold readable weights, got .* in model.safetensor"):
        Checkpoint(folder)


def test_a_file_cut_after_opening_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    last = max(TENSORS, key=lambda name: checkpoint.tensors[name].start)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must hold readable weights, got an end before byte"):
        checkpoint.read(last)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold weights in \*.safetensors"):
        Checkpoint(tmp_path)


def test_the_packaged_model_opens() -> None:
    assert open_checkpoint("orchard:tiny").num_bytes > 0
    assert match_checkpoint("orchard:tiny").experts


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FUSED)
def test_one_expert_is_the_whole_models(family: str, original: bool, tmp_path: Path) -> None:
    path = save(family, tmp_path, save_original_format=original)
    read = checkpoint_reader(path, "float32")
    for index, layer in enumerate(view_moe(load_whole(path)).layers):
        for expert in (0, 5, EXPERTS - 1):
            expected, got = layer.expert_tensors(expert), read(index, expert)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[local], expected[local]) for local in expected)


def test_only_one_experts_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint_reader(save("mixtral", tmp_path), "bfloat16")
    seen = []
    plain = Checkpoint.read

    def observed(self: Checkpoint, name: str, *, index: int | None = None) -> torch.Tensor:
        seen.append(name)
        return plain(self, name, index=index)

    monkeypatch.setattr(Checkpoint, "read", observed)
    tensors = read(1, 3)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sorted(seen) == [
        f"model.layers.1.block_sparse_moe.experts.3.{name}.weight" for name in ("w1", "w2", "w3")
    ]
    with pytest.raises(IndexError, match=r"expert must be in 0\.\.7, got 8"):
        read(0, 8)


def test_listed_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="must be fused parameters to be read one by one"):
        check_fused(view_moe(FAMILIES["switch"]()))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have at least one MoE layer"):
        match_checkpoint(str(tmp_path))


def edit(path: str, drop: str) -> None:
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(drop, name)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (
            r"layers\.1.*experts\.7\.up_proj",
            r"a tensor: model\.layers\.1\.mlp\.experts\.7\.up_proj",
        ),
        (
            r"layers\.1.*experts\.\d\.up_proj",
            r"a tensor: mlp\.experts\.\*\.up_proj\.weight for model\.layers\.1",
        ),
        (r"layers\.1.*experts\.", "must hold the experts of model.layers.1"),
    ],
)
def test_missing_experts_are_an_error(drop: str, message: str, tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path)
    edit(path, drop)
    with pytest.raises(ValueError, match=message):
        match_checkpoint(path)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantized_checkpoint_is_refused(method: str, tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    fields["quantization_config"] = {"quant_method": method}
    config.write_text(json.dumps(fields))
    said = rf"not quantized, got .* \({method}\); choose .* or save this one with transformers'"
    with pytest.raises(ValueError, match=said):
        match_checkpoint(path)

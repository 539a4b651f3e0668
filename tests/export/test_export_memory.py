"""What exporting a model needs in memory, beside what the model is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from federations import quick_recipe, short_model
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint

SHAPE = Shape(layers=2, width=512, heads=8, experts=32, expert_width=768, shared_width=64)
SCRIPT = """
import resource, sys
import torch
from pathlib import Path
from orchard.export import folder
from orchard.experiment.settings import lora_settings
from orchard.models.stored.conversion import match_checkpoint
from orchard.personal.state import ModelState
from orchard.export.checking import streamed_digest
from orchard.recipe.reading import read_recipe

recipe = read_recipe(Path(sys.argv[1])).recipe
path = recipe.model.path
digest = streamed_digest(path, match_checkpoint(path), dtype="float32")
rank, shared = lora_settings(recipe).rank, {}
for layer in range(2):
    for expert in range(32):
        prefix = f"layers.{layer}.experts.{expert}.down_proj"
        shared[f"{prefix}.lora_A"] = torch.ones(rank, 768)
        shared[f"{prefix}.lora_B"] = torch.ones(512, rank)
state = ModelState(recipe, None, 1, digest, shared, {}, {}, None)
used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3]), resource.RLIM_INFINITY))
print(folder.export_model(state, Path(sys.argv[2])).num_bytes)
"""


@pytest.mark.long
def test_a_model_larger_than_the_memory_is_exported(tmp_path: Path) -> None:
    import shutil

    from orchard.recipe.reading import to_toml

    base = tmp_path / "base"
    write_random_checkpoint(base, SHAPE, dtype="float32", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(short_model()) / name, base)
    recipe = quick_recipe("fedavg", f"model.path={base}", "model.lora_targets=experts")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    script = [sys.executable, "-c", SCRIPT, tmp_path / "recipe.toml", tmp_path / "out"]
    done = subprocess.run([*script, str(size // 3)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= size * 0.99

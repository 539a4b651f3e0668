"""Real processes: a SuperLink, SuperNodes, workers; TLS and keys; the simulator's tensors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from orchard.communication.audit import AUDIT_FILE, read_audit
from orchard.deployment.localhost import ORCHARD, Processes, running
from sites import same, shared_tensors

pytestmark = pytest.mark.deployment

SHARED = Path(__file__).parents[3] / "shared"
DOLLY = SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl"
MODEL = SHARED / "models" / "base-9m"
CATEGORIES = ("classification", "closed_qa", "creative_writing")

RECIPE = """
[model]
dtype = "float32"
num_threads = 1
lora_dropout = 0.0

[data]
partition = "file"
test_size = 0.2
max_tokens = 128

[strategy]
calibration_blocks = 2

[client]
steps = 2
batch_size = 4
lr = 1e-3

[server]
rounds = 3

[evaluation]
metrics = "loss"
models = "global,personal"
every = 1
max_examples = 6
"""
EXPERTS = "model.lora_targets=q_proj,v_proj,router,experts"
METHODS = {
    "flex": (),
    "fedavg": ("server.rounds=2",),
    "hfedmoe": (EXPERTS, "client.budget=50%,100%,25%", "server.rounds=2"),
}


@pytest.fixture(scope="module")
def dolly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DOLLY.exists() or not MODEL.exists():
        pytest.skip(f"needs {DOLLY} and {MODEL}")
    folder = tmp_path_factory.mktemp("dolly")
    rows = [json.loads(line) for line in DOLLY.read_text().splitlines()]
    for category in CATEGORIES:
        own = [row for row in rows if row["category"] == category and len(row["response"]) < 300]
        text = "".join(json.dumps(row) + "\n" for row in own[:60])
        (folder / f"{category}.jsonl").write_text(text)
    return folder


def flat(values: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: value
        for key, part in values.items()
        for name, value in flat(part, f"{prefix}/{key}").items()
    }


def test_three_sites_on_real_data_end_with_the_simulators_tensors(
    dolly: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    # Few rows, so that it is short.
    model = ("--model", str(MODEL), "--min-test", "4")
    with running(Processes(tmp_path / "federation", dolly, model)) as federation:
        for method, own in METHODS.items():
            options = (f"model.path={MODEL}", f"strategy.name={method}", *own)
            simulated = tmp_path / "simulated" / method
            subprocess.run(
                [ORCHARD, "run", str(recipe), *options, f"data.path={dolly}", "--out", simulated],
                check=True,
                capture_output=True,
            )
            run = tmp_path / "runs" / method
            coordinator = federation.start_coordinator(recipe, options, run=run)
            assert coordinator.wait(420) == 0, federation.tail()
            assert same(shared_tensors(run), shared_tensors(simulated))
            between, alone = (json.loads((f / "result.json").read_text()) for f in (run, simulated))
            # What sites measured left them with four digits after the point.
            measured = flat(between["summary"])
            assert measured == pytest.approx(flat(alone["summary"]), abs=1e-4)
            assert between.keys() >= {"commit", "versions", "hardware", "recipe_digest"}
            assert between["data_digest"] is None
            token = json.loads((run / "run.json").read_text())["run"]
            for kept in sorted((simulated / "clients").glob("*/*.safetensors")):
                name = kept.parent.name
                here = federation.store(name) / "personal" / token / name / kept.name
                assert same(load_file(kept), load_file(here))
        for name in federation.names:
            events = read_audit(federation.store(name) / AUDIT_FILE)
            # FLEx and FedAvg train the same adapters on one warm base; HFedMoE trains others.
            assert sum(event["event"] == "loaded" for event in events) == 2
            sent = [n for event in events if event["event"] == "sent" for n in event["names"]]
            assert sent
            assert not [n for n in sent if ".graft." in n]

"""What a part of a large checkpoint costs, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

LARGE = {
    "vocab_size": 256,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 448,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 64,
    "decoder_sparse_step": 1,
}
MEASURE = """
import resource, sys
import torch
import transformers.models.qwen2_moe.modeling_qwen2_moe
from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, what = sys.argv[1:]
input_ids = torch.arange(256).reshape(2, 128)
# Once on a small model, so that what is loaded lazily is there.
load_submodel("orchard:tiny", [[0]] * 4, dtype="bfloat16")
before = peak()
if what == "submodel":
    view = load_submodel(path, [range(layer, 64, 8) for layer in range(4)], dtype="bfloat16")
    with torch.no_grad():
        view.model(input_ids)
else:
    view = load_skeleton(path, dtype="bfloat16")
    with streamed_experts(view, checkpoint_reader(path, "bfloat16")):
        view.model(input_ids)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random checkpoint of 350 MB, nearly all of it experts, one tensor each."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.Qwen2MoeConfig(**LARGE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(
            0, 0.02, generator=generator
        )
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for expert, (gate, up) in enumerate(v.chunk(2) for v in value):
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            for expert, down in enumerate(value):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# A carved client's peak in a process of its own is in tests/measurements/test_client_memory.py.
@pytest.mark.long
@pytest.mark.parametrize("what", ["submodel", "streamed"])
def test_memory_is_that_of_the_part(what: str, large: Path) -> None:
    size = (large / "model.safetensors").stat().st_size
    assert size > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), what],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (0.3 if what == "submodel" else 0.2) * size

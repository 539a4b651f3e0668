"""What frozen experts in few bits cost: the loss of a base, and how far its weights are off.

python -m benchmarks.placement.precision --model MODEL --data ag_news.jsonl
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import keep
from benchmarks.running import arguments_of
from orchard.data.encoded import Encoded
from orchard.evaluation.loss import mean_loss
from orchard.models.stored.loading import load_tokenizer
from orchard.models.stored.placing import Placement, open_base
from orchard.models.stored.precision import PRECISIONS, bytes_per_value
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.results import environment

HERE = Path(__file__).parent
RESULT = HERE / "results" / "precision.json"
NUM_TEXTS, NUM_TOKENS = 400, 128


def main() -> None:
    """Measure every precision, and keep what was found."""
    given = arguments_of(__doc__)
    chosen = given.parse_args()
    tokenizer = load_tokenizer(chosen.model)
    texts = []
    with Path(chosen.data).open() as lines:
        for line in islice(lines, NUM_TEXTS):
            own = json.loads(line)
            text = " ".join(str(own[key]) for key in own if isinstance(own[key], str))
            ids = tokenizer(text)["input_ids"][:NUM_TOKENS]
            texts.append(Encoded(ids, ids, 0))
    full: dict[str, torch.Tensor] = {}
    rows = []
    for precision in PRECISIONS:
        base = open_base(
            chosen.model, dtype="float32", placement=Placement("memory", precision=precision)
        )
        lora = LoraSettings(1, 1.0, 0.0, ("attention",))
        experts = _experts(base.view)
        full = full or experts
        model = AdaptedModel(base.view, lora, tokenizer=tokenizer, base_digest=base.digest, seed=0)
        off = [
            float((tensor - full[name]).square().mean().sqrt() / full[name].square().mean().sqrt())
            for name, tensor in experts.items()
        ]
        rows.append(
            {
                "precision": precision,
                "bytes_per_value": 4 if precision == "bf16" else bytes_per_value(precision),
                "loss": mean_loss(model, texts, batch_size=16),
                "largest_relative_error": max(off),
            }
        )
        print(rows[-1], flush=True)
    about = {"model": Path(chosen.model).name, "texts": len(texts), "tokens": NUM_TOKENS}
    keep(RESULT, {**environment(), **about, "rows": rows})


def _experts(view: Any) -> dict[str, torch.Tensor]:
    """Return copies of the weights of all experts, as they are read for a product."""
    return {
        f"{layer.name}.{expert}.{name}": tensor.clone()
        for layer in view.layers
        for expert in range(layer.num_experts)
        for name, tensor in layer.expert_tensors(expert).items()
    }


if __name__ == "__main__":
    main()

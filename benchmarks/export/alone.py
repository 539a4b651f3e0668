"""What an environment without Orchard makes of exported folders: logits, and 20 greedy answers.

    ENVIRONMENT/bin/python alone.py WORK

``WORK/asked.json`` names the folders; ``WORK/got`` receives one file for each.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(work: Path) -> None:
    """Load every folder and write down what its model says."""
    assert importlib.util.find_spec("orchard") is None, "this environment must not have Orchard"
    asked: dict[str, Any] = json.loads((work / "asked.json").read_text())
    (work / "got").mkdir(exist_ok=True)
    for case in asked["cases"]:
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(
            case["folder"], dtype=torch.float32, trust_remote_code=case["has_code"]
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(
            case["tokenizer"], padding_side="left", trust_remote_code=case["has_code"]
        )
        if case["is_adapter"]:
            from peft import PeftModel

            adapted: Any = PeftModel.from_pretrained(model, case["adapter"])
            model = adapted.eval()
        batch = tokenizer.pad({"input_ids": case["prompts"]}, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[batch["attention_mask"].bool()]
            # An exported folder says itself where an answer ends; the base does not.
            ends = {"eos_token_id": case["ends"]} if case["is_adapter"] else {}
            written = model.generate(
                **batch, do_sample=False, max_new_tokens=asked["max_new_tokens"], **ends
            )
        answers = tokenizer.batch_decode(
            written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        result = {"logits": logits, "answers": answers, "class": type(model).__name__}
        torch.save(result, work / "got" / f"{case['name']}.pt")
        print(case["name"], type(model).__name__, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

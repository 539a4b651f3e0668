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


def other_ways(folder: str, model: Any, batch: Any, logits: torch.Tensor) -> dict[str, float]:
    """Return by how much logits, or gradients, differ in other ways of using a folder with code."""
    auto: Any = AutoModelForCausalLM
    mask = batch["attention_mask"].bool()

    def far(got: torch.Tensor) -> float:
        return float((got.float() - logits).abs().max())

    with torch.no_grad():
        ids, half = batch["input_ids"], batch["input_ids"].shape[1] // 2
        begun = model(input_ids=ids[:, :half], attention_mask=batch["attention_mask"][:, :half])
        rest = model(
            input_ids=ids[:, half:],
            attention_mask=batch["attention_mask"],
            past_key_values=begun.past_key_values,
        )
        found = {"cache": far(torch.cat((begun.logits, rest.logits), dim=1)[mask])}
        for name, how in (
            ("device_map", {"dtype": torch.float32, "device_map": "auto"}),
            ("bfloat16", {"dtype": torch.bfloat16}),
        ):
            other = auto.from_pretrained(folder, trust_remote_code=True, **how).eval()
            found[name] = far(other(**batch).logits[mask])
            del other
    trained = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).train()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            trained.gradient_checkpointing_enable()
        trained.zero_grad()
        trained(**batch, labels=batch["input_ids"]).loss.backward()
        own = [p.grad.flatten() for p in trained.parameters() if p.grad is not None]
        gradients.append(torch.cat(own))
    found["checkpointing"] = float((gradients[1] - gradients[0]).abs().max())
    assert gradients[0].abs().max() > 0, "nothing was trained"
    return found


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
        ways = other_ways(case["folder"], model, batch, logits) if case["has_code"] else {}
        answers = tokenizer.batch_decode(
            written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        result = {"logits": logits, "answers": answers, "class": type(model).__name__}
        result |= {"ways": ways}
        torch.save(result, work / "got" / f"{case['name']}.pt")
        print(case["name"], type(model).__name__, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

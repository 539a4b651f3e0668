"""What stock vLLM writes with one exported folder.

ENVIRONMENT/bin/python in_vllm.py ASKED.json GOT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: dict[str, Any], out: Path) -> None:
    """Answer the prompts greedily, and write down the answers and the class that gave them."""
    from importlib import import_module

    vllm: Any = import_module("vllm")  # is in no environment of this project

    engine = vllm.LLM(
        model=asked["folder"],
        model_impl=asked["model_impl"],
        trust_remote_code=asked["model_impl"] == "transformers",
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked["max_new_tokens"], stop_token_ids=asked["ends"]
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    # Of its tokens: its own text leaves out what a last token holds of a character.
    decode = engine.get_tokenizer().decode
    answers = [
        decode([i for i in done.outputs[0].token_ids if i not in asked["ends"]])
        for done in engine.generate(prompts, sampling)
    ]
    name = engine.llm_engine.model_config.architecture
    out.write_text(json.dumps({"answers": answers, "class": name}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

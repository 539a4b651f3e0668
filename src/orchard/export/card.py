"""The model card of an exported folder: what is known, and fields for what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from orchard.models.stored.placing import NO_CACHE
from orchard.personal.state import ModelState
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value, to_toml
from orchard.results import MetricsLog

Code: TypeAlias = Literal["", "grafts", "base"]
_WHY: dict[Code, str] = {
    "": "A class of transformers loads it.",
    "grafts": "It has grafts, or layers of different sizes, so it brings a modeling file: read "
    "`modeling_grafted.py` before you trust it.",
    "base": "Its layout is that of its base, which is loaded by the code that it was published "
    "with: read that before you trust it.",
}


def portable_toml(recipe: Recipe) -> str:
    """Return a recipe without the folders of the machine that it ran on, as whole TOML."""
    found = recipe
    if recipe.model.expert_cache != NO_CACHE:  # one beside the base is found wherever that is
        found = replace(recipe, model=replace(recipe.model, expert_cache=""))
    for key in known_options():
        section, _, name = key.rpartition(".")
        value = option_value(found, key)
        if section and isinstance(value, str) and Path(value).is_absolute():
            own = replace(getattr(found, section), **{name: Path(value).name})
            found = replace(found, **{section: own})
    return to_toml(found)


def write_card(
    folder: Path, state: ModelState, *, code: Code, loader: str, run: Path | None
) -> None:
    """Write ``README.md``: base, method, recipe, data without data; licenses are to fill in."""
    recipe = state.recipe
    whose = f"personal model of {state.client_id}" if state.client_id else "global model"
    trust = ", trust_remote_code=True" if code else ""
    text = f"""---
library_name: transformers
license: FILL IN
---

# {recipe.strategy.name}: {whose}

- Base: `{Path(recipe.model.path).name}`, SHA-256 of its tensors `{state.base_digest}`
- License of the base: FILL IN
- License of this model: FILL IN
- Method: `{recipe.strategy.name}`, round {state.round_number}, trained with Orchard
- Data: private examples of the clients of one federation, in the wording `{recipe.data.template}`;
  none is in this folder. License of the data: FILL IN

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```

{_WHY[code]}

## Evaluation

{_evaluation(state, run)}

## Recipe

```toml
{portable_toml(recipe).strip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _evaluation(state: ModelState, run: Path | None) -> str:
    """Return what the run measured of the model and of the base, as a table of means."""
    lines = MetricsLog(run / "metrics.jsonl").read() if run is not None else []
    kind = "personal" if state.client_id else "global"
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        wanted = {"base": 0, kind: state.round_number}
        for client, values in line["clients"].items() if line["kind"] == "evaluation" else ():
            for key, value in values.items():
                model, _, metric = key.partition("/")
                is_own = state.client_id in (None, client)
                if is_own and wanted.get(model) == line["round"]:
                    found.setdefault(metric, {}).setdefault(model, []).append(value)
    if not any(kind in by for by in found.values()):
        return "The run measured nothing of this model."
    rows = [
        f"| {metric} | " + " | ".join(_mean(by.get(model, [])) for model in ("base", kind)) + " |"
        for metric, by in found.items()
    ]
    head = f"On held-out examples, after round {state.round_number}:"
    return "\n".join([head, "", f"| metric | base | {kind} |", "|---|---|---|", *rows])


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else ""

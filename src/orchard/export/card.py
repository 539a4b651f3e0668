"""The model card of an exported folder: what is known, and fields for what is not."""

from __future__ import annotations

from pathlib import Path

from orchard.personal.state import ModelState
from orchard.recipe.reading import to_toml


def write_card(folder: Path, state: ModelState, *, is_stock: bool) -> None:
    """Write ``README.md``: base, method, recipe, data without data; licenses are to fill in."""
    recipe = state.recipe
    whose = f"personal model of {state.client_id}" if state.client_id else "global model"
    trust = "" if is_stock else ", trust_remote_code=True"
    why = (
        "The family's own class loads it."
        if is_stock
        else "It has grafts, so it brings a modeling file: read `modeling_grafted.py` before you "
        "trust it."
    )
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
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
```

{why}

## Recipe

```toml
{to_toml(recipe).strip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")

"""The modeling file of exported folders with grafts, and loading a folder whose file it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from orchard.models.stored.completeness import check_loaded
from orchard.models.stored.deepseek_moe import MODEL_TYPE
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.loading import DTYPES, Base
from orchard.models.stored.sources import without_progress_bars
from orchard.models.view.detection import view_moe
from orchard.trees import digest

MODELING = "modeling_grafted"
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.GraftedConfig",
    "AutoModel": f"{MODELING}.GraftedModel",
    "AutoModelForCausalLM": f"{MODELING}.GraftedForCausalLM",
}
_PREFIX = "grafted_"


def modeling_text(model_class: type) -> str:
    """Return the modeling file of a family, given its class for language models."""
    config_class: Any = model_class.config_class  # type: ignore[attr-defined]
    text = (Path(__file__).parent / f"{MODELING}.py").read_text(encoding="utf-8")
    text = text.replace("grafted_qwen2_moe", f"{_PREFIX}{config_class.model_type}")
    inner: Any = MODEL_MAPPING[config_class]
    text = text.replace("Qwen2MoeForCausalLM", model_class.__name__)
    text = text.replace("Qwen2MoeModel", inner.__name__)
    return text.replace("Qwen2MoeConfig", config_class.__name__)


def brings_code(config: dict[str, Any]) -> bool:
    """Say whether what a ``config.json`` describes needs code of its folder here."""
    return "auto_map" in config and config.get("model_type") != MODEL_TYPE


def check_modeling(folder: Path) -> None:
    """Check that all code that a folder would run is the modeling file that this version writes.

    Raises:
        ValueError: It is other code; none of it was run.
    """
    config = json.loads((folder / "config.json").read_bytes())
    family = str(config.get("model_type", "")).removeprefix(_PREFIX)
    file = folder / f"{MODELING}.py"
    wanted = ""
    if config.get("auto_map") == AUTO_MAP and family in CONFIG_MAPPING:
        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None)
        wanted = modeling_text(known) if isinstance(known, type) else ""
    if not wanted or not file.is_file() or file.read_text(encoding="utf-8") != wanted:
        raise ValueError(
            f"{folder} must load without code of its own, or by the {file.name} that this version "
            "writes, got other code, which is not run; export it anew, or measure the run itself: "
            "orchard evaluate RUN --client ID"
        )


def load_grafted(folder: Path, *, dtype: str, device: str) -> Base:
    """Load an exported folder with grafts, frozen.

    Raises:
        ValueError: Its modeling file is another than this version's; or a tensor is missing.
    """
    check_modeling(folder)
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with without_progress_bars():
        model, found = auto.from_pretrained(
            str(folder),
            dtype=DTYPES[dtype],
            experts_implementation="eager",
            trust_remote_code=True,  # it is ours, to the letter
            use_safetensors=True,
            output_loading_info=True,
        )
    check_loaded(found, path=str(folder))
    check_finite(model.state_dict().items(), path=str(folder))
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Base(view_moe(model), digest(state))

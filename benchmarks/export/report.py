"""The page of what others make of exported models, from results/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins

HERE = Path(__file__).parent


def page() -> Page:
    """Return what is made of the results that are here."""
    alone, harness, engine = (_read(name) for name in ("alone", "harness", "vllm"))
    return Page(
        HERE,
        {
            "alone": _alone_table(alone["models"] if alone else []),
            "alone_findings": findings(_alone_findings(alone["models"] if alone else [])),
            "ways": _ways_table(alone["models"] if alone else []),
            "harness": _harness_table(harness["tasks"] if harness else []),
            "harness_findings": findings(_harness_findings(harness["tasks"] if harness else [])),
            "engine": _engine_table(engine["folders"] if engine else []),
            "engine_findings": findings(_engine_findings(engine["folders"] if engine else [])),
            "origin": paragraph(origins([own for own in (alone, harness, engine) if own])),
        },
    )


def _read(name: str) -> Record | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _alone_table(models: Sequence[Record]) -> str:
    return table(
        ("base", "trained", "exported", "class", "largest difference", "same answers"),
        [
            [
                *(own["family"], own["kind"], own["what"], f"`{own['class']}`"),
                f"{own['largest_difference']:.1e} of {own['largest_logit']:.1f}",
                f"{own['same_answers']} of {own['num_prompts']}",
            ]
            for own in models
        ],
    )


def _ways_table(models: Sequence[Record]) -> str:
    return table(
        ("base", "trained", 'device_map="auto"', "cache", "bfloat16", "checkpointing, gradients"),
        [
            [
                *(own["family"], own["kind"]),
                *(
                    f"{own['ways'][way]:.1e}"
                    for way in ("device_map", "cache", "bfloat16", "checkpointing")
                ),
            ]
            for own in models
            if "ways" in own
        ],
    )


def _alone_findings(models: Sequence[Record]) -> list[Finding]:
    if not models:
        return [Finding("Not run yet.")]
    relative = max(m["largest_difference"] / max(1.0, m["largest_logit"]) for m in models)
    over = [m for m in models if m["largest_difference"] > 1e-5]
    found = [
        Finding(
            f"All {len(models)} give the same greedy text for all prompts.",
            all(m["same_answers"] == m["num_prompts"] for m in models),
        ),
        Finding(
            f"No logit is further from the run's than {relative:.1e} of the largest logit, or of "
            "1 where that is smaller.",
            relative < 1e-5,
        ),
    ]
    if over:
        names = ", ".join(f"{m['family']} ({m['kind']}, {m['what']})" for m in over)
        found.append(
            Finding(
                f"In absolute terms {len(models) - len(over)} of {len(models)} are within 1e-5; "
                f"not {names}: float32 has seven digits of logits that large."
            )
        )
    return found


def _harness_table(tasks: Sequence[Record]) -> str:
    return table(
        ("task", "model", "examples", "orchard evaluate", "harness, folder", "harness, server"),
        [
            [
                *(own["task"], own["model"], str(own["num_examples"])),
                *(f"{own[way]:.4f}" for way in ("evaluate", "folder", "server")),
            ]
            for own in tasks
        ],
    )


def _harness_findings(tasks: Sequence[Record]) -> list[Finding]:
    if not tasks:
        return [Finding("Not run yet.")]
    return [
        Finding(
            "All three ways give the same accuracy.",
            all(t["evaluate"] == t["folder"] == t["server"] for t in tasks),
        )
    ]


def _engine_table(folders: Sequence[Record]) -> str:
    return table(
        ("folder", "loaded by", "same answers"),
        [
            [own["kind"], own["loaded_by"], f"{own['same_answers']} of {own['num_prompts']}"]
            for own in folders
        ],
    )


def _engine_findings(folders: Sequence[Record]) -> list[Finding]:
    if not folders:
        return [Finding("Not run yet.")]
    return [
        Finding(
            "vLLM writes the same greedy text as the run.",
            all(own["same_answers"] == own["num_prompts"] for own in folders),
        )
    ]

"""Exported grafts go back into a run, as what their client kept after its last round."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from orchard.client.store import ClientStore
from orchard.experiment.run_folder import folder_name
from orchard.experiment.settings import graft_settings
from orchard.export.parts import GRAFT_FORMAT, read_about
from orchard.personal.state import read_state


def import_into(part: Path, run: Path, *, client: str | None) -> str:
    """Put exported grafts into a run on the same base, for one of its clients.

    What the client had before stays as the versions of earlier rounds; the version of the run's
    last round is replaced.

    Returns:
        What was done, as a sentence.

    Raises:
        ValueError: It is no graft, for another base or other settings, or damaged; or the run has
            no such client, or no finished round.
        FileNotFoundError: ``run`` is no run.
    """
    about = read_about(part)
    if about["format"] != GRAFT_FORMAT:
        raise ValueError(
            f"{part} must hold grafts to go into a run, got an adapter, which is of the whole "
            "federation; load it with PeftModel.from_pretrained"
        )
    owner = client or about["client"]
    state = read_state(run, client=None)
    if about["base_digest"] != state.base_digest:
        raise ValueError(
            f"{part} must be for the base {state.base_digest[:12]} of {run}, got grafts for "
            f"{about['base_digest'][:12]}; import them into a run on that base"
        )
    before = read_state(run, client=owner)
    if about["settings"] != vars(graft_settings(state.recipe)) or not before.graft_experts:
        raise ValueError(
            f"{part} must have the graft settings of {run}, got {about['settings']}; import it "
            "into a run of the same recipe"
        )
    try:
        tensors = load_file(part / "graft.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{part / 'graft.safetensors'} must be a whole safetensors file, got one that does not "
            "decode; export it again"
        ) from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    known = {n for n in before.own if ".graft." in n}
    if shapes != about["tensors"] or shapes.keys() != known:
        raise ValueError(
            f"{part / 'graft.safetensors'} must hold the tensors that graft.json names, got "
            "others; export it again"
        )
    store = ClientStore(run / "clients" / folder_name(owner), state.base_digest)
    kept = store.load(before_round=state.round_number + 1)
    assert kept is not None, "read_state found grafts"
    choices = {
        f"{layer}.graft.expert": torch.tensor(experts).view_as(
            kept.tensors[f"{layer}.graft.expert"]
        )
        for layer, experts in about["experts"].items()
    }
    store.save(type(kept)({**kept.tensors, **tensors, **choices}), round_number=state.round_number)
    return f"{owner} of {run} has the grafts of {part} after round {state.round_number}"

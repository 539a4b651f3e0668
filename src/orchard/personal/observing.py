"""What a trained model does inside: how its routers spread tokens, how far its grafts open.

Expert load is counted as FLEx's appendix C.6 counts it: how many tokens choose each expert of a
layer on text that nobody trained on, and how much these numbers deviate. Their text is C4, of how
many tokens is not known, so only models on the same file compare.

Source: FLEx (Liu et al., 2025, arXiv:2506.00965), appendix C.6.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from orchard.data.encoded import collate_prompts
from orchard.data.rows import read_rows
from orchard.experiment.encoding import encode_all, make_wording
from orchard.experiment.holdings import read_examples
from orchard.experts.grafting import Graft, GraftMixture
from orchard.models.stored.loading import refuse_pair, threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.view.routing import record_routing
from orchard.personal.opening import OpenedModel, open_model
from orchard.personal.state import ModelState

KINDS = ("prompt", "response", "words", "digits", "punctuation", "special")


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's router spread the tokens of a text.

    Attributes:
        layer: Its name.
        counts: Expert to how many tokens chose it; a token counts once for each expert it chose.
    """

    layer: str
    counts: Mapping[int, int]

    @property
    def deviation(self) -> float:
        """Standard deviation of the counts over the layer's experts; 0 = perfectly balanced."""
        return pstdev(self.counts.values())

    @property
    def entropy(self) -> float:
        """Of the experts' shares of all choices, in nats; at most the log of their number."""
        total = sum(self.counts.values())
        shares = [count / total for count in self.counts.values() if count]
        return -math.fsum(share * math.log(share) for share in shares)

    def as_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        counts = {str(expert): count for expert, count in self.counts.items()}
        record = {"layer": self.layer, "deviation": self.deviation, "entropy": self.entropy}
        return {**record, "counts": counts}


def deviation_of_all(loads: Sequence[LayerLoad]) -> float:
    """Return the standard deviation of the counts of all experts of all layers together."""
    return pstdev([count for load in loads for count in load.counts.values()])


def read_texts(path: Path, *, column: str, max_texts: int) -> list[str]:
    """Return the texts of a file, in its order.

    Args:
        path: Rows with a column of text; or a file ``.txt``, whose paragraphs are texts.
        column: Which column holds it.
        max_texts: No more than these, from the beginning.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: A row has no such text, or there is none at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data must be a file, got {path}; check the spelling")
    texts: list[str] = []
    for text in _texts(path, column):
        if len(texts) == max_texts:
            break
        if text.strip():
            texts.append(text)
    if not texts:
        raise ValueError(f"--data must hold text, got none in {path}; name another file")
    return texts


def _texts(path: Path, column: str) -> Iterator[str]:
    if path.suffix.lower() == ".txt":
        yield from path.read_text(encoding="utf-8").split("\n\n")
        return
    for row in read_rows(path):
        if row.error:
            raise ValueError(row.error)
        text = row.columns.get(column)
        if not isinstance(text, str):
            columns = ", ".join(row.columns) or "none"
            raise ValueError(
                f"rows of --data must have text in the column {column}, got {columns} in "
                f"{row.where}; name the column by --column"
            )
        yield text


@torch.inference_mode()
def expert_load(
    model: AdaptedModel, texts: Sequence[str], *, max_tokens: int, batch_size: int
) -> list[LayerLoad]:
    """Count which experts the tokens of texts choose.

    Args:
        model: The model as it stands, in evaluation mode.
        texts: What it reads, each for itself.
        max_tokens: Of each text, from its beginning.
        batch_size: Texts at a time; it changes nothing but rounding.

    Returns:
        Of each MoE layer in forward order, by the experts' ids in the checkpoint.
    """
    encoded = model.tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    ids = [own for own in encoded if own]
    layers = model.view.layers
    counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in layers]
    for start in range(0, len(ids), batch_size):
        arrays = collate_prompts(
            ids[start : start + batch_size], pad_id=model.tokenizer.pad_token_id, side="right"
        )
        batch = {key: torch.from_numpy(array).to(model.device) for key, array in arrays.items()}
        mask_BS = batch["attention_mask"]
        with record_routing(model.view, token_mask_BS=mask_BS, keep_probabilities=False) as seen:
            model.model(**batch, use_cache=False)
        for index, own_E in enumerate(counts):
            own_E += seen.expert_counts(index).cpu()
    return [
        LayerLoad(layer.name, dict(zip(layer.expert_ids, own_E.tolist(), strict=True)))
        for layer, own_E in zip(layers, counts, strict=True)
    ]


def measure_load(
    states: Mapping[str, ModelState],
    texts: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int,
    device: str | None = None,
) -> dict[str, list[LayerLoad]]:
    """Count expert load of several models of one run.

    Args:
        states: Name to model: the base first, then the global one, then a client's, which each are
            opened in the place of the one before.
        texts: See ``expert_load``.
        max_tokens: See there.
        batch_size: See there.
        device: Where models run; None = as the recipe says.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: It is another one.
    """
    path = next(iter(states.values())).recipe.model.path
    refuse_pair(path, doing="a count of the experts that texts choose")
    found: dict[str, list[LayerLoad]] = {}
    adapted: AdaptedModel | None = None
    count = partial(expert_load, texts=texts, max_tokens=max_tokens, batch_size=batch_size)
    with threads(next(iter(states.values())).recipe.model.num_threads):
        for name, state in states.items():
            again = adapted if state.held_experts is None else None
            adapted = None
            with open_model(state, adapted=again, device=device) as opened, ExitStack() as undo:
                if name == "base":
                    _ = opened.adapted.fresh  # while it is
                    undo.enter_context(opened.adapted.without_adapters())
                found[name] = count(opened.adapted)
            adapted = opened.adapted if state.held_experts is None else None
            del opened
    return found


@dataclass(frozen=True)
class Openness:
    """How far one layer's gate opens for one kind of token.

    Attributes:
        layer: Its name.
        kind: Of ``KINDS``.
        mean: Over the tokens, in [0, 1]; 1 where the graft has no gate.
        num_tokens: How many there are.
    """

    layer: str
    kind: str
    mean: float
    num_tokens: int


def measure_gates(state: ModelState, data: Path, *, device: str | None = None) -> list[Openness]:
    """Return how far the gates of a client's grafts open, by layer and kind of token.

    Prompt and response part the tokens of an example, and so do the other kinds: a token of digits
    alone, one without a letter or digit, a special one, and words and their pieces.

    Args:
        state: A client's model.
        data: Examples, read and worded as the run's own.
        device: Where it runs; None = as the recipe says.

    Raises:
        FileNotFoundError: The file or the base is not there.
        ValueError: The model has no grafts, or something does not fit.
    """
    if not state.graft_experts:
        raise ValueError(
            f"the model must have grafts, got that of {state.client_id or 'the server'} without; "
            "name a client of a run with flex or orchard"
        )
    recipe = state.recipe
    examples = read_examples(str(data), recipe.data, option="--data").examples
    with threads(recipe.model.num_threads), open_model(state, device=device) as opened:
        encoded = encode_all(
            examples,
            make_wording(recipe, opened.tokenizer),
            max_tokens=recipe.data.max_tokens,
            whose="the examples of --data",
        )
        rows = [(own.input_ids, own.prompt_length) for own in encoded]
        return gate_openness(opened, rows)


@torch.inference_mode()
def gate_openness(opened: OpenedModel, rows: Sequence[tuple[Sequence[int], int]]) -> list[Openness]:
    """Return how far gates open, by layer and kind; kinds without a token are left out.

    Args:
        opened: A model with grafts.
        rows: Ids of an example, and how many of them are its prompt.
    """
    model = opened.adapted
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        seen[name] = output[0].flatten().double().cpu()

    values: dict[tuple[str, str], list[float]] = {}
    kind_of: dict[int, str] = {}
    with ExitStack() as undo:
        for layer in model.view.layers:
            graft = layer.block.get_submodule("graft")
            assert isinstance(graft, Graft | GraftMixture)
            handle = graft.register_forward_hook(partial(keep, layer.name))
            undo.callback(handle.remove)
        for ids, prompt_length in rows:
            model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            for place, token in enumerate(ids):
                if token not in kind_of:
                    kind_of[token] = _kind(opened.tokenizer, token)
                for kind in ("prompt" if place < prompt_length else "response", kind_of[token]):
                    for layer_name, open_T in seen.items():
                        values.setdefault((layer_name, kind), []).append(float(open_T[place]))
    return [
        Openness(layer.name, kind, fmean(own), len(own))
        for layer in model.view.layers
        for kind in KINDS
        if (own := values.get((layer.name, kind)))
    ]


def _kind(tokenizer: Any, token: int) -> str:
    if token in tokenizer.all_special_ids:
        return "special"
    text = tokenizer.decode([token]).strip()
    if text.isdigit():
        return "digits"
    return "words" if any(map(str.isalnum, text)) or not text.isascii() else "punctuation"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

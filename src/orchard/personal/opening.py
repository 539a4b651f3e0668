"""A trained model, opened from what it is made of and its base: to ask, to measure, to hand on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from orchard.communication.messages import LocalSettings, Task
from orchard.data.examples import Example, Turn
from orchard.data.templates import Template, Wording, encode_prompt
from orchard.experiment.encoding import end_ids, make_wording
from orchard.experiment.settings import graft_settings, lora_settings, placement_of
from orchard.experts.grafting import ReadOrigin, grafted
from orchard.experts.submodel_source import SubmodelSource
from orchard.models.stored.loading import Base, load_config, load_tokenizer
from orchard.models.stored.placing import open_base
from orchard.models.stored.sources import build_view
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.factored import factored_experts
from orchard.models.view.unbinding import unbound_experts
from orchard.personal.sampling import Sampling
from orchard.personal.state import ModelState
from orchard.personal.writing import StopTexts, longest_answer, write_tokens
from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds
from orchard.strategies.strategy import place_global


@dataclass(frozen=True)
class OpenedModel:
    """A model that answers, as its run measured it; a context manager, which takes grafts off.

    Attributes:
        state: What it is made of.
        adapted: The base with adapters and grafts, addressed by name.
    """

    state: ModelState
    adapted: AdaptedModel
    _undo: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model itself, as transformers knows it, with adapters and grafts in it."""
        return self.adapted.model

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.adapted.tokenizer

    def generate(
        self,
        prompt: str,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        template: Template | None = None,
    ) -> str:
        """Answer a prompt, in the wording that the run trained with.

        Args:
            prompt: What is asked.
            history: What was said before, in order; see ``Example``.
            max_new_tokens: The answer ends here if not at an end token; None = 256, or what there
                is room for.
            temperature: What logits are divided by; 0 = always the most probable token.
            top_p: The fewest tokens whose probabilities reach this are drawn from, in (0, 1].
            seed: Of the draws.
            stop: The answer ends before the first of these texts.
            template: Another wording than the run's: ``alpaca``, ``chat`` or ``plain``.

        Raises:
            ValueError: A number is out of its range, the prompt is too long for the model, or does
                not fit the template.
        """
        pieces = self.stream(
            prompt,
            history=history,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            template=template,
        )
        return "".join(pieces).strip()

    def stream(
        self,
        prompt: str,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        template: Template | None = None,
    ) -> Iterator[str]:
        """Yield an answer piece by piece as it is written; see ``generate``.

        What cannot be asked for is refused before this returns.
        """
        sampling, stops = Sampling(temperature, top_p), StopTexts(tuple(stop))
        if not prompt.strip():
            raise ValueError("prompt must say something, got none; give one, or write it to stdin")
        wording = self._wording(template)
        ids = encode_prompt(Example(prompt, "", history=tuple(history)), wording)
        longest = longest_answer(self.adapted.model, len(ids), max_new_tokens)
        ends = frozenset(end_ids(self.state.recipe, wording))
        generator = torch.Generator().manual_seed(Seeds(seed).integer("sampling"))
        return self._pieces(ids, longest, sampling, generator, ends, stops)

    def _pieces(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        ends: frozenset[int],
        stops: StopTexts,
    ) -> Generator[str, None, None]:
        tokens: list[int] = []
        text = shown = ""
        with unbound_experts(self.adapted.view), factored_experts(self.adapted.view):
            written = write_tokens(
                self.adapted.model,
                ids,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                generator=generator,
                end_ids=ends,
            )
            with closing(written):
                for token in written:
                    tokens.append(token)
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    is_stopped, sure = stops.sure(text)
                    # A token may hold half a character; the next one completes it.
                    if len(sure) > len(shown) and not sure.endswith("\ufffd"):
                        yield sure[len(shown) :]
                        shown = sure
                    if is_stopped:
                        return
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _wording(self, template: Template | None) -> Wording:
        recipe = self.state.recipe
        data = replace(recipe.data, template=template or recipe.data.template)
        return make_wording(replace(recipe, data=data), self.tokenizer)

    def close(self) -> None:
        """Take grafts off the base; adapters stay as they are."""
        self._undo.close()

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close it."""
        self.close()


def open_model(
    state: ModelState,
    *,
    base: Base | None = None,
    adapted: AdaptedModel | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> OpenedModel:
    """Open a model as its run measures it: global values, over them what the client keeps.

    Args:
        state: What it is made of.
        base: The base, loaded before; it gets adapters. None = loaded from ``model.path``.
        adapted: A closed model of the same recipe, to open this one in its place; None = a new one.
        device: Where it runs; None = as the recipe says.
        dtype: Of the base; None = as the recipe says.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: It is another one, or the tensors do not fit it.
    """
    recipe = state.recipe
    seed = Seeds(recipe.seed).integer("adapters")
    device, wanted = device or recipe.model.device, dtype or recipe.model.dtype
    source = SubmodelSource(
        path=recipe.model.path,
        dtype=wanted,
        device=device,
        lora=lora_settings(recipe),
        tokenizer=adapted.tokenizer if adapted else load_tokenizer(recipe.model.path),
        base_digest=state.base_digest,
        seed=seed,
    )
    read: ReadOrigin | None = None
    if state.held_experts is not None:
        _check_digest(state, base.digest if base else _digest_of(recipe, device))
        layers = build_view(load_config(recipe.model.path), recipe.model.path).layers
        adapted = source.carve([state.held_experts[layer.name] for layer in layers])
        read = source.origin_reader()
    elif adapted is not None:
        _check_digest(state, adapted.base_digest)
    else:
        loaded = base or base_of(recipe, device=device)
        _check_digest(state, loaded.digest)
        if base is None and wanted != recipe.model.dtype:
            loaded = base_of(recipe, device=device, dtype=wanted)
        adapted = AdaptedModel(
            loaded.view,
            source.lora,
            tokenizer=source.tokenizer,
            base_digest=state.base_digest,
            seed=seed,
        )
    with ExitStack() as undo:
        grafts = nullcontext()
        if state.graft_experts:
            assert state.client_id is not None, "a graft is a client's"
            grafts = grafted(  # type: ignore[assignment]
                adapted,
                [state.graft_experts[layer.name] for layer in adapted.view.layers],
                graft_settings(recipe),
                seed=Seeds(recipe.seed).integer("graft", state.client_id),
                read=read,
            )
        undo.enter_context(grafts)  # first: they start as experts of the base
        task = Task(state.round_number + 1, state.shared, LocalSettings(0, 0, 0.0))
        place_global(adapted, task)
        adapted.load(_own(state, adapted))
        adapted.model.eval()
        return OpenedModel(state, adapted, undo.pop_all())
    raise AssertionError("unreachable: ExitStack swallows nothing")


def _own(state: ModelState, adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return what of a client's tensors is in its model; methods of one's own may keep more."""
    is_own_method = set(method_names(state.recipe.strategy.name)) - set(BUILT_IN)
    return {n: t for n, t in state.own.items() if not is_own_method or adapted.knows(n)}


def base_of(recipe: Recipe, *, device: str | None = None, dtype: str | None = None) -> Base:
    """Load the base of a run as it was trained on: with its experts where and as exact as there.

    Args:
        recipe: Of the run.
        device: Where it runs; None = as the recipe says. Experts that were mapped are in memory on
            another than a CPU, and mapped on a CPU if they were offloaded; they compute the same.
        dtype: As it is loaded; None = as the recipe says.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: It is not a usable Mixture-of-Experts model, or experts cannot be so placed.
    """
    options = replace(recipe.model, device=device or recipe.model.device)
    if options.device != "cpu" and options.placement == "mapped":
        options = replace(options, placement="memory", expert_cache="")
    if options.device == "cpu" and options.placement == "offload":
        options = replace(options, placement="mapped")
    return open_base(
        options.path,
        dtype=dtype or options.dtype,
        device=options.device,
        placement=placement_of(replace(recipe, model=options)),
    )


def _digest_of(recipe: Recipe, device: str) -> str:
    return base_of(recipe, device=device).digest


def _check_digest(state: ModelState, digest: str) -> None:
    if digest != state.base_digest:
        raise ValueError(
            f"base at {state.recipe.model.path} must be {state.base_digest[:12]}, on which the run "
            f"was trained, got {digest[:12]}; bring back that base, or name its place by --model"
        )

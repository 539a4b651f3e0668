"""The peer of ``step``: transformers and PEFT in a loop as their documentation writes it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from orchard.data.encoded import Encoded, collate, collate_prompts
from orchard.models.stored.loading import DTYPES
from orchard.models.trainable.slots import canonical


@dataclass(frozen=True)
class PlainSettings:
    """What the loop is made of; the words are those of transformers and PEFT.

    Attributes:
        experts: Which implementation of experts transformers runs.
        dtype: Of the base.
        device: Where it runs.
        targets: Of the LoRA adapters.
        rank: R.
        alpha: The adapters' output is scaled by alpha / rank.
        learning_rate: Of AdamW.
        max_grad_norm: Gradients are scaled down to this L2 norm.
        pad_id: What fills rows.
        end_id: What ends an answer.
    """

    experts: str
    dtype: str
    device: str
    targets: tuple[str, ...]
    rank: int
    alpha: float
    learning_rate: float
    max_grad_norm: float
    pad_id: int
    end_id: int


@dataclass(frozen=True)
class Took:
    """What something took.

    Attributes:
        seconds: By the wall clock.
        cpu_seconds: Of all threads of this process.
    """

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        """Start."""
        self._seconds, self._cpu_seconds = time.perf_counter(), time.process_time()

    def read(self) -> Took:
        """Return what has passed since the start."""
        return Took(time.perf_counter() - self._seconds, time.process_time() - self._cpu_seconds)


class PlainLoop:
    """A model that PEFT has wrapped, trained and asked by a plain loop."""

    def __init__(self, path: str, settings: PlainSettings) -> None:
        """Load the model anew and let PEFT wrap it.

        Args:
            path: A folder that ``save_pretrained`` wrote.
            settings: Of the loop.
        """
        self.settings = settings
        base: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[settings.dtype], experts_implementation=settings.experts
        )
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(base.to(settings.device), config)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Start from these adapters, by the names that ``AdaptedModel`` gives them."""
        found = {
            canonical(path.removeprefix("base_model.model.")): parameter
            for path, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        assert found.keys() == values.keys(), "both sides must train the same tensors"
        with torch.no_grad():
            for name, parameter in found.items():
                parameter.copy_(values[name])

    def train(self, batches: Sequence[Sequence[Encoded]]) -> tuple[list[float], Took]:
        """Take one AdamW step for each batch, padded to its longest row.

        Returns:
            The loss of each step before it is taken, and what all of them took.
        """
        watch = Stopwatch()
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.settings.learning_rate, weight_decay=0.0)
        losses = []
        for batch in batches:
            arrays = collate(batch, pad_id=self.settings.pad_id)
            inputs = {k: torch.from_numpy(v).to(self.settings.device) for k, v in arrays.items()}
            loss = self.model(**inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, watch.read()

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int
    ) -> tuple[list[list[int]], Took]:
        """Answer prompts greedily by ``generate``, so many rows at a time, in their own order.

        Returns:
            The ids of each answer up to its end token, and what all of them took.
        """
        watch = Stopwatch()
        self.model.eval()
        answers = []
        for start in range(0, len(prompts), batch_size):
            arrays = collate_prompts(
                prompts[start : start + batch_size], pad_id=self.settings.pad_id
            )
            inputs = {k: torch.from_numpy(v).to(self.settings.device) for k, v in arrays.items()}
            found = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.settings.end_id,
                pad_token_id=self.settings.pad_id,
            )
            for row in found[:, inputs["input_ids"].shape[1] :].tolist():
                end = self.settings.end_id
                answers.append(row[: row.index(end)] if end in row else row)
        return answers, watch.read()

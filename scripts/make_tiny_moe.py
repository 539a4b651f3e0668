"""Make the tiny Mixture-of-Experts model that ships with the package.

Trains a byte-level BPE tokenizer and a Qwen2-MoE of 1.7 million parameters on the invented country
of ``orchard.data.world``, then writes both in bfloat16 where the demo looks for them.
About ten minutes on two cores; the seed is fixed, so the same machine makes the same model.

    python scripts/make_tiny_moe.py [--steps 3000] [--out src/orchard/models/stored/tiny_moe]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from orchard.data import world
from orchard.data.examples import Example

END, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer on the texts of the world."""
    examples = list(islice(world.pretraining_stream(world.WORLD.generator("tokenizer")), 20_000))
    generator = world.WORLD.generator("tokenizer", "new skills")
    examples += [world.draw_new_skill(generator, s) for s in world.NEW_SKILLS for _ in range(500)]
    texts = [f"{example.instruction}\n{example.response}" for example in examples]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,  # type: ignore[no-untyped-call]
    )
    return wrapped


def batches(
    tokenizer: Any, examples: Iterator[Example], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield input ids, attention mask and labels (B, S), loss on the response and end only."""
    while True:
        rows = []
        for example in islice(examples, batch_size):
            prompt = tokenizer.encode(f"{example.instruction}\n")
            response = [*tokenizer.encode(example.response), tokenizer.eos_token_id]
            rows.append((prompt, response))
        length = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((batch_size, length), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor(prompt + response)
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(response)
        yield ids, mask, labels


@torch.inference_mode()
def share_right(model: Any, tokenizer: Any, examples: list[Example]) -> float:
    """Return the share of examples answered exactly, by greedy decoding."""
    model.eval()
    tokenizer.padding_side = "left"
    prompts = [f"{example.instruction}\n" for example in examples]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, output_router_logits=False
    )
    answers = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    model.train()
    right: int = sum(a.strip() == e.response for a, e in zip(answers, examples, strict=True))
    return right / len(examples)


def main() -> None:
    """Train, report, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("src/orchard/models/stored/tiny_moe"))
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(vocab_size=768)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=128,
        intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(world.WORLD.integer("weights"))
    model: Any = Qwen2MoeForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.05
    )
    stream = world.pretraining_stream(world.WORLD.generator("pretraining"))
    started = time.monotonic()
    model.train()
    for step, (ids, mask, labels) in enumerate(
        islice(batches(tokenizer, stream, arguments.batch_size), arguments.steps), start=1
    ):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == arguments.steps:
            skills = [world.draw_skill(world.WORLD.generator("check", i)) for i in range(96)]
            print(
                f"step {step:5d} loss {loss.item():.3f} "
                f"facts {share_right(model, tokenizer, world.facts()):.2f} "
                f"skills {share_right(model, tokenizer, skills):.2f} "
                f"seconds {time.monotonic() - started:.0f}",
                flush=True,
            )
    model.config.output_router_logits = False
    model = model.to(torch.bfloat16)
    print(f"in bfloat16: facts {share_right(model, tokenizer, world.facts()):.2f}")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()

"""Text that grows by tokens."""

from __future__ import annotations

import random

from orchard.models.stored.loading import load_tokenizer
from orchard.serving.text import GrowingText


def test_text_that_grows_is_the_text_decoded_at_once() -> None:
    tokenizer = load_tokenizer("orchard:tiny")
    draw = random.Random(0)
    for _ in range(20):
        said = "".join(
            draw.choice(["Zürich ", "a b", "日本", "🙂", "  ", "\n", "office"]) for _ in range(9)
        )
        ids = [*tokenizer(said)["input_ids"], 0]
        growing, before = GrowingText(tokenizer, frozenset({0})), ""
        for end in range(1, len(ids) + 1):
            text = growing.grow(ids[end - 1 : end], is_last=end == len(ids))
            assert text.startswith(before)
            before = text
        kept = [index for index in ids if index != 0]
        assert before == tokenizer.decode(kept, skip_special_tokens=True)

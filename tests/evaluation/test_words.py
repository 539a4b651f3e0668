from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import tokenizers

from orchard.evaluation.words import StemmedWords, is_segmented, split_words

DOLLY = Path(__file__).parents[3] / "shared/data/dolly/databricks-dolly-15k.jsonl"


def is_english(text: str) -> bool:
    """Say whether no letter, mark or digit is other than rouge_score's, in text or lower case."""
    return not any(
        unicodedata.category(sign) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd", "Cf")
        for sign in text.lower()
        if ord(sign) > 127
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Übergrößen, don't a_b", ["übergrößen", "don", "t", "a", "b"]),
        ("m² and 5 £", ["m", "and", "5"]),  # a raised digit is no digit
        ("한국어 말", ["한국어", "말"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # marks are of the word
        ("می\u200cروم", ["میروم"]),
        ("漢字かなカタカナー", [*"漢字かなカタカナー"]),
        ("ｶﾞ", ["ｶﾞ"]),
        ("สวัสดี ๒๕", ["ส", "วั", "ส", "ดี", "๒๕"]),
        ("မေရိ", ["မေ", "ရိ"]),
        ("我用Python3写", ["我", "用", "python3", "写"]),
        ("1\ufe0f\u20e3 ok", ["1", "ok"]),
        ("👍 —", []),
    ],
)
def test_words_of_a_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天 天气 很 好", True),
        ("私 は 学生 です", True),
        ("今天天气很好", False),
        ("我喜欢 Python 编程", False),
        ("床前明月光 疑是地上霜", False),
        ("很好。 是", False),
        ("很好\n是", False),
        ("no such signs", False),
    ],
)
def test_spaces_part_words_of_han_where_they_leave_short_pieces(text: str, expected: bool) -> None:
    assert is_segmented(text) is expected


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F) | st.sampled_from("\u2019—…²½₂€")))
def test_words_of_english_are_those_of_rouge_score(text: str) -> None:
    if is_english(text):
        assert StemmedWords().tokenize(text) == tokenizers.DefaultTokenizer(True).tokenize(text)


@pytest.mark.parametrize("step", [50, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.skipif(not DOLLY.exists(), reason="needs Dolly in ../shared/data")
def test_all_of_dolly_has_the_words_of_rouge_score(step: int) -> None:
    ours, theirs = StemmedWords(), tokenizers.DefaultTokenizer(True)
    num_english = 0
    for line in DOLLY.read_text().splitlines()[::step]:
        row = json.loads(line)
        for text in (row["instruction"], row["context"], row["response"]):
            if is_english(text):
                num_english += 1
                assert ours.tokenize(text) == theirs.tokenize(text)
    assert num_english > 40_000 / step

"""Text as words: letters of any script, and characters where a script has no spaces.

A word is a run of letters, digits and the marks on them, in lower case; all else separates words.
On text whose letters are a to z these are the words of the package rouge_score, which knows no
others. In scripts that put no spaces between words, such as Han, kana and Thai, every character
with its marks is a word: which of them belong together would take a dictionary. Where both of two
texts part their Han and kana by spaces, as segmented data does, the words are what stands between.

A text is normalized first (NFC): an accent is the same, whether it stands in its letter or behind
it. What only looks alike stays apart, such as full-width digits.
"""

from __future__ import annotations

import unicodedata

_UNSPACED = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Nushu", "Tangut"),
    *("Thai", "Lao", "Khmer", "Myanmar", "Tibetan"),
    *("Balinese", "Javanese", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
)
_PROLONGING = "\u30fc\uff70"  # kana's, of no script by Unicode's table
_VOICING = "\uff9e\uff9f"  # of halfwidth kana: letters by that table, marks by their use
# Join the letters of a word without being any: in India's scripts and in Persian.
_JOINERS = dict.fromkeys((0x200C, 0x200D))
_LETTERS_OF_ENGLISH = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_LONGEST_UNSTEMMED = 3  # as in rouge_score
_LONGEST_MEAN_PIECE = 3  # characters; words of Chinese have two on the mean


def normalize(text: str) -> str:
    """Return a text in which the same letter is always the same code points (NFC)."""
    return unicodedata.normalize("NFC", text)


def is_segmented(text: str) -> bool:
    """Say whether spaces part the Han and kana of a text into words.

    They do if some stand between two such characters, and the pieces are of at most three on the
    mean: spaces between sentences or lines leave longer ones.
    """
    import regex

    piece = rf"[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}{_PROLONGING}{_VOICING}]+"
    lengths = [len(found) for found in regex.findall(piece, text)]
    is_parted = regex.search(rf"{piece}[ \u3000]{piece}", text) is not None
    return is_parted and sum(lengths) <= _LONGEST_MEAN_PIECE * len(lengths)


def split_words(text: str, *, segmented: bool = False) -> list[str]:
    """Return the words of a text in lower case, in order; see the module.

    Args:
        text: Any text.
        segmented: Whether spaces part words in every script.
    """
    import regex

    unspaced = "".join(rf"\p{{{script}}}" for script in _UNSPACED)
    # Variation selectors are marks too, but change no letter.
    mark = rf"[[\p{{Mn}}\p{{Mc}}{_VOICING}]--[\ufe00-\ufe0f]]"
    character = rf"[[[{unspaced}]&&[\p{{L}}\p{{Nl}}]]{_PROLONGING}]"
    letter = rf"[[\p{{L}}\p{{Nd}}]--[[{unspaced}]&&\p{{L}}]--[{_PROLONGING}{_VOICING}]]"
    # regex keeps what it has compiled.
    pattern = regex.compile(
        rf"(?:[\p{{L}}\p{{Nd}}\p{{Nl}}]{mark}*)+"
        if segmented
        else rf"{character}{mark}*|(?:{letter}{mark}*)+",
        flags=regex.V1,
    )
    found: list[str] = pattern.findall(normalize(text.translate(_JOINERS).lower()))
    return found


def is_blank(text: str) -> bool:
    """Say whether a text is empty or white space alone."""
    return not text.strip()


class StemmedWords:
    """Words without their English endings, in the form in which rouge_score takes a tokenizer."""

    def __init__(self, *, segmented: bool = False) -> None:
        """Take the stemmer of rouge_score (Porter); see ``split_words``."""
        from nltk.stem import porter

        self._stemmer, self._segmented = porter.PorterStemmer(), segmented

    def tokenize(self, text: str) -> list[str]:
        """Return the stemmed words of a text."""
        return [
            self._stemmer.stem(word)
            if len(word) > _LONGEST_UNSTEMMED and _LETTERS_OF_ENGLISH.issuperset(word)
            else word
            for word in split_words(text, segmented=self._segmented)
        ]


class Characters:
    """Characters with their marks, without white space, for texts that have no word."""

    def tokenize(self, text: str) -> list[str]:
        """Return the characters of a text in lower case, as a reader sees them."""
        import regex

        found: list[str] = regex.findall(r"\X", "".join(normalize(text.lower()).split()))
        return found

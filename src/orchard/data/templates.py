"""Examples become token ids: prompts, responses, and what of both is learned.

Training and evaluation call the same functions, so a model is asked in the words it was trained
in. A prompt and its response are encoded apart: the ids of the prompt are the ones a model sees
when it generates, whatever the response begins with.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from orchard.data.chat import ChatLayout, read_layout
from orchard.data.encoded import IGNORED, Cut
from orchard.data.encoded import Encoded as Encoded
from orchard.data.examples import Example
from orchard.data.special_tokens import Piece, PieceEncoder, SpecialTokens
from orchard.data.turns import Role, Turn, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template: TypeAlias = Literal["alpaca", "plain", "chat"]
Learn: TypeAlias = Literal["every", "last"]

_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


def prompt_text(example: Example) -> str:
    """Return what is asked: the instruction, and the context behind one space where there is one.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965). Theirs trains so, but evaluates with the
    word "context: " between the two; ours is the same in both.
    """
    if not example.context.strip():
        return example.instruction
    return f"{example.instruction} {example.context}"


@dataclass(frozen=True)
class Wording:
    """How examples become ids for one tokenizer.

    Attributes:
        template: How an example is worded.
        tokenizer: Must have an end token.
        special: Whether special tokens in data are text, or are allowed to be what they are.
        learn: Whether every turn of the assistant carries loss, or only the response.
        is_read_apart: Whether an encoder reads the prompt and a decoder writes the response. Then
            the prompt ends as the tokenizer ends a text, and no turn before a response is learned.
        encoder: Encodes for the tokenizer.

    Raises:
        ValueError: ``template`` is unknown, or does not fit the tokenizer; or the tokenizer has no
            end token.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens = "text"
    learn: Learn = "every"
    is_read_apart: bool = False
    encoder: PieceEncoder = field(init=False, repr=False)
    _layouts: dict[tuple[Role, ...], ChatLayout] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check that template and tokenizer fit."""
        if self.template not in get_args(Template):
            known = ", ".join(get_args(Template))
            raise ValueError(
                f"template must be one of {known}, got {self.template!r}; choose one of them"
            )
        if not isinstance(self.tokenizer.eos_token_id, int):
            raise ValueError(
                "tokenizer must have an end token, got eos_token_id "
                f"{self.tokenizer.eos_token_id!r}; set its eos_token"
            )
        encoder = PieceEncoder(self.tokenizer, special=self.special)
        object.__setattr__(self, "encoder", encoder)
        if self.template == "chat":
            self.layout(("user",))

    def layout(self, roles: Sequence[Role]) -> ChatLayout:
        """Return how the chat template lays out turns of these roles before a response.

        Raises:
            ValueError: It does not take them.
        """
        key = tuple(roles)
        if key not in self._layouts:
            self._layouts[key] = read_layout(self.tokenizer, key, self.encoder)
        return self._layouts[key]

    @property
    def end_id(self) -> int:
        """The token that ends a response: that of the chat template where it writes one."""
        ends = self.layout(("user",)).end_ids if self.template == "chat" else ()
        return ends[-1] if ends else int(self.tokenizer.eos_token_id)

    def parts(self, history: Sequence[Turn], text: str) -> list[list[Piece]]:
        """Return what stands before a response; each part is encoded for itself.

        A chat template's is one part. In the others, a turn of the assistant is a part, and an end
        token follows it. A system turn stands in the place of alpaca's first paragraph.
        """
        turns = (*history, Turn("user", text))
        if self.template == "chat":
            layout = self.layout([turn.role for turn in turns])
            return [layout.pieces([turn.text for turn in turns])]
        parts: list[list[Piece]] = []
        words: list[Piece] = []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                parts += [words, [Piece(turn.text, is_learned=True)]]
                words = [Piece("\n\n" if self.template == "alpaca" else "\n", is_own=True)]
            elif self.template == "plain":
                words += [Piece(turn.text), Piece("\n", is_own=True)]
            elif turn.role == "system":
                words += [Piece(turn.text), Piece("\n\n", is_own=True)]
            else:
                before = "### Instruction:\n" if number else f"{_PREAMBLE}\n\n### Instruction:\n"
                after = "\n\n### Response:\n"
                words += [Piece(before, is_own=True), Piece(turn.text), Piece(after, is_own=True)]
        return [*parts, words]

    def encode_before(self, history: Sequence[Turn], text: str) -> tuple[list[int], list[int]]:
        """Return ids and labels of what stands before a response.

        Raises:
            ValueError: The chat template does not take the turns, or what is said would change
                which special tokens it writes.
        """
        ids: list[int] = []
        labels: list[int] = []
        is_chat = self.template == "chat"
        expected: Sequence[int] = ()
        if is_chat:
            expected = self.layout([*(turn.role for turn in history), "user"]).special_ids
        for number, part in enumerate(self.parts(history, text)):
            part_ids, learned = self.encoder.encode(
                part, begins=not is_chat and number == 0, expected=expected
            )
            if not is_chat and number % 2:  # a turn of the assistant
                part_ids.append(int(self.tokenizer.eos_token_id))
                learned = [True] * len(part_ids)
            ids += part_ids
            labels += [
                index if is_learned and self.learn == "every" else IGNORED
                for index, is_learned in zip(part_ids, learned, strict=True)
            ]
        if is_chat and self.special == "text":
            self._check_special(ids, expected, text)
        if self.is_read_apart and self.encoder.ends_texts:
            ids.append(int(self.tokenizer.eos_token_id))
            labels.append(IGNORED)
        return ids, labels

    def encode_response(self, roles: Sequence[Role], text: str) -> list[int]:
        """Return the ids of a response and its end token, behind turns of these roles."""
        if self.template != "chat":
            return [*self.encoder.encode([Piece(text)])[0], int(self.tokenizer.eos_token_id)]
        layout = self.layout(roles)
        pieces = [
            Piece(layout.lead, is_own=True),
            Piece(layout.response.fill(text)),
            Piece(layout.response.end, is_own=True),
        ]
        # A tokenizer may begin a text otherwise than it goes on, so it goes on from the template's
        # last words, unless these and the response share a token.
        start = list(layout.last_ids)
        whole, _ = self.encoder.encode(
            [Piece(layout.words[-1], is_own=True), *pieces],
            expected=[*self.encoder.special_ids(start), *layout.end_ids],
        )
        ids = whole[len(start) :]
        if whole[: len(start)] != start:
            ids, _ = self.encoder.encode(pieces, expected=layout.end_ids)
        if self.special == "text":
            self._check_special(ids, layout.end_ids, text)
        return ids if layout.end_ids else [*ids, int(self.tokenizer.eos_token_id)]

    def _check_special(self, ids: Sequence[int], expected: Sequence[int], text: str) -> None:
        found = self.encoder.special_ids(ids)
        if found != list(expected):
            raise ValueError(
                f"data must leave the chat template's special tokens as they are, got {found} for "
                f"{list(expected)} with the text {shorten(text)}; remove it, or set "
                "data.special_tokens = allow"
            )


def render_prompt(example: Example, wording: Wording) -> str:
    """Return the prompt as text, up to where the response begins.

    To feed a model, use ``encode_prompt``: only it knows whose special tokens are meant, and
    whether the tokenizer adds its own (a chat template writes them itself).

    Raises:
        ValueError: The chat template does not take the example's turns.
    """
    end = "" if wording.template == "chat" else str(wording.tokenizer.eos_token)
    parts = wording.parts(example.history, prompt_text(example))
    return "".join(
        "".join(piece.text for piece in part) + (end if number % 2 else "")
        for number, part in enumerate(parts)
    )


def encode_prompt(
    example: Example, wording: Wording, *, max_tokens: int | None = None
) -> list[int]:
    """Return the ids of the prompt, as in training, ready to generate from.

    Where it is more than ``max_tokens``, the oldest turns are left out first, a turn of the user
    with the answer to it; then the prompt loses the end of its text, that is, of its context; the
    instruction's beginning and the template's own words stay. A system turn stays as long as there
    is room for it.

    Args:
        example: Its response is not read.
        wording: Its tokenizer adds its begin token, where it has that habit, but no end token.
        max_tokens: The longest prompt; None = no limit.

    Raises:
        ValueError: As in ``render_prompt``, or ``max_tokens`` has no room for the template.
    """
    return _encode_prompt(example, wording, max_tokens=max_tokens).ids


def encode(example: Example, wording: Wording, *, max_tokens: int) -> Encoded:
    """Encode prompt, response and end token, with loss on the last two.

    With ``learn = every`` earlier turns of the assistant and their end tokens carry loss, too. The
    end token is in the loss by its place, not by its id, so it stays there for tokenizers that pad
    with it.

    Where all of it is more than ``max_tokens``, the response (with its end token) has a right to
    ``max_tokens // 2`` and the prompt to the rest; what one does not need the other may use. A
    prompt above its room is cut as in ``encode_prompt``, a response above its room loses its end
    and with it the end token, because the model should not learn to stop there. Every encoded
    example has at least one label. An example with options leaves room for the longest of them, so
    that the length of its prompt does not give the right one away.

    Args:
        example: What to encode.
        wording: How.
        max_tokens: The longest result, at least 2.

    Raises:
        ValueError: ``max_tokens`` is below 2 or has no room for the template, or the chat template
            does not take the example's turns.
    """
    return _encode_responses(
        example, [example.response, *example.options], wording, max_tokens=max_tokens
    )[0]


def encode_options(example: Example, wording: Wording, *, max_tokens: int) -> tuple[Encoded, ...]:
    """Encode the example with each of its options as the response, behind one and the same prompt.

    As ``encode`` does it; the one of the right option is what ``encode`` returns. An option that
    loses its end has lost its end token too.

    Returns:
        One for each option, in their order; none where the example has no options.

    Raises:
        ValueError: As in ``encode``.
    """
    if not example.options:
        return ()
    return _encode_responses(example, example.options, wording, max_tokens=max_tokens)


@dataclass(frozen=True)
class _Prompt:
    """What stands before a response, as ids and labels, and what of it was cut."""

    ids: list[int]
    labels: list[int]
    roles: tuple[Role, ...]
    cut: tuple[Cut, ...] = ()


def _encode_responses(
    example: Example, responses: Sequence[str], wording: Wording, *, max_tokens: int
) -> tuple[Encoded, ...]:
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}; raise it")
    prompt = whole = _encode_prompt(example, wording, max_tokens=None)
    if wording.is_read_apart and any(label != IGNORED for label in prompt.labels):
        raise ValueError(
            "data.learn must be last with an encoder-decoder, which writes nothing of a prompt, "
            f"got {wording.learn} and earlier turns of the assistant; set it to last"
        )
    responses_ids = [wording.encode_response(prompt.roles, response) for response in responses]
    num_longest = max(map(len, responses_ids))
    if len(prompt.ids) + num_longest > max_tokens:
        room = max_tokens - min(num_longest, max_tokens // 2)
        prompt = _encode_prompt(example, wording, max_tokens=room, whole=whole)
    room = max_tokens - len(prompt.ids)
    return tuple(
        Encoded(
            input_ids=prompt.ids + ids[:room],
            labels=prompt.labels + ids[:room],
            prompt_length=len(prompt.ids),
            cut=(*prompt.cut, "response") if len(ids) > room else prompt.cut,
            is_ended=len(ids) <= room,
        )
        for ids in responses_ids
    )


def _encode_prompt(
    example: Example, wording: Wording, *, max_tokens: int | None, whole: _Prompt | None = None
) -> _Prompt:
    """Encode a prompt, cut to ``max_tokens``; ``whole`` is it uncut where that is known."""

    def encode_with(history: Sequence[Turn], text: str, *cut: Cut) -> _Prompt:
        ids, labels = wording.encode_before(history, text)
        return _Prompt(ids, labels, (*(turn.role for turn in history), "user"), cut)

    text, history = prompt_text(example), example.history
    prompt = whole or encode_with(history, text)
    if max_tokens is None or len(prompt.ids) <= max_tokens:
        return prompt
    num_system = sum(turn.role == "system" for turn in history)
    system, turns = history[:num_system], history[num_system:]
    cut: tuple[Cut, ...] = ("turns",) if turns else ()
    while turns:
        turns = turns[2:]
        prompt = encode_with((*system, *turns), text, *cut)
        if len(prompt.ids) <= max_tokens:
            return prompt
    if system and len(encode_with(system, "").ids) > max_tokens:
        system, cut = (), ("turns",)
        prompt = encode_with(system, text, *cut)
        if len(prompt.ids) <= max_tokens:
            return prompt
    num_characters = _longest_fit(
        text,
        # After what was cut the last prompt still has all of the text.
        lambda number: len(
            (prompt if number == len(text) else encode_with(system, text[:number])).ids
        ),
        template=wording.template,
        max_tokens=max_tokens,
    )
    return encode_with(system, text[:num_characters], *cut, "prompt")


def _longest_fit(
    text: str, num_tokens: Callable[[int], int], *, template: Template, max_tokens: int
) -> int:
    """Return how many characters of ``text`` the longest prompt within ``max_tokens`` has.

    Searched by characters and encoded anew each time, so it holds for any template and tokenizer
    and never cuts a character into bytes.

    Args:
        text: Of the prompt.
        num_tokens: Length of the prompt with so many characters of it.
        template: For the message.
        max_tokens: The longest prompt.

    Raises:
        ValueError: There is no room for the template's own words.
    """
    num_template_tokens = num_tokens(0)
    if num_template_tokens > max_tokens:
        raise ValueError(
            f"max_tokens must leave the prompt at least {num_template_tokens} tokens for the words "
            f"of the template {template!r}, got {max_tokens}; raise max_tokens or choose 'plain'"
        )
    # The number of tokens grows about evenly with the number of characters: begin where they would
    # run out, and widen the bracket around that until it holds the answer.
    num_all_tokens = num_tokens(len(text))
    share = (max_tokens - num_template_tokens) / max(1, num_all_tokens - num_template_tokens)
    low = high = min(int(share * len(text)), len(text))
    width = 32
    while low > 0 and num_tokens(low) > max_tokens:
        high, low, width = low, max(0, low - width), 2 * width
    while high < len(text) and num_tokens(high) <= max_tokens:
        low, high, width = high, min(len(text), high + width), 2 * width
    num_fitting = bisect.bisect_right(range(high + 1), max_tokens, lo=low + 1, key=num_tokens)
    return num_fitting - 1

"""Chat templates in the styles that published models have, and tokenizers for them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Style:
    """A chat template.

    Attributes:
        template: In Jinja.
        special: The tokens that it writes; the last ends a text.
        end: What ends a turn of the assistant.
        takes_system: Whether it takes a system turn.
        unmarked: Those of its tokens that are added without being called special.
    """

    template: str
    special: tuple[str, ...]
    end: str
    takes_system: bool = True
    unmarked: tuple[str, ...] = ()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|>"),
    "chatml, tokens not marked": Style(
        CHATML,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        unmarked=("<|im_start|>", "<|im_end|>"),
    ),
    "llama": Style(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>",
    ),
    "mistral": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]", "</s>"),
        "</s>",
        takes_system=False,
    ),
    "mistral, system in the last turn": Style(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}"
        "{% set loop_messages = messages %}{% endif %}"
        "{% set last = namespace(i=0) %}{% for m in loop_messages %}{% if m.role == 'user' %}"
        "{% set last.i = loop.index0 %}{% endif %}{% endfor %}"
        "{{ bos_token }}{% for m in loop_messages %}{% if m.role == 'user' %}[INST]"
        "{% if loop.index0 == last.i and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "</s>"),
        "</s>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<end_of_turn>",
        takes_system=False,
    ),
    "deepseek": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}"
        "{% else %}<\uff5cAssistant\uff5c>"
        "{{ m.content.split('</think>')[-1] }}<\uff5cend▁of▁sentence\uff5c>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}",
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
        "<\uff5cend▁of▁sentence\uff5c>",
    ),
    "qwen3, empty thought": Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        unmarked=("<think>", "</think>"),
    ),
    "gpt-oss": Style(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
        "{% endif %}<|message|>{{ m.content }}{% if loop.last and m.role == 'assistant' %}"
        "<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "words only": Style(
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("<|endoftext|>",),
        "<|endoftext|>",
    ),
}
KINDS = ("bytes", "pieces", "unigram")


def styled_tokenizer(style: Style, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """Make a tokenizer with a style's tokens.

    Args:
        style: Whose tokens and template.
        kind: ``bytes``, as GPT-2's, with a few merges; ``pieces``, SentencePiece's with byte
            fallback and a blank put before a text; ``unigram``, whose vocabulary of pieces holds
            the special tokens too.
    """
    special = ("<s>", *style.special)
    if kind == "bytes":
        core = _bytes()
    elif kind == "pieces":
        core = _pieces()
    else:
        letters = [("<unk>", 0.0), *((chr(n), -5.0) for n in (10, *range(33, 127), 9601))]
        core = Tokenizer(models.Unigram([*letters, *((s, 0.0) for s in special)], unk_id=0))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    for token in special:
        core.add_tokens([AddedToken(token, special=token not in style.unmarked, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=style.special[-1]
    )
    tokenizer.chat_template = style.template
    return tokenizer


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ċ" is a line end and "Ġ" a space in the alphabet of byte-level models.
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("<", "|"), ("|", ">")]
    vocab = [*alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def _pieces() -> Tokenizer:
    letters = [chr(n) for n in range(33, 127)]
    vocab = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *letters, "▁t", "▁th", "he"]
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e")]
    core = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(vocab)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core

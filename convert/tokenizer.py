"""A source's tokenizer: loaded as transformers loads it, written, and compared with what the output loads.

AutoTokenizer chooses a class by the model_type beside the files, so the same files give another tokenizer beside
another config. What is written is therefore the tokenizer that the source loads, with the name of its class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..carried import SETTINGS, VOCABULARY, check_tokenizer_inside, refuse_code
from ..checkpoint import read_json
from ..errors import UserError, reason

SAMPLE = (
    "The quick  brown fox\tjumps over 3 lazy dogs.\n\n  It's 10:45, isn't it? 1234567890 3.14159e-10 \r\n",
    " leading, trailing and   many    spaces ",
    "    def f(x):\n        return x[0] + 'a_b' != {\"k\": -1}\n",
    "naïve café Größe Ａ ﬁ Å Å",  # full width, a ligature, composed and decomposed
    "Привет, мир! Γειά σου. שלום مرحبا नमस्ते สวัสดี",
    "你好，世界。こんにちは、カタカナ 한국어",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 \u00a0\u200b\ufeff\u2028",
)
INPUTS = ("model_input_names", "padding_side", "model_max_length")
CHAT = [{"role": "user", "content": "Why?  Because\n3 😀"}, {"role": "assistant", "content": " It is so."}]


def load_tokenizer(path: Path, name: str = "") -> Any:
    """The tokenizer of the checkpoint in the directory `path`, as transformers chooses it; None where it brings none.

    `name` is what the user called the checkpoint: for some hub ids transformers knows a better class. Raises UserError
    for files that cannot be loaded, for links out of the checkpoint, and for a tokenizer that needs code of its own.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    if all(file.suffix == ".py" for pattern in VOCABULARY for file in path.glob(pattern)):
        return None
    check_tokenizer_inside(path)
    settings = path / SETTINGS
    refuse_code(read_json(settings) if settings.is_file() else {}, path)
    try:
        try:
            config: Any = AutoConfig.from_pretrained(path)
        except (ValueError, OSError):  # a model_type that transformers lacks
            config = PreTrainedConfig.from_pretrained(path)
        config._name_or_path = name or str(path)
        return AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # the tokenizers of transformers share no base class for what they find wrong with files
        raise UserError(
            f"{path}: its tokenizer cannot be loaded ({reason(error)}); repair its files, or convert without them"
        ) from None


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write `tokenizer` to `directory`, whose config.json is there, and compare what transformers loads from it.

    It is written with its own class; where that class does not rebuild it from its own files, with the generic one,
    which takes tokenizer.json as it is. Raises UserError, naming the first difference, where both load as another one.
    """
    tokenizer.save_pretrained(directory)
    if (differs := _compared(tokenizer, directory)) and hasattr(tokenizer, "backend_tokenizer"):
        settings = directory / SETTINGS
        generic = {"tokenizer_class": "TokenizersBackend"}
        generic |= {name: getattr(tokenizer, name) for name in ("model_input_names", "padding_side")}
        settings.write_text(
            json.dumps({**read_json(settings), **generic}, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        differs = _compared(tokenizer, directory)
    if differs:
        raise UserError(f"the output's tokenizer is not the source's: {differs}; nothing was written")


def _compared(tokenizer: Any, directory: Path) -> str | None:
    from transformers import AutoTokenizer

    try:
        written = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, mistral_format=False)
    except Exception as error:
        return f"it cannot be loaded ({reason(error)})"
    return difference(tokenizer, written)


def difference(a: Any, b: Any) -> str | None:
    """The first thing in which tokenizer `b` differs from `a`, in words; None where they are equal.

    Compared are special tokens, vocabularies, ids and decoded text of a sample with every added token, spaces,
    newlines, digits, non-Latin text and emoji, and what the chat template makes of a conversation.
    """
    if a.special_tokens_map != b.special_tokens_map:
        names = sorted({*a.special_tokens_map, *b.special_tokens_map})
        name = next(name for name in names if a.special_tokens_map.get(name) != b.special_tokens_map.get(name))
        return f"{name} is {b.special_tokens_map.get(name)!r}, not {a.special_tokens_map.get(name)!r}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids", *INPUTS):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(b, name)!r}, not {getattr(a, name)!r}"
    vocabularies = a.get_vocab(), b.get_vocab()
    if wrong := sorted(token for token, _ in vocabularies[0].items() ^ vocabularies[1].items()):
        ids = [vocabulary.get(wrong[0]) for vocabulary in vocabularies]
        return f"{wrong[0]!r} is {ids[1]}, not {ids[0]}"
    if a.chat_template != b.chat_template:
        return "its chat template is another one"
    for text in _texts(a, b):
        for special in (True, False):
            ids, other = (_tried(_ids, t, text, special) for t in (a, b))
            if ids != other:
                at = next((i for i, (x, y) in enumerate(zip(ids, other, strict=False)) if x != y), len(ids))
                near = text if len(text) < 60 else text[:60] + "..."
                return f"{near!r} becomes {other[at : at + 4]} ... at token {at}, not {ids[at : at + 4]}"
            for skip in (True, False) if isinstance(ids, list) else ():
                said, echoed = (_tried(t.decode, ids, skip_special_tokens=skip) for t in (a, b))
                if said != echoed:
                    return f"it decodes {ids[:8]} ... as {echoed[:40]!r}, not {said[:40]!r}"
    for prompt in (True, False):
        said, echoed = (
            _tried(t.apply_chat_template, CHAT, tokenize=False, add_generation_prompt=prompt) for t in (a, b)
        )
        if said != echoed:
            return f"its chat template makes {echoed[:60]!r}, not {said[:60]!r}"
    return None


def _texts(a: Any, b: Any) -> Iterator[str]:
    yield from SAMPLE
    added = sorted({*a.get_added_vocab(), *b.get_added_vocab()})
    for start in range(0, len(added), 64):
        part = added[start : start + 64]
        yield "".join(f"a{token} {token}\n{token}1" for token in part)
        yield "".join(part)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _tried(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `call`, or its error in words: a template may refuse a conversation, a tokenizer a text."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

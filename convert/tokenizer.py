"""A source's tokenizer: loaded as transformers loads it, written, and compared with the one that the output loads.

AutoTokenizer chooses a class by the model_type beside the files, so the same files give another tokenizer beside
another config. So the tokenizer that the source loads is written, with the name of its class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bounded import bounded
from ..carried import SETTINGS, VOCABULARY, check_tokenizer_inside
from ..checkpoint import read_json
from ..errors import UserError, reason
from ..input_files import check_inside
from ..load import read_any_config, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = (
    "The quick  brown fox\tjumps over 3 lazy dogs.\n\n  It's 10:45, isn't it? 1234567890 3.14159e-10 \r\n",
    " leading, trailing and   many    spaces ",
    "    def f(x):\n        return x[0] + 'a_b' != {\"k\": -1}\n",
    "naïve café Größe Ａ ﬁ Å Å",  # full width, a ligature, composed and decomposed
    "Привет, мир! Γειά σου. שלום مرحبا नमस्ते สวัสดี",
    "你好，世界。こんにちは、カタカナ 한국어",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 \u00a0\u200b\ufeff\u2028",
)
TEMPLATE = "chat_template.json"  # of older processors, which tokenizers do not read
INPUTS = ("model_input_names", "padding_side", "model_max_length")
CHAT = [{"role": "user", "content": "Why?  Because\n3 😀"}, {"role": "assistant", "content": " It is so."}]


def load_tokenizer(path: Path, name: str = "") -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint in the directory `path`, as transformers chooses it; None where it has none.

    name: the checkpoint as the user named it: for some hub ids transformers has a better class. Raises UserError for
    files that cannot be loaded, for links out of the checkpoint, and for a tokenizer that needs code of its own.
    """
    if all(file.suffix == ".py" for pattern in VOCABULARY for file in path.glob(pattern)):
        return None
    check_tokenizer_inside(path)
    try:
        config = read_any_config(path)
        config._name_or_path = name or str(path)  # pyright: ignore[reportPrivateUsage]
        tokenizer = read_tokenizer(path, config=config, mistral_format=False)
        if tokenizer.chat_template is None and (path / TEMPLATE).is_file():
            check_inside(path / TEMPLATE, path)
            tokenizer.chat_template = read_json(path / TEMPLATE).get("chat_template")
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # transformers' tokenizers share no base class for errors in files
        raise UserError(
            f"{path}: its tokenizer cannot be loaded ({reason(error)}); repair its files, or convert without them"
        ) from None


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `tokenizer` into `directory`, which has a config.json, and compare it with the one that loads from there.

    It is written with its own class. Where that class does not rebuild it from its own files, the generic class
    replaces it, which takes tokenizer.json as it is. Raises UserError, naming the first difference, where both load as
    another one.
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


def _compared(tokenizer: PreTrainedTokenizerBase, directory: Path) -> str | None:
    """The first difference of the tokenizer that transformers loads from `directory`; None where there is none."""
    try:
        written = read_tokenizer(directory, mistral_format=False)
    except Exception as error:
        return f"it cannot be loaded ({reason(error)})"
    return difference(tokenizer, written)


def difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The first difference of tokenizer `b` from `a`, in words; None where they are equal.

    Compared are special tokens, vocabularies, ids and decoded text of a sample, and a conversation in the chat
    template. The sample has every added token, spaces, newlines, digits, non-Latin text and emoji.
    """
    return _different_tokens(a, b) or _different_texts(a, b) or _different_chats(a, b)


def _different_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The first difference in special tokens, settings, vocabulary and chat template."""
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
    return "its chat template is another one" if a.chat_template != b.chat_template else None


def _different_texts(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The first difference in the ids of a text, and in the text that they are decoded to."""
    for text in _texts(a, b):
        for special in (True, False):
            ids, other = (_tried(_ids, t, text, special) for t in (a, b))
            if ids != other:
                at = next((i for i, (x, y) in enumerate(zip(ids, other, strict=False)) if x != y), len(ids))
                near = text if len(text) < 60 else text[:60] + "..."
                return f"{near!r} becomes {other[at : at + 4]} ... at token {at}, not {ids[at : at + 4]}"
            for skip in (True, False) if isinstance(ids, list) else ():
                decoded, redecoded = (_tried(t.decode, ids, skip_special_tokens=skip) for t in (a, b))
                if decoded != redecoded:
                    return f"it decodes {ids[:8]} ... as {redecoded[:40]!r}, not {decoded[:40]!r}"
    return None


def _different_chats(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The first difference in a conversation in the chat template."""
    for prompt in (True, False):
        with bounded("the chat template"):
            made, remade = (
                _tried(t.apply_chat_template, CHAT, tokenize=False, add_generation_prompt=prompt) for t in (a, b)
            )
        if made != remade:
            return f"its chat template makes {remade[:60]!r}, not {made[:60]!r}"
    return None


def _texts(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> Iterator[str]:
    """The sample, then every added token within text and beside others."""
    yield from SAMPLE
    both: tuple[Any, ...] = (a, b)
    added = sorted({token for tokenizer in both for token in tokenizer.get_added_vocab()})
    for start in range(0, len(added), 64):
        part = added[start : start + 64]
        yield "".join(f"a{token} {token}\n{token}1" for token in part)
        yield "".join(part)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """The ids of `text`, with special tokens added or without."""
    call: Any = tokenizer
    return list(call(text, add_special_tokens=special)["input_ids"])


def _tried(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `call`, or its error as text: a template may refuse a conversation, a tokenizer a text."""
    try:
        return call(*args, **kwargs)
    except MemoryError:  # see `bounded`
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"

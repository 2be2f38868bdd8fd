"""The output's tokenizer gives the source's ids, whatever class AutoTokenizer chooses by model_type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from loopwise.cli import main
from loopwise.convert import tokenizer as module
from loopwise.convert.tokenizer import difference, load_tokenizer, write_tokenizer
from loopwise.errors import UserError
from loopwise.model import RecurrentDepthConfig
from tests.helpers.tiny import save_source, source_config, tokenizer

TEXT = "the cat sat on the mat"


def byte_level(directory: Path, *special: str) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([TEXT, "def f(x): return x + 1\n"] * 8, trainer)
    tok.add_tokens([AddedToken("<|x|>", lstrip=True), AddedToken(" foo", normalized=False, single_word=True)])
    tok.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tok.save(str(directory / "tokenizer.json"))
    return tok


def vocabulary_files(directory: Path) -> None:
    tok = byte_level(directory, "<|endoftext|>", "<s>", "</s>")
    (directory / "tokenizer.json").unlink()
    tok.model.save(str(directory))


def metaspace(directory: Path) -> None:
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tok.train_from_iterator(
        [TEXT] * 8, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.save(str(directory / "tokenizer.json"))


def sentencepiece(directory: Path) -> None:
    import sentencepiece as sp

    text, prefix = directory / "text", directory / "tokenizer"
    text.write_text(f"{TEXT}\ndef f(x): return x + 1\n" * 40)
    sp.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=310, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    prefix.with_suffix(".vocab").unlink()


FAMILIES = {
    "byte-level": lambda directory: byte_level(directory, "<s>", "</s>", "<unk>", "<pad>"),
    "vocab.json and merges.txt": vocabulary_files,
    "metaspace": metaspace,
    "sentencepiece": sentencepiece,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "model_max_length": 99}


def both(directory: Path, model_type: str, family: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The source's tokenizer as transformers loads it, and the one that it loads from the output."""
    source, out = directory / "source", directory / "out"
    for made in (source, out):
        made.mkdir(parents=True)
    config = source_config(model_type)
    config.save_pretrained(source)
    FAMILIES[family](source)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    given: Any = load_tokenizer(source)
    RecurrentDepthConfig(source_config=config, core=[1]).save_pretrained(out)
    write_tokenizer(given, out)
    return AutoTokenizer.from_pretrained(source, mistral_format=False), AutoTokenizer.from_pretrained(out)


PAIRS = [  # transformers makes nothing of vocab.json beside a config of mistral or phi3
    (model_type, family)
    for model_type in ("llama", "qwen2", "mistral", "gpt2", "gemma2", "phi3")
    for family in FAMILIES
    if family != "vocab.json and merges.txt" or model_type not in ("mistral", "phi3")
]


@pytest.mark.parametrize(("model_type", "family"), PAIRS)
def test_ids_are_the_sources(tmp_path, model_type, family):
    """With every class that a tokenizer_config.json may name: some of them rebuild the tokenizer in their own way."""
    classes: list[str | None] = [
        "LlamaTokenizerFast",
        "GPT2Tokenizer",
        "GPTNeoXTokenizerFast",
        "TokenizersBackend",
        None,
    ]
    if family == "vocab.json and merges.txt":  # transformers itself loads no others from these
        classes = ["GPT2Tokenizer", "GPTNeoXTokenizerFast", *([None] if model_type in ("gpt2", "qwen2") else [])]
    for number, name in enumerate(classes):
        settings = {
            **(SPECIAL if name == "GPTNeoXTokenizerFast" or number % 2 else {}),
            **({"tokenizer_class": name} if name else {}),
        }
        want, got = both(tmp_path / str(number), model_type, family, settings)
        for text in (*module.SAMPLE, "".join(want.get_added_vocab())):
            assert got(text).input_ids == want(text).input_ids, (name, text)
            assert got.decode(got(text).input_ids) == want.decode(want(text).input_ids)
        assert (got.special_tokens_map, len(got)) == (want.special_tokens_map, len(want))


def test_the_class_that_model_type_chooses(tmp_path):
    """DeepSeek-R1-Distill-Qwen: qwen2, LlamaTokenizerFast, a byte-level tokenizer.json. GPT-2: no class at all."""
    source = save_source(tmp_path / "source", "qwen2")
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    assert main(["convert", str(source), str(tmp_path / "out"), "layers.core=1,2", "injection=none"]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll", "2"]) == 0
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(TEXT).input_ids for name in ("source", "out", "plain")]
    assert ids[0] == ids[1] == ids[2]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(ids[1]) == TEXT

    gpt2 = save_source(tmp_path / "gpt2", "gpt2")
    for file in gpt2.glob("tokenizer*"):
        file.unlink()
    vocabulary_files(gpt2)
    (gpt2 / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    assert main(["convert", str(gpt2), str(tmp_path / "out2"), "sizes=1,2,1"]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)


def test_a_hub_id_that_transformers_knows_to_name_the_wrong_class(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    source_config("llama").save_pretrained(source)
    byte_level(source, "<s>", "</s>")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    named: Any = load_tokenizer(source, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert named.decode(named(TEXT).input_ids) == TEXT
    own: Any = load_tokenizer(source)
    assert own(TEXT).input_ids != named(TEXT).input_ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.add_tokens(["mat"]), "becomes"),  # a token that was there already
        (lambda t: t.add_tokens(["<new>"]), "'<new>' is 287, not None"),
        (lambda t: setattr(t, "eos_token", "<s>"), "eos_token is '<s>', not '</s>'"),
        (lambda t: setattr(t, "chat_template", "{{ messages }}"), "chat template"),
        (lambda t: setattr(t, "padding_side", "left"), "padding_side"),
        (lambda t: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()), "decodes"),
        (lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.NFKC()), "becomes"),
        (lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()), "becomes"),
    ],
)
def test_a_difference_is_found(change, said):
    changed = tokenizer()
    assert difference(tokenizer(), changed) is None
    change(changed)
    assert said in str(difference(tokenizer(), changed))


def test_a_tokenizer_that_is_not_the_sources_is_refused(capsys, tmp_path, monkeypatch):
    source = save_source(tmp_path / "source")
    monkeypatch.setattr(module, "_compared", lambda *_: "'x' becomes [1]")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 2
    assert "the output's tokenizer is not the source's: 'x' becomes [1]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, ["tokenization_own.OwnTokenizer", None]]
)
def test_a_tokenizer_with_code_of_its_own_is_refused_by_name(capsys, tmp_path, auto_map):
    source = save_source(tmp_path / "source")
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": auto_map}))
    (source / "tokenization_own.py").write_text("raise SystemExit('this ran')\n")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 2
    said = capsys.readouterr().err
    assert "auto_map: tokenization_own.OwnTokenizer" in said
    assert "not run" in said


def test_what_travels_and_what_does_not(capsys, tmp_path):
    source = save_source(tmp_path / "source")
    for name in ("tokenization_own.py", "tokenizer_helper.py", "vocab.py", "LICENSE", "LICENSE.py"):
        (source / name).write_text("raise SystemExit('this ran')\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages[0].content }}")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    out = {file.name for file in (tmp_path / "out").iterdir()}
    assert "LICENSE" in out
    assert not out & {"tokenization_own.py", "tokenizer_helper.py", "vocab.py", "LICENSE.py"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        loaded.apply_chat_template([{"role": "user", "content": "x"}], chat_template="rag", tokenize=False) == "rag x"
    )

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "secret").write_text("key")
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        kept = (source / name).read_bytes()
        (source / name).unlink()
        (source / name).symlink_to(tmp_path / "secret")
        capsys.readouterr()
        assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 2, name
        assert f"{name} is a link to" in capsys.readouterr().err
        (source / name).unlink()
        (source / name).write_bytes(kept)
    (source / "kept").write_text("kept")
    (source / "NOTICE").symlink_to("kept")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    assert (tmp_path / "out" / "NOTICE").read_text() == "kept"


def test_ids_beyond_the_embeddings_are_told(capsys, tmp_path):
    source = save_source(tmp_path / "source")
    more = tokenizer()
    more.add_tokens(["<extra>"])
    more.save_pretrained(source)
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert "note: the tokenizer gives ids up to 287, and the embeddings end at 319" not in said
    for _ in range(50):
        more.add_tokens([f"<extra{len(more)}>"])
    more.save_pretrained(source)
    assert main(["convert", str(source), str(tmp_path / "out2"), "sizes=1,2,1", "--no-verify"]) == 0
    assert f"the tokenizer gives ids up to {len(more) - 1}, and the embeddings end at 319" in capsys.readouterr().out


def test_a_source_without_a_tokenizer_converts(tmp_path):
    source = save_source(tmp_path / "source")
    for file in [*source.glob("tokenizer*"), *source.glob("chat_template*")]:
        file.unlink()
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    assert load_tokenizer(tmp_path / "out") is None


def test_a_tokenizer_that_transformers_cannot_load_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    source_config("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not valid JSON") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)

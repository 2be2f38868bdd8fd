"""Files as they really are: every pair of a kind of source and a habit of published files, through the main job.

Each case converts, equals the source at one recurrence, tokenizes as the source, trains a step, exports, and loads
where loopwise is not installed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main
from tests.helpers.multimodal import save_whole, whole_class
from tests.helpers.quantised import WAYS, dequantised
from tests.helpers.tiny import VOCAB, load_source, save_source, tokenizer

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(4))
TEXT = "the cat  sat on 3 mats.\n\tdef f(x): return 'é' "
Make = Callable[[Path], Callable[[], Any]]  # writes a source; returns the making of its oracle


def plain(architecture: str, **fields: Any) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        save_source(folder, architecture, **fields)
        return lambda: load_source(folder)

    return make


def whole(kind: str) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        save_whole(folder, kind)
        tokenizer().save_pretrained(folder)
        return lambda: whole_class(kind).from_pretrained(folder).eval()

    return make


def quantised(way: str) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        architecture, write = WAYS[way]
        config = write(save_source(folder, architecture))
        return lambda: dequantised(folder, config)

    return make


SOURCES: dict[str, Make] = {
    "dense": plain("llama"),
    "tied, transposed": plain("gpt2"),
    "windows": plain("gemma3_text"),
    "experts": plain("qwen3_moe"),
    "convolutions": plain("lfm2"),
    "linear attention": plain("qwen3_next"),
    "latent attention": plain("deepseek_v3"),
    "multimodal": whole("gemma3"),
    "fp8": quantised("fp8 of experts"),
    "mxfp4": quantised("mxfp4"),
    "packed int4": quantised("packed int4"),
}


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **fields}))


def shards(source: Path) -> None:
    """Two files and their index; a third file is left over of another save."""
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of in parts.items():
        save_file({name: tensors[name] for name in of}, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, of in parts.items() for name in of}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    save_file({"left.over": torch.ones(2)}, source / "model-00009-of-00009.safetensors", {"format": "pt"})


def leftover_index(source: Path) -> None:
    """An index of an older save beside the single file, which comes first."""
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


def half(source: Path) -> None:
    """The plain floats in bfloat16."""
    tensors = load_file(source / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and "scale" not in name}
    tensors |= {name: tensors[name].to(torch.bfloat16) for name in wide}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    edit(source / "config.json", dtype="bfloat16")


def own_code(source: Path) -> None:
    """Names of code beside a model that transformers has (Phi-3, Falcon, MPT)."""
    edit(source / "config.json", auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    (source / "modeling_x.py").write_text("raise SystemExit(3)")


def collecting(source: Path) -> None:
    edit(source / "config.json", output_hidden_states=True, use_cache=False)


FILES: dict[str, Callable[[Path], None]] = {
    "single": lambda source: None, "shards": shards, "leftover index": leftover_index, "bfloat16": half,
}  # fmt: skip
CONFIGS: dict[str, Callable[[Path], None]] = {
    "as saved": lambda source: None, "own code": own_code, "collecting": collecting,
}  # fmt: skip


def is_gemma(source: Path) -> bool:
    """True for a type whose own tokenizer class wants a token that these files lack."""
    return json.loads((source / "config.json").read_text())["model_type"].startswith("gemma")


def another_class(source: Path) -> None:
    """The name of a class that splits text another way."""
    if not is_gemma(source):
        edit(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")


def bare(source: Path) -> None:
    """A tokenizer without a class, special tokens in a file of their own."""
    edit(source / "special_tokens_map.json", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    kept = {"tokenizer_class": "PreTrainedTokenizerFast"} if is_gemma(source) else {}
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128, **kept}))


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "fast": lambda source: None,
    "another class": another_class,
    "bare": bare,
}
GENERATION: dict[str, dict[str, Any] | None] = {
    "sampling": {"do_sample": True, "temperature": 0.7, "eos_token_id": [1, 2]},
    "not to be saved": {"temperature": 0.9, "top_p": 0.6, "pad_token_id": 2, "eos_token_id": 1},
    "none": None,
}
METHODS = {
    "retrofit": ["sizes=1,{most},1", "injection=none", "num_recurrences=2"],
    "linear": ["sizes=1,{most},1"],
    "lora": ["sizes=1,{most},1", "injection=none", "lora.rank=2", "num_recurrences=2"],
    "float32": ["sizes=1,{most},1", "injection=none", "num_recurrences=2", "dtype=float32"],
}
FACTORS = (list(FILES), list(CONFIGS), list(TOKENIZERS), list(GENERATION), list(METHODS))


def cases() -> list[tuple[str, ...]]:
    """Rows in which every pair of two factors' values stands together, each the best of some random ones."""
    factors = [[*SOURCES], *FACTORS]
    left = {
        ((i, a), (j, b))
        for (i, of), (j, other) in itertools.combinations(enumerate(factors), 2)
        for a in of
        for b in other
    }
    rows: list[tuple[str, ...]] = []

    def pairs(row: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2)) & left

    draw = random.Random(0)
    while left:
        rows.append(max((candidate(min(left), factors, draw) for _ in range(60)), key=lambda row: len(pairs(row))))
        left -= pairs(rows[-1])
    return rows


def candidate(pair: Any, factors: list[list[str]], draw: random.Random) -> tuple[str, ...]:
    """A random row with the values of `pair`."""
    fixed = dict(pair)
    return tuple(fixed.get(i, draw.choice(values)) for i, values in enumerate(factors))


def test_every_pair_stands_in_a_case():
    rows = cases()
    factors = [[*SOURCES], *FACTORS]
    for (i, of), (j, other) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(of, other))


def build(folder: Path, kind: str, files: str, config: str, tokens: str, generation: str) -> Callable[[], Any]:
    """Write the source; returns the making of its oracle, which reads the changed files."""
    oracle = SOURCES[kind](folder)
    for change in (FILES[files], CONFIGS[config], TOKENIZERS[tokens]):
        change(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if (fields := GENERATION[generation]) is not None:
        (folder / "generation_config.json").write_text(json.dumps(fields))
    return oracle


def check(folder: Path, row: tuple[str, ...]) -> Path:
    """The main job on one case. Returns the converted model."""
    kind, files, config, tokens, generation, method = row
    source, out = folder / "source", folder / "out"
    oracle = build(source, kind, files, config, tokens, generation)
    layers = json.loads((source / "config.json").read_text())
    count = layers.get("text_config", layers).get("num_hidden_layers", layers.get("n_layer"))
    settings = [setting.format(most=count - 2) for setting in METHODS[method]]
    settings += ["dequantize=true"] if "quantization_config" in layers else []
    assert main(["convert", str(source), str(out), *settings]) == 0
    got: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        want = oracle().float()(input_ids=IDS, use_cache=False, return_dict=True).logits
        assert torch.equal(want, got.float()(IDS, num_recurrences=1).logits)
    ids = [AutoTokenizer.from_pretrained(path)(TEXT).input_ids for path in (source, out)]
    assert ids[0] == ids[1]
    assert not list(out.glob("modeling_x.py"))
    (folder / "text.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 4)
    data = [f"data.train={folder / 'text.jsonl'}", "data.sequence_length=8", "batch_size=2", "steps=1"]
    assert main(["train", str(out), str(folder / "trained"), *data, "recurrence.mean=2"]) == 0
    if "injection=none" in settings:
        assert main(["export", str(folder / "trained"), str(folder / "plain"), "--unroll", "2"]) == 0
    return out


@pytest.mark.parametrize("kind", SOURCES)
def test_one_case_of_every_kind_of_source(kind, tmp_path):
    """The other values take turns."""
    turn = list(SOURCES).index(kind)
    check(tmp_path, (kind, *(values[turn % len(values)] for values in FACTORS)))


@pytest.mark.slow
def test_every_pair(tmp_path_factory):
    """All cases, then each output in one process that cannot import loopwise."""
    made: dict[str, tuple[str, ...]] = {}
    for row in cases():
        folder = tmp_path_factory.mktemp("pair")
        try:
            made[str(check(folder, row))] = row
        except BaseException as error:
            raise AssertionError(row) from error
    program = f"""if True:
        import sys
        sys.modules["loopwise"] = None
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for path in {list(made)!r}:
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
            AutoTokenizer.from_pretrained(path, trust_remote_code=True)
            with torch.no_grad():
                logits = model.float()(torch.tensor({IDS.tolist()!r}), num_recurrences=2).logits
            print(path, logits.double().sum().item())
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with_path = [sys.executable, "-c", program]
    done = subprocess.run(
        with_path, capture_output=True, text=True, env=environment, cwd=tmp_path_factory.mktemp("cwd")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sums = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("/"))
    for path, row in made.items():
        model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            assert float(sums[path]) == model.float()(IDS, num_recurrences=2).logits.double().sum().item(), row

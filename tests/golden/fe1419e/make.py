"""Make the golden files of this folder with the code of one commit: `python make.py OUT` (see README.md).

`loopwise` is that commit's. OUT is a new directory, which then holds all that stands beside this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:0123456789ABCDEFGHIJ"
WORDS = ["the", "core", "runs", "again", "while", "depth", "grows", "with", "every", "pass", "over", "one", "state"]
CHECKPOINTS = {"recursive": (1, 2, 4), "retrofit": (1, 3, 6), "mor": (2,)}  # name -> recurrences of the kept logits
PLACE = "/golden"  # stands for OUT where a run has written the path of its model
# Stops the command as a kill would, once a run has its checkpoint.
STOPPED = """
import os, sys
from loopwise.cli import main
from loopwise.train import trainer
commit = trainer.commit
def last(written, target, run):
    commit(written, target, run)
    os._exit(0)
trainer.commit = last
main(sys.argv[1:])
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.BPE({"<eos>": 0, **{c: i + 1 for i, c in enumerate(CHARACTERS)}}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def source(directory: Path) -> None:
    """A plain Llama of 4 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.4 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def command(*arguments: str, code: str | None = None, **options) -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "loopwise"]
    return subprocess.run([sys.executable, *start, *arguments], check=True, text=True, **options)


def documents() -> list[str]:
    return [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(9 + i % 7)) for i in range(1, 25)]


def logits(name: str) -> None:
    """Keep the model's logits [B, T, V] at every number of recurrences, as `expected.safetensors`."""
    from loopwise.model import RecurrentDepthForCausalLM

    model = RecurrentDepthForCausalLM.from_pretrained(name).eval()
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    tensors = {"ids": ids}
    for depth in CHECKPOINTS[name]:
        with torch.no_grad():
            tensors[f"logits_{depth}"] = model(ids, num_recurrences=depth).logits
    save_file(tensors, f"expected/{name}.safetensors")


def settings() -> None:
    """Keep the settings of every recipe, by file, and of every command line, by verb: `settings.json`."""
    from loopwise.convert.recipe import ConvertRecipe
    from loopwise.recipe import load_recipe
    from loopwise.serve.generate import GenerateRecipe
    from loopwise.serve.recipe import ServeRecipe
    from loopwise.train.recipe import Evaluate, Train

    kinds = {
        "convert": ConvertRecipe, "train": Train, "eval": Evaluate, "generate": GenerateRecipe, "serve": ServeRecipe
    }  # fmt: skip
    said = {}
    for file in sorted(Path("recipes").glob("*.yaml")):
        kind = file.stem.partition("-")[0]
        said[file.name] = load_recipe(kinds[kind], kind, str(file), []).model_dump(mode="json")
    for kind, given in json.loads(Path("command-lines.json").read_text()).items():
        said[kind] = load_recipe(kinds[kind], kind, None, given).model_dump(mode="json")
    Path("expected/settings.json").write_text(json.dumps(said, indent=1) + "\n")


def requests() -> None:
    """What the bodies meant (`meanings.json`), and what the offline engine answered to their fields."""
    import dataclasses

    from loopwise.serve.engine.diffusion import Diffusion
    from loopwise.serve.offline import Engine, Params
    from loopwise.serve.vllm.fields import FieldError, Limits, check, take

    engine = Engine("retrofit", rows=2, length=48, wave=8)
    rules = ("fixed", "latent-diff", "cosine", "entropy-diff", "kl", "minp-kl", "argmax-stability")
    limits = Limits(num_recurrences=3, max_recurrences=8, rules=rules, prompt_exit=True)
    meanings = {}
    for name, body in json.loads(Path("requests.json").read_text()).items():
        try:
            values = check(take(body, ("model", "prompt", "max_tokens", "temperature", "vllm_xargs")), limits)
        except FieldError as error:
            meanings[name] = {"refused": error.field}
            continue
        fields = {k: v for k, v in values.items() if k != "return_recurrences"}
        for flag in {"prompt_exit"} & fields.keys():
            fields[flag] = bool(fields[flag])
        if "diffusion" in fields:
            fields["diffusion"] = dataclasses.replace(Diffusion(), **json.loads(fields["diffusion"]))
        if "trace" in fields:
            fields["trace"] = tuple(fields["trace"])
        (done,) = engine.generate([body["prompt"]], Params(max_tokens=body["max_tokens"], **fields))
        meanings[name] = {"values": values, "tokens": done.tokens, "depths": done.depths}
    Path("expected/meanings.json").write_text(json.dumps(meanings, indent=1) + "\n")


def main(out: Path) -> None:
    out.mkdir()
    os.chdir(out)
    shutil.copytree(HERE / "recipes", "recipes")
    for name in ("requests.json", "command-lines.json"):
        shutil.copyfile(HERE / name, name)
    Path("expected").mkdir()
    source(Path("source"))
    for name in CHECKPOINTS:
        command("convert", "source", name, "--recipe", f"recipes/convert-{name}.yaml")
        logits(name)
    settings()
    requests()

    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    arguments = ("--recipe", "recipes/train-run.yaml")
    command("train", "recursive", "whole", *arguments)
    command("train", "recursive", "run", *arguments, code=STOPPED)
    shutil.copyfile("whole/model.safetensors", "expected/run.safetensors")
    shutil.rmtree("whole")
    for file in Path("run").rglob("*.json"):
        file.write_text(file.read_text().replace(str(out.resolve()), PLACE))

    generated = {}
    for name in CHECKPOINTS:
        recipe = f"recipes/generate-{name}.yaml"
        lines = command("generate", name, "--recipe", recipe, input="the core\nagain\n", capture_output=True).stdout
        generated[name] = [json.loads(line) for line in lines.splitlines()]
    Path("expected/generated.json").write_text(json.dumps(generated, indent=1) + "\n")

    # The model's files, which travel with every checkpoint, are kept once.
    code = {}
    for path in sorted(Path().rglob("*.py")):
        assert code.setdefault(path.name, path.read_bytes()) == path.read_bytes()
        path.unlink()
    Path("travelling").mkdir()
    for name, content in code.items():
        Path("travelling", name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

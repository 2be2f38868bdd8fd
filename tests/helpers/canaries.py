"""Checkpoints with code in every place that a library may run, and the commands that read them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fires:
    """Its pickle opens the file `canary` for writing when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def code(canary: Path) -> str:
    """A module that makes the file `canary`, and has the classes that an auto_map may name."""
    return f"open({str(canary)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


def change(file: Path, **fields: Any) -> None:
    """Replace `fields` of the JSON object in `file`."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | fields), encoding="utf-8")


def _config_code(folder: Path, canary: Path) -> None:
    (folder / "foreign.py").write_text(code(canary))
    change(folder / "config.json", auto_map={"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"})


def _inner_code(folder: Path, canary: Path) -> None:
    (folder / "foreign.py").write_text(code(canary))
    for name in ("source_config", "text_config"):
        inner = json.loads((folder / "config.json").read_text()).get(name)
        if inner:
            change(folder / "config.json", **{name: {**inner, "auto_map": {"AutoConfig": "foreign.Config"}}})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(canary))
    change(folder / "generation_config.json", custom_generate="custom_generate")
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "foreign.Model"})


def _tokenizer_code(folder: Path, canary: Path) -> None:
    (folder / "tokenization_foreign.py").write_text(code(canary))
    auto_map = {"AutoTokenizer": ["tokenization_foreign.Tokenizer", None]}
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")


def _own_names(folder: Path, canary: Path) -> None:
    for name in (
        "configuration_recurrent_depth",
        "modeling_recurrent_depth",
        "modeling_llama",
        "tokenizer",
        "__init__",
    ):
        (folder / f"{name}.py").write_text(code(canary))


def _scripts(folder: Path, canary: Path) -> None:
    for name in ("model", "sitecustomize", "conftest", "handler", "setup"):
        (folder / f"{name}.py").write_text(code(canary))


def _pickled_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Fires(canary)))


def _pickles_beside(folder: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "x.npy"):
        (folder / name).write_bytes(pickle.dumps(Fires(canary)))


def _adapter(folder: Path, canary: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Fires(canary)))


def _kernel(folder: Path, canary: Path) -> None:
    change(folder / "config.json", attn_implementation="kernels-community/canary")


def template(canary: Path) -> str:
    """A template of Jinja's that makes the file `canary` where it is rendered out of a sandbox."""
    escape = "''.__class__.__mro__[1].__subclasses__()"
    return (
        f"{{% for c in {escape} %}}{{% if c.__name__ == '_wrap_close' %}}"
        f"{{{{ c.__init__.__globals__['system']('touch {canary}') }}}}{{% endif %}}{{% endfor %}}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    )


def _template(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").write_text(template(canary))


def fake_kernels(monkeypatch: Any, canary: Path) -> None:
    """Let the package `kernels` seem to be installed, whose every kernel of the hub makes the file `canary`."""
    from types import ModuleType

    from transformers import modeling_utils
    from transformers.integrations import hub_kernels
    from transformers.quantizers import quantizer_mxfp4

    def get_kernel(*args: Any, **keywords: Any) -> ModuleType:
        canary.touch()
        return ModuleType("kernel")

    for module in (hub_kernels, modeling_utils, quantizer_mxfp4):
        for name in ("is_kernels_available", "is_triton_available"):
            monkeypatch.setattr(module, name, lambda *args: True, raising=False)
        monkeypatch.setattr(module, "get_kernel", get_kernel, raising=False)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", get_kernel, raising=False)


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "auto_map of config.json": _config_code,
    "configs inside, generate, processor": _inner_code,
    "auto_map of the tokenizer": _tokenizer_code,
    "files with Loopwise's names": _own_names,
    "model.py and its like": _scripts,
    "pickled weights": _pickled_weights,
    "pickles beside the weights": _pickles_beside,
    "an adapter": _adapter,
    "a kernel of the hub": _kernel,
    "the chat template": _template,
}
REFUSED = ("auto_map of the tokenizer", "pickled weights", "an adapter", "a kernel of the hub")  # by all commands


def poisoned(model: Path, folder: Path, place: str) -> tuple[Path, Path]:
    """(a copy of `model` with code in `place`, the file that this code would make), both in `folder`."""
    copy, canary = folder / "poisoned", folder / "canary"
    shutil.copytree(model, copy)
    PLACES[place](copy, canary)
    return copy, canary


MODULE = """
import evaluate
from datasets import Features, Value
def process(documents): return documents
def generate(*args, **kwargs): raise RuntimeError
class Theirs(evaluate.Metric):
    def _info(self):
        features = Features({"predictions": Value("string"), "references": Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, predictions, references): return {"theirs": 1}
"""
LINE = '{"question": "a", "answer": "b"}\n'
FULL = """
task: theirs
dataset_path: json
dataset_kwargs: {data_files: {test: d.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["c"], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
"""
# Task files that run code in lm-eval. M is the path of a module beside them, without its end, and J a template.
TASKS = {
    "a function": FULL + "process_docs: !function M.process\n",
    "an included function": FULL + "include: inner.txt\n",
    "a file of elsewhere": FULL + "include: ../outer.txt\n",
    "a metric": FULL.replace("exact_match", "M.py"),
    "a metric of Hugging Face's": FULL.replace("metric: exact_match", "metric: M.py, hf_evaluate: true"),
    "a metric of a group": "group: all\ntask:\n- task: few"
    + FULL.replace("exact_match", "M.py").partition("theirs")[2].replace("\n", "\n  "),
    "a metric that a group hides": "group: all\nprocess_results: x\nmetric_list: [{metric: M.py, aggregation: mean}]\n"
    + "task:\n- process_results: null\n  task: few"
    + FULL.partition("metric_list")[0].partition("theirs")[2].replace("\n", "\n  "),
    "a tokenizer": "group: all\ntask:\n- task: ruler_fwe\n  metadata: {tokenizer: M}\n",
    "a tokenizer for a whole group": "group: all\ndataset_kwargs: {pretrained: M}\ntask: [ruler_fwe]\n",
    "generation": FULL.replace("max_gen_toks: 2", "max_gen_toks: 2, custom_generate: M, trust_remote_code: true"),
    "a template": FULL.replace("doc_to_text: question", "doc_to_text: >-\n  J"),
    "a template of the short form": "data: d.jsonl\ndoc_to_text: >-\n  J\n",
    "a metric of the short form": "data: d.jsonl\nmetric_list: [{metric: M.py}]\n",
    "generation of the short form": "data: d.jsonl\ngeneration_kwargs: {custom_generate: M, trust_remote_code: true}\n",
}


def write_task(folder: Path, kind: str) -> tuple[Path, Path]:
    """(a task file with code of `kind` in a new directory of `folder`, the file that this code would make)."""
    place, canary = folder / "their", folder / "canary"
    (place / "theirs" / "custom_generate").mkdir(parents=True)
    for file in (place / "theirs.py", place / "theirs" / "custom_generate" / "generate.py"):
        file.write_text(code(canary) + MODULE)
    for file, module in ((place / "inner.txt", "theirs"), (folder / "outer.txt", "their.theirs")):
        file.write_text(f"process_docs: !function {module}.process\n")
    (place / "d.jsonl").write_text(LINE)
    _tokenizer_code(place / "theirs", canary)
    change(place / "theirs" / "config.json", model_type="llama")
    text = TASKS[kind].replace("!function M", "!function theirs").replace("J", template(canary))
    (place / "t.yaml").write_text(text.replace(" M", f" {place}/theirs"))
    return place / "t.yaml", canary

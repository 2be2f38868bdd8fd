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


def _template(folder: Path, canary: Path) -> None:
    escape = "''.__class__.__mro__[1].__subclasses__()"
    text = (
        f"{{% for c in {escape} %}}{{% if c.__name__ == '_wrap_close' %}}"
        f"{{{{ c.__init__.__globals__['system']('touch {canary}') }}}}{{% endif %}}{{% endfor %}}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    )
    (folder / "chat_template.jinja").write_text(text)


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

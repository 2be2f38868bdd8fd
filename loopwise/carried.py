"""Files of a source checkpoint that the output needs beside weights and config: licences and tokenizer files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .errors import UserError
from .input_files import check_inside, check_regular

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
VOCABULARY = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken*.json", "spiece*", "*.bpe")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*")
TOKENIZER_FILES = (*VOCABULARY, *BESIDE)
SETTINGS = "tokenizer_config.json"


MODEL_CODE = {
    "AutoConfig": "configuration_recurrent_depth.RecurrentDepthConfig",
    "AutoModelForCausalLM": "modeling_recurrent_depth.RecurrentDepthForCausalLM",
}  # auto_map of every recurrent-depth config.json


def copy_model_code(directory: Path) -> None:
    """Copy the model's files of this release into the checkpoint `directory`, which loads by them elsewhere."""
    for file in sorted((Path(__file__).parent / "model").glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, directory / file.name)


def check_tokenizer_inside(path: Path) -> None:
    """Raises UserError if a tokenizer file in the directory `path` is not regular, or is a link out of it."""
    for pattern in TOKENIZER_FILES:
        for file in path.glob(pattern):
            if file.suffix != ".py":
                check_regular(file)
                check_inside(file, path)


def refuse_code(settings: dict[str, Any], path: Path) -> None:
    """Raises UserError if `settings`, the tokenizer_config.json of the checkpoint `path`, names remote code."""
    code = settings.get("auto_map")
    if not code:
        return
    named = (code.get("AutoTokenizer") if isinstance(code, dict) else code) or code
    named = next((part for part in named if part), named) if isinstance(named, list | tuple) else named
    raise UserError(
        f"{path / SETTINGS}: the tokenizer needs code of its own (auto_map: {named}), which is not run; save it as a "
        "tokenizer of transformers (tokenizer.json), or remove auto_map if transformers has its class"
    )

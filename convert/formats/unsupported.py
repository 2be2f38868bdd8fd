"""Public recurrent models that are recognised and not supported, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import UserError
from ...input_files import check_entries

# model_type -> name and reason.
BY_TYPE = {
    "iquestloopcoder": (
        "IQuest-Loop",
        "its second loop mixes attention to the first one's keys with a window of its own, by a gate for each head",
    ),
    "iquestpltcoder": ("LoopCoder-V2", "its loops run at shifted positions, side by side"),
    "hrm_text": ("HRM-Text", "it has two stacks that call each other, and a recurrent-depth model has one core"),
}
# A file beside the weights -> name and reason; config.json has the base model's model_type, or none.
BY_FILE = {
    "tah_config.json": (
        "TaH",
        "a token that goes on is embedded anew from its logits, and reads the keys of all iterations before",
    ),
    "artifact_manifest.json": ("xLLM-loop", "its layers and injections are those of its own code, not transformers'"),
}


def refuse_unsupported(path: Path) -> None:
    """Raise UserError, with the reason, for a recurrent model in the directory `path` that cannot be imported."""
    check_entries(path)
    if not (path / "config.json").is_file():
        return
    found = BY_TYPE.get(str(read_json(path / "config.json").get("model_type")))
    for file, known in BY_FILE.items():
        if (path / file).is_file() and _is_its_own(file, read_json(path / file)):
            found = known
    if found:
        name, reason = found
        raise UserError(f"{path} is a recurrent model already ({name}), and cannot be imported: {reason}")


def _is_its_own(file: str, fields: dict[str, Any]) -> bool:
    """True where a file with these fields is what its name promises: other projects have manifests, too."""
    return file != "artifact_manifest.json" or str(fields.get("format", "")).startswith("xllm")

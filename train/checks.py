"""Checks of a run's settings that need no model weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopwise.carried import check_tokenizer_inside
from loopwise.directory import RECORD
from loopwise.errors import UserError, reason, unknown
from loopwise.foreign import SYSTEM
from loopwise.gguf_source import find_gguf
from loopwise.input_files import newer
from loopwise.unused import check_used

from .data import sources
from .output import check_out
from .recipe import Train
from .settings import Run
from .tasks import is_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check(run: Run) -> None:
    """Raises UserError for bad settings, for bad sources, and if the run may not write into OUT.

    The model is not read.
    """
    if gguf := find_gguf(Path(run.model)):
        raise UserError(
            f"{gguf}: a GGUF file cannot be trained; convert it to a checkpoint first: loopwise convert {gguf}"
        )
    check_used(run.recipe)
    check_tokenizer_inside(Path(run.model))
    check_out(run.model, run.out, run.resume, run.force)
    _check_sources(run.recipe, run.out)


def check_unchanged(run: Run) -> None:
    """Raises UserError if a local file of the text or of MODEL is newer than the finished model in OUT.

    The settings are compared elsewhere, and the text behind them is not read again.
    """
    data, model = run.recipe.data, Path(run.model)
    files = [model / "config.json", *model.glob("*.safetensors")]
    for source in _named(run.recipe):
        found = sources.files_of(source, data.split, data.subset)
        files += Path(source).expanduser().rglob("*") if found is None and not is_task(source) else found or []
    if found := newer((file for file in files if file.name not in SYSTEM), run.out / RECORD):
        raise UserError(
            f"{found} is newer than the finished run in {run.out}: train anew in another directory or with --force, or "
            "push that run as it is with --resume"
        )


def _named(recipe: Train) -> list[str]:
    """The sources of the text, held-out ones too."""
    data = recipe.data
    return [*(source for part in data.parts() for source in part), *(data.eval or [])]


def _check_sources(recipe: Train, out: Path) -> None:
    data, named = recipe.data, _named(recipe)
    for source in named:
        if not is_task(source) and Path(source).expanduser().resolve().is_relative_to(out.resolve()):
            raise UserError(f"the text {source} lies in OUT ({out}), which the run replaces; choose another directory")
    recipe.refuse_unused(sources.unused(named, data.split, data.subset, "data."))


def check_length(key: str, length: int, model: str, config: PretrainedConfig) -> None:
    """Raises UserError if `length`, the value of the recipe key `key`, exceeds the positions of `model`."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise UserError(f"{key}={length} is above the {limit} positions of {model} (max_position_embeddings)")


def check_vocabulary(model: str, config: PretrainedConfig, greatest: int) -> None:
    """Raises UserError if `greatest`, the greatest token id of the data, has no embedding in `model`."""
    if greatest >= config.vocab_size:
        raise UserError(f"{model}: its tokenizer gives id {greatest}, its embeddings end at {config.vocab_size - 1}")


def check_trackers(names: list[str]) -> None:
    """Raises UserError for a tracker of `report_to` that transformers does not know, or that is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in report_to", name, INTEGRATION_TO_CALLBACK)
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"report_to={name}: {reason(error)}") from None

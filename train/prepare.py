"""Work that is done once, before the processes of a run train: checks, tokenizing, and a new OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loopwise.directory import RUN_HEADER, begin, beside, place, remove
from loopwise.disk import naming
from loopwise.errors import UserError
from loopwise.quiet import quiet
from loopwise.recipe import as_yaml, load_recipe
from loopwise.version import __version__

from .checkpoint import RUN, check_same_run, last_sound
from .checks import check, check_trackers, check_vocabulary
from .data import blocks, stream
from .fitting import check_model
from .output import RECIPE, TOKENS, check_out, give_up, recover, remove_tokens
from .recipe import Data, Train
from .settings import Run

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def prepare(run: Run) -> bool:
    """Check everything that can be checked before training, make OUT, and write the packed tokens into it.

    Returns False if the run in OUT is already finished. Puts back what a killed run was to replace. Writes damaged
    checkpoints and progress to stderr. Raises UserError for bad input, with OUT as it was.
    """
    from . import commits
    from .pretrained import load_config

    quiet()
    out = run.out
    place(out, Path(run.model))
    recover(out)
    check(run)
    checkpoint, notes = last_sound(out, thorough=True) if run.resume else (None, [])
    for note in notes:
        print(note, file=sys.stderr)
    finished = run.resume and (out / "config.json").is_file()
    if last := out if finished and (out / RUN).is_file() else checkpoint:
        check_same_run(last, run.facts(), run.accept_changes, last == out)
    if finished:
        print(f"{out}: the run is already finished")
        return False
    recipe = commits.resolve(run.model, commits.kept(run.model, run.recipe, out / TOKENS) if checkpoint else run.recipe)
    config = load_config(run.model, recipe.revision)
    check_model(run.model, config, recipe)
    _check_processes(run.processes, recipe, config)
    check_trackers(run.recipe.report_to)
    if checkpoint and _has_tokens(out, run.recipe):
        return True  # with the text as it was when the run began
    with naming(out):
        _write_tokens(run, recipe, config, checkpoint)
    return True


def _check_processes(processes: int, recipe: Train, config: PretrainedConfig) -> None:
    """Raises UserError for an objective that several processes cannot compute: two calls use other routers each."""
    router = getattr(config, "router", None)
    if processes > 1 and recipe.objectives.progressive and router and router["kind"] == "expert":
        raise UserError(
            f"objectives.progressive: {processes} processes cannot train the routers of this model with it, as its two "
            "calls run different ones; use one process, or leave it out"
        )


def _has_tokens(out: Path, recipe: Train) -> bool:
    """True if OUT has tokens of the text, and for the teacher, that `recipe` names. Its own recipe is that of them."""
    if not blocks.complete(out / TOKENS):
        return False
    try:
        kept = load_recipe(Train, "train", str(out / RECIPE), [])
    except UserError:  # of an earlier release, whose keys are refused today
        return False
    same = (kept.data, kept.objectives.distillation) == (recipe.data, recipe.objectives.distillation)
    return same and kept.data.names() == recipe.data.names()  # blocks are stored in this order


def _write_tokens(run: Run, recipe: Train, config: PretrainedConfig, checkpoint: Path | None) -> None:
    """Make OUT with the recipe and the packed tokens; an earlier OUT moves aside.

    recipe: that of `run`, with commits as revisions. Raises UserError, with OUT as it was.
    """
    from . import commits
    from .pretrained import load_tokenizer

    out = run.out
    partial = beside(out, "partial")
    try:
        begin(partial)
        tokenizer = load_tokenizer(run.model, recipe.revision)
        built = _tokenise(recipe.data, tokenizer, partial / TOKENS)
        commits.keep(run.model, run.recipe, recipe, partial / TOKENS)
        check_vocabulary(run.model, config, built.greatest)
        if checkpoint:
            check_same_run(checkpoint, run.facts(built.digest), run.accept_changes)
        header = f"{RUN_HEADER}{__version__}: loopwise train {run.model} {out}\n"
        (partial / RECIPE).write_text(header + as_yaml(run.recipe), encoding="utf-8")
        _begin(run, partial)
    finally:
        remove(partial, made=True)


def _begin(run: Run, partial: Path) -> None:
    """Move recipe and tokens from `partial` into OUT, which is made. Raises OSError, with OUT as it was, and UserError
    where OUT may no longer be written: others may have put files there while the text was tokenized."""
    out = run.out
    check_out(run.model, out, run.resume, run.force)
    try:
        if run.force and out.is_dir():
            out.rename(beside(out, "old"))  # kept until the new run has a checkpoint
        out.mkdir(parents=True, exist_ok=True)
        remove_tokens(out)
        for name in (RECIPE, TOKENS):  # the record first: a directory without it is not recognised as ours
            (partial / name).replace(out / name)
    except OSError:
        give_up(out)
        raise


def _tokenise(data: Data, tokenizer: PreTrainedTokenizerBase, directory: Path) -> blocks.Blocks:
    def report(documents: int, tokens: int) -> None:
        print(f"\rtokenize: {documents:,} documents, {tokens:,} tokens", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    streamed = stream.first_blocks(data, tokenizer)
    built = blocks.build(data, tokenizer, directory, report if terminal else None, streamed)
    if terminal:
        print(file=sys.stderr)
    return built

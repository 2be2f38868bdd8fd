"""A training run: what is done once before any process starts, and what every process does."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loopwise.carried import check_tokenizer_inside
from loopwise.directory import RUN_HEADER, begin, beside, place, remove
from loopwise.errors import UserError, reason, unknown
from loopwise.gguf_source import find_gguf
from loopwise.quiet import quiet
from loopwise.unused import check_used
from loopwise.version import __version__

from . import data, fitting, sources, stream
from .checkpoint import DIGEST, RUN, check_same_run, last_sound, prune, sync, written
from .curriculum import Curriculum, curriculum_of
from .output import RECIPE, TOKENS, check_out, discarded_unless_begun, recover
from .recipe import Recurrence, Train
from .tasks import is_task

if TYPE_CHECKING:
    from .trainer import RecurrentTrainer


def train(
    model: str,
    out: str | Path,
    recipe: Train,
    resume: bool = False,
    force: bool = False,
    accept_changes: bool = False,
) -> None:
    """Train `model` (a directory or hub id) into the directory `out`, in this process.

    Raises UserError for bad input, with nothing written, and for a loss that is not finite.
    """
    out = Path(out)
    if prepare(model, out, recipe, resume, force, accept_changes=accept_changes):
        with discarded_unless_begun(out):
            work(model, out, recipe, resume)


def prepare(
    model: str,
    out: Path,
    recipe: Train,
    resume: bool = False,
    force: bool = False,
    processes: int = 1,
    layout: str = "whole",
    accept_changes: bool = False,
) -> bool:
    """Check what can be checked before training, make `out`, and leave the packed tokens in it.

    Returns False where the run in `out` is already finished. Raises UserError, with `out` as it was, for bad input.
    """
    from .pretrained import load_config, load_tokenizer

    quiet()
    place(out, Path(model))
    recover(out)
    check(model, out, recipe, resume, force)
    checkpoint, notes = last_sound(out, thorough=True) if resume else (None, [])
    for note in notes:
        print(note, file=sys.stderr)
    finished = resume and (out / "config.json").is_file()
    if last := out if finished and (out / RUN).is_file() else checkpoint:
        check_same_run(last, describe(model, recipe, processes, layout), accept_changes)
    if finished:
        print(f"{out}: the run is already finished")
        return False
    config = load_config(model, recipe.revision)
    check_model(model, config, recipe)
    _check_trackers(recipe.report_to)
    if checkpoint and (out / TOKENS / data.FACTS).is_file():
        return True  # the text as it was when the run began
    partial = beside(out, "partial")
    begin(partial)
    try:
        blocks = _tokenise(recipe, load_tokenizer(model, recipe.revision), partial / TOKENS)
        check_vocabulary(model, config, blocks.greatest)
        if checkpoint:
            check_same_run(checkpoint, describe(model, recipe, processes, layout, blocks.digest), accept_changes)
        header = f"{RUN_HEADER}{__version__}: loopwise train {model} {out}\n"
        text = header + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        (partial / RECIPE).write_text(text, encoding="utf-8")
        if force and out.is_dir():
            out.rename(beside(out, "old"))  # kept until the new run has something to keep
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / TOKENS, ignore_errors=True)
        for name in (RECIPE, TOKENS):  # the record first: what has none is not ours
            (partial / name).replace(out / name)
    finally:
        remove(partial)
    return True


def check(model: str, out: Path, recipe: Train, resume: bool, force: bool) -> None:
    """Raises UserError for what can be told without reading the model: for settings, for sources, and for `out`."""
    if gguf := find_gguf(Path(model)):
        raise UserError(
            f"{gguf}: a GGUF file cannot be trained as it is; make a checkpoint of it first: loopwise convert {gguf}"
        )
    check_used(recipe)
    check_tokenizer_inside(Path(model))
    check_out(model, out, resume, force)
    _check_sources(recipe, out)


def work(model: str, out: Path, recipe: Train, resume: bool = False, callbacks: Sequence[Any] = ()) -> None:
    """Train in a prepared `out`: every process of a run calls this. The first one leaves the final model in `out`."""
    from . import adapters, launch, optimisers, separation
    from .pretrained import load_config, load_model, load_tokenizer, overflow
    from .trainer import RecurrentTrainer, arguments, prepare_model

    quiet()
    blocks = data.load(out / TOKENS)
    checkpoint = last_sound(out)[0] if resume else None
    loaded = load_model(str(checkpoint)) if checkpoint else load_model(model, recipe.revision)
    source_config = load_config(model, recipe.revision)
    dtype = recipe.dtype or _stored_dtype(source_config)
    if told := overflow(loaded.state_dict(), dtype):
        raise UserError(f"dtype={dtype}: {told}; choose dtype=bfloat16 or float32")
    if recipe.data.separate_documents:
        separation.check(loaded, model)
    if recipe.adapters:
        adapters.inject(loaded, recipe.adapters, checkpoint)
    prepare_model(loaded, recipe)
    optimisers.freeze(loaded, recipe.optimiser, recipe.objectives, recipe.adapters is not None)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    samples_per_step = recipe.batch_size * recipe.gradient_accumulation * processes
    steps = recipe.steps or math.ceil((recipe.epochs or 1.0) * len(blocks.train) / samples_per_step)
    course = curriculum(source_config, recipe, steps)
    tokenizer = load_tokenizer(str(checkpoint or model), None if checkpoint else recipe.revision)
    # Two steps are more than is read ahead of the step that a checkpoint is written after.
    streams = stream.open_all(recipe.data, tokenizer, recipe.seed, checkpoint, behind=2 * samples_per_step)
    trainer = RecurrentTrainer(
        loaded,
        tokenizer,
        arguments(recipe, steps, out, routed=bool(getattr(source_config, "router", None))),
        recipe,
        blocks,
        streams,
        course,
        {
            **describe(model, recipe, processes, launch.layout(), blocks.digest),
            "mean recurrences": course.mean.end if course else None,
        },
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.args.should_save:
        prune(out, recipe.keep_checkpoints)
        rehearse(trainer, model, out, dtype)
        print(_opening(trainer, checkpoint), flush=True)
    with stopped_by_sigterm(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.args.max_steps:
        if trainer.args.should_save:
            last = f"checkpoint-{trainer.state.global_step}"
            print(f"stopped by SIGTERM: {last} is written, --resume goes on from it", flush=True)
        return
    if recipe.data.held_out:
        trainer.evaluate()
    state = trainer.full_state()
    if recipe.adapters:
        state = adapters.merged(state, recipe.adapters, adapters.transposed(trainer.trained))
    if told := trainer.told_all(overflow(state, dtype)):
        trainer.keep()
        raise UserError(
            f"dtype={dtype}: after training, {told}; checkpoint-{trainer.state.global_step} is written: --resume with "
            "dtype=bfloat16 or float32 writes the model of it"
        )
    if trainer.args.should_save:
        publish(trainer, state, model, out, dtype)
        shutil.rmtree(out / TOKENS)
        print(f"model written to {out}", flush=True)


@contextmanager
def stopped_by_sigterm(trainer: RecurrentTrainer) -> Iterator[None]:
    """Within it SIGTERM, with which clusters take machines back, ends training after a checkpoint of the next step."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def publish(trainer: RecurrentTrainer, state: dict[str, Any], model: str, out: Path, dtype: str) -> None:
    """Write the trained model, with the weights `state`, into `out`, config.json last: no half of it is loadable."""
    from .pretrained import cast

    partial = out / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if trainer.curriculum:
        trainer.trained.config.trained_recurrences = trainer.curriculum.trained()
    with written(partial, "the trained model"):
        _write(trainer, cast(state, dtype), model, partial, dtype)
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        sync(path)
        path.replace(out / path.name)
    partial.rmdir()


def _write(trainer: RecurrentTrainer, state: dict[str, Any], model: str, directory: Path, dtype: str) -> None:
    from .card import write_card
    from .pretrained import write_model

    write_model(trainer.trained, trainer.tokenizer, directory, state, dtype)
    write_card(directory, model, trainer.recipe, trainer)
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    (directory / RUN).write_text(json.dumps({"run": trainer.run}, indent=1), encoding="utf-8")


def rehearse(trainer: RecurrentTrainer, model: str, out: Path, dtype: str) -> None:
    """Write all that `publish` will, but of the weights the smallest tensor, and remove it again.

    Raises UserError for what could not be written at the end, when the whole run would be lost by it: also where the
    disk has no room for the weights.
    """
    import torch

    from . import adapters
    from .pretrained import parameters, smallest

    partial = out / ".rehearsal.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with written(partial, "the trained model"):
        base, _ = adapters.split(trainer.trained.state_dict())
        _write(trainer, smallest(base, dtype), model, partial, dtype)
    shutil.rmtree(partial, ignore_errors=True)
    needed = parameters(trainer.trained) * getattr(torch, dtype).itemsize
    if (free := shutil.disk_usage(out).free) < needed:
        raise UserError(
            f"{out}: the trained model will take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there; "
            "make room first"
        )


def check_model(model: str, config: Any, recipe: Train) -> Curriculum | None:
    """The curriculum. Raises UserError where `recipe` asks for what `model`, with its `config`, does not have."""
    from .pretrained import is_recurrent

    chosen = curriculum(config, recipe, steps=recipe.steps or 1)
    _check_objectives(config, recipe)
    fitting.check(recipe, config, is_recurrent(config))
    check_length("data.sequence_length", recipe.data.sequence_length, model, config)
    return chosen


def curriculum(config: Any, recipe: Train, steps: int) -> Curriculum | None:
    """The curriculum of `recipe` for a model with `config`; None for a model without recurrence.

    Raises UserError where the two do not go together.
    """
    from .pretrained import is_recurrent

    if not is_recurrent(config):
        if recipe.recurrence is not None:
            raise UserError(
                f"recurrence.* belongs to recurrent-depth models, and this is a plain {config.model_type}: "
                "leave these keys out, or convert it first (loopwise convert)"
            )
        return None
    keys = recipe.recurrence or Recurrence()
    chosen = curriculum_of(keys, keys.mean or config.num_recurrences, steps, recipe.seed)
    if router := getattr(config, "router", None):
        _check_routed(router, chosen)
    if config.injection == "none" and chosen.truncates:
        # With injection e enters every recurrence; without, only s_0, before the recurrences without gradient.
        assert chosen.backprop is not None
        raise UserError(
            f"recurrence.backprop={chosen.backprop.end}: with injection='none', steps of up to {chosen.cap} "
            "recurrences would leave the embeddings and the prelude of this model without gradient; drop "
            "recurrence.backprop, or convert with injection=linear"
        )
    return chosen


def _check_routed(router: dict[str, Any], chosen: Curriculum) -> None:
    kind, depths = router["kind"], router["depths"]
    constant = chosen.sampler == "fixed" and chosen.mean.kind == "constant"
    if chosen.cap > depths or (kind == "token" and not (constant and chosen.mean.end == depths)):
        rule = "runs exactly" if kind == "token" else "has at most"
        raise UserError(
            f"recurrence: a step of this curriculum has up to {chosen.cap} recurrences; this model's {kind}-choice "
            f"router {rule} {depths}"
        )


def describe(
    model: str, recipe: Train, processes: int, layout: str = "whole", digest: str | None = None
) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as it began. Ranks and accumulation count by their product.

    layout: who reads and writes the optimiser's state. DeepSpeed's is split for one number of ranks.
    """
    keys = recipe.model_dump(mode="json")
    keys["gradient_accumulation x processes"] = keys.pop("gradient_accumulation") * processes
    keys["checkpoint layout"] = f"{layout} on {processes} processes" if layout.startswith("zero") else layout
    run = {"MODEL": str(Path(model).resolve()) if Path(model).is_dir() else model, "recipe": keys}
    return run if digest is None else {**run, DIGEST: digest}


def _check_sources(recipe: Train, out: Path) -> None:
    given = recipe.data
    named = [*(source for part in given.parts() for source in part), *(given.eval or [])]
    for source in named:
        if not is_task(source) and Path(source).expanduser().resolve().is_relative_to(out.resolve()):
            raise UserError(f"the text {source} lies in OUT ({out}), which the run replaces; choose another directory")
    recipe.refuse_unused(sources.unused(named, given.split, given.subset, "data."))


def check_length(key: str, length: int, model: str, config: Any) -> None:
    """Raises UserError where blocks of `length` tokens are longer than the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise UserError(f"{key}={length} is above the {limit} positions of {model} (max_position_embeddings)")


def check_vocabulary(model: str, config: Any, greatest: int) -> None:
    """Raises UserError where tokenizer and model do not belong together."""
    if greatest >= config.vocab_size:
        raise UserError(f"{model}: its tokenizer gives id {greatest}, its embeddings end at {config.vocab_size - 1}")


def _check_objectives(config: Any, recipe: Train) -> None:
    from . import objectives, teacher
    from .pretrained import is_recurrent

    objectives.check(recipe.objectives, config, is_recurrent(config))
    if recipe.objectives.distillation:
        teacher.check(recipe.objectives.distillation, config)
    router = getattr(config, "router", None)
    if recipe.recurrence and recipe.recurrence.capacity_warmup and not (router and router["kind"] == "expert"):
        raise UserError("recurrence.capacity_warmup: this model has no expert-choice router")


def _check_trackers(names: list[str]) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in report_to", name, INTEGRATION_TO_CALLBACK)
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"report_to={name}: {reason(error)}") from None


def _tokenise(recipe: Train, tokenizer: Any, directory: Path) -> data.Blocks:
    def report(documents: int, tokens: int) -> None:
        print(f"\rtokenise: {documents:,} documents, {tokens:,} tokens", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    streamed = stream.first_blocks(recipe.data, tokenizer)
    blocks = data.build(recipe.data, tokenizer, directory, report if terminal else None, streamed)
    if terminal:
        print(file=sys.stderr)
    return blocks


def _opening(trainer: RecurrentTrainer, checkpoint: Path | None) -> str:
    blocks = trainer.blocks
    held_out = f", {blocks.held_out.tokens.size:,} held out" if blocks.held_out is not None else ""
    start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
    read = f"{blocks.train.tokens.size:,} tokens" if len(blocks.train) else "no text read before"
    more = f" and {len(trainer.streams)} streamed" if trainer.streams else ""
    return f"train {trainer.args.max_steps} steps {start}: {read}{more}{held_out}"


def _stored_dtype(config: Any) -> str:
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")

"""A real model that learns chains and text, made in calls of some minutes each: on a GPU, or in a tiny form on a CPU.

    python -m bench.gained make SOURCE OUT [--seconds 500] [--steps N | --fit SECONDS] [--core] [--set key=value]
    python -m bench.gained make OUT --tiny
    python -m bench.gained join CONVERTED PARTS MODEL

`make` converts SOURCE (a GGUF file or a model directory, as SmolLM2-135M), trains it by the recipe `hops-code`, and
measures chains by hops and R, and held-out text at R = 1 to 8. Every step is a `loopwise` command that runs in OUT.
After `--seconds` a training run saves a checkpoint, and the exit code is 0. The same call then goes on: on a CPU, to
the same bits. On a GPU the first call times five steps, and prints how many fit. In the end OUT has:

    gained/   the files that `python -m bench.results report --real OUT/gained` takes
    parts/    what training changed, in small files; with the converted model, `join` makes the trained one of them
    jobs/     the log of every command, and its time

PYTHONPATH set to the repository is enough, without an installation; `datasets` and vLLM are not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .results.commands import Commands, Failed, Paused, alone, read, write
from .results.gained import NEEDED, OPTIONAL

# Import names of what the commands need, and the names by which pip knows some of them.
PACKAGES = ["torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "tqdm", "pydantic", "yaml"]
PACKAGES += ["argcomplete"]
PIP = {"yaml": "pyyaml"}
HOPS, DEPTHS, TEXT_DEPTHS = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8, 12, 16), range(1, 9)
TASK = "task:hops?style=code&hops={}&lookups=0&questions=1&statements=16&records={}"
PIECE = 2000  # characters of a training text; a window of 400 is then read at once
MODEL_FILES = ["converted", "model", "source.json", "text.json", "chains.json"]  # made in this order
# In place of SmolLM2 and its run: a random model of 4 layers, some steps.
TINY = ["data.sequence_length=128", "data.window=20", "batch_size=2", "precision=float32"]
TINY_STEPS = 5


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gained", description="A real model learns chains and text.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="convert, train, measure; call it again until it is finished")
    make.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="SOURCE (none with --tiny), then OUT")
    make.add_argument("--seconds", type=float, help="time of this call; to save, or to end another command, is extra")
    length = make.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps of the run (default: the recipe's)")
    length.add_argument("--fit", type=float, metavar="SECONDS", help="as many steps as take this long in all; on a GPU")
    make.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting of loopwise train")
    make.add_argument("--sizes", default="14,1,15", help="layers of prelude, core and coda")
    make.add_argument("--injection", default="linear", choices=["linear", "decayed"])
    make.add_argument("--core", action="store_true", help="train core and injection alone: 30 MB in bfloat16")
    make.add_argument("--plain", action="store_true", help="train the source, too, for as many FLOPs, and measure it")
    make.add_argument("--batch", type=int, help="blocks of a step (default: 64 on a GPU, else 4)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--text", type=Path, help="a .jsonl of texts to learn, or a folder; default Python's own library")
    make.add_argument("--held-out", type=Path, help="a .jsonl of texts to measure, if --text is one")
    make.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the tensors in parts/")
    make.add_argument("--mib", type=int, default=60, help="most MiB of a file in parts/")
    make.add_argument("--tiny", action="store_true", help="a random model and few steps: does it run at all?")
    join = verbs.add_parser("join", help="put the trained tensors back into the converted model")
    join.add_argument("converted", type=Path, help="the converted model, made anew by the first line of commands.sh")
    join.add_argument("parts", type=Path, help="OUT/parts")
    join.add_argument("model", type=Path, help="directory to write")
    args = parser.parse_args(argv)
    if args.verb == "make":
        _settle(parser, args)
    return args


def _settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set what depends on other arguments. Ends the program where these contradict each other."""
    if len(args.paths) != (1 if args.tiny else 2):
        parser.error("give OUT alone with --tiny" if args.tiny else "give SOURCE and OUT")
    args.source, args.out = None if args.tiny else args.paths[0], args.paths[-1]
    if bool(args.held_out) != bool(args.text and args.text.suffix == ".jsonl"):
        parser.error("--text FILE.jsonl and --held-out FILE.jsonl go together")
    if args.tiny:
        args.sizes, args.steps, args.dtype = "1,1,2", args.steps or TINY_STEPS, "float32"


def check_packages(source: Path | None) -> None:
    """Raises Failed, with what to do, where a package that the commands need is absent. `datasets` is none of them."""
    needed = [*PACKAGES, *(["gguf"] if source and source.suffix == ".gguf" else [])]
    if absent := [PIP.get(name, name) for name in needed if find_spec(name) is None]:
        other = "; or give a model directory in place of the GGUF file" if absent == ["gguf"] else ""
        names = " ".join(absent)
        raise Failed(
            f"this Python lacks {names}: where there is a network, run `pip install --target site {names}` with the "
            f"same version of Python, carry the folder site here, and add it to PYTHONPATH{other}"
        )


def check_files(*files: Path | None) -> None:
    """Raises Failed for the first of `files` that does not exist."""
    if missing := [file for file in files if file and not file.exists()]:
        raise Failed(f"{missing[0]}: no such file or directory")


def make(args: argparse.Namespace) -> None:
    """Run what is not finished, until the time is over. Raises Paused then, and Failed where a command fails."""
    import torch

    gpu = torch.accelerator.is_available()
    at = Commands(args.out, workers=1, threads=1 if args.tiny else os.cpu_count() or 1, seconds=args.seconds)
    texts(args)
    source = source_in(at, args.source)
    sizes = [f"sizes={args.sizes}", f"injection={args.injection}", "num_recurrences=8", "dtype=float32"]
    at.run("converted", "convert", source, "converted", *sizes)
    settings = training(args, gpu)
    steps = planned(at, args, settings, gpu)
    at.run("model", "train", "converted", "model", *overridden([*settings, *length(steps), *watched(steps)], args.set))
    measure(at, source, args.tiny)
    if args.plain:
        plain(at, args, source, gpu)
    finish(at, args, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)


def texts(args: argparse.Namespace) -> None:
    """Write text.jsonl and held_out.jsonl into OUT, unless they are there."""
    from .results.text import check_same, prepare

    learned, held = args.text, args.held_out
    made = args.out / "texts.json"
    named = {name: file and str(file.resolve()) for name, file in (("text", learned), ("held_out", held))}
    if (args.out / "text.jsonl").is_file():
        check_same(made, named)
        return
    if held is None:
        prepare(args.out / "text", args.text, 200_000 if args.tiny else 12_000_000)
        learned, held = (args.out / "text" / f"{name}.jsonl" for name in ("train", "held_out"))
    shutil.copy(held, args.out / "held_out.jsonl")
    pieces = [piece for text in _texts_of(learned) for piece in cut_at_lines(text)]
    random.Random(0).shuffle(pieces)
    partial = args.out / "text.partial"
    partial.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    write(made, named)
    partial.replace(args.out / "text.jsonl")


def _texts_of(file: Path) -> Iterator[str]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise Failed(f"{file}:{number}: no record with a field 'text'") from None


def cut_at_lines(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE` characters, which end where a line ends."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def source_in(at: Commands, source: Path | None) -> str:
    """The name of the source in OUT, so that commands can name it: a link, or for None a random model."""
    if source is None:
        at.run("source", "init", "text/tokenizer", "source", "num_hidden_layers=4", "hidden_size=64")
        return "source"
    return at.linked(source)


def training(args: argparse.Namespace, gpu: bool) -> list[str]:
    """The arguments of `loopwise train`, but for steps and measurements."""
    settings = ["--recipe=hops-code", f"seed={args.seed}"]
    if args.tiny:
        settings += TINY
    else:
        settings += [f"batch_size={args.batch or (64 if gpu else 4)}"]
    if gpu and not args.tiny and (shutil.which("cc") or shutil.which("gcc")):  # Triton builds its launcher with it
        settings += ["compile=layer"]
    if args.core:
        settings += ["optimiser.train=core,injection", "optimiser.multipliers=null"]
    return overridden(settings, args.set)


def overridden(settings: Iterable[str], by: Iterable[str]) -> list[str]:
    """`settings`, where those that `by` has as well have its values; then the others of `by`."""
    last = {word.partition("=")[0]: word for word in [*settings, *by]}
    return list(last.values())


def length(steps: int) -> list[str]:
    """Steps, log lines and checkpoints of a run."""
    often = [f"log_every={max(1, steps // 100)}", f"save_every={max(1, steps // 10)}"]
    return [f"steps={steps}", *often, "keep_checkpoints=1"]


def watched(steps: int) -> list[str]:
    """Right answers by hops and R during training."""
    data = TASK.format("1..8", 80 if steps > 100 else 8)
    often = f"eval_every={max(1, steps // 10)}"
    return [f"data.eval={data}", "data.group=hops", often, "recurrence.eval_at=1,2,4,8"]


def planned(at: Commands, args: argparse.Namespace, settings: list[str], gpu: bool) -> int:
    """The steps of the run. On a GPU, five steps are timed first, and the number that fits is printed."""
    from loopwise.recipe import load_recipe
    from loopwise.train.recipe import Train

    from .results.costs import steps_worth

    steps: int = args.steps or load_recipe(Train, "train", "hops-code", []).steps or 1
    if not (gpu or args.tiny):
        if args.fit:
            raise Failed("--fit: speed is measured on a GPU alone; give --steps")
        return steps
    timing = at.run("timing", "train", "converted", "timing", *overridden(settings, ["steps=10", "log_every=5"]))
    (timing / "model.safetensors").unlink(missing_ok=True)
    laps = [row for row in read(timing / "trainer_state.json")["log_history"] if "flops_per_second" in row]
    rate = laps[-1]["flops_per_second"]
    seconds = args.fit or args.seconds or 600
    fit = steps_worth(at.out / "converted", settings, rate * seconds)
    steps = fit if args.fit else steps
    print(f"timed: 5 steps at {rate / 1e12:.3g} TFLOP/s; {fit:,} steps fit in {seconds:g} s, the run has {steps:,}")
    return steps


def plain(at: Commands, args: argparse.Namespace, source: str, gpu: bool) -> None:
    """Train the source in one loop for the FLOPs of the run, on the same phases, and measure its loss on text.

    In one loop, as a GGUF file is nothing to train. Its layers learn as those beside the core do.
    """
    from .results.chains import phases
    from .results.costs import spent, steps_worth

    at.run("plain-start", "convert", source, "plain-start", "method=recursive", "loops=1", "dtype=float32")
    own = [phases(lambda source: source, of="hops-code", recurrence=False), "recurrence=null"]
    own += ["optimiser.train=null", "optimiser.multipliers={embeddings: 0.1, core: 0.3}"]
    settings = overridden(training(args, gpu), own)
    steps = steps_worth(at.out / "plain-start", settings, spent(at.out / "model"))
    at.run("plain", "train", "plain-start", "plain", *overridden(settings, length(steps)))
    at.run("plain.json", "eval", "plain", *held_out(args.tiny), "--out", "plain.json")


def held_out(tiny: bool) -> list[str]:
    return ["data=held_out.jsonl", f"sequence_length={128 if tiny else 512}", f"limit={2 if tiny else 64}"]


def measure(at: Commands, source: str, tiny: bool) -> None:
    held = held_out(tiny)
    at.run("source.json", "eval", source, *held, "--out", "source.json")
    depths = ",".join(map(str, TEXT_DEPTHS))
    at.run("text.json", "eval", "model", *held, f"num_recurrences={depths}", "--out", "text.json")
    data = "data=" + TASK.format("+".join(map(str, HOPS)), len(HOPS) * (2 if tiny else 100))
    depths = ",".join(map(str, DEPTHS))
    at.run("chains.json", "eval", "model", data, "group=hops", f"num_recurrences={depths}", "--out", "chains.json")


def finish(at: Commands, args: argparse.Namespace, dtype: Any) -> None:
    """Write gained/ and parts/."""
    from . import parts

    folder = at.out / "gained"
    folder.mkdir(exist_ok=True)
    results, made = [*NEEDED], [*MODEL_FILES]
    if args.plain:
        results, made = [*results, *OPTIONAL], [*made, "plain-start", "plain", *OPTIONAL]
    for name in results:
        if name != "commands.sh":
            shutil.copy2(at.out / "model" / name if name == "run.json" else at.out / name, folder / name)
    lines = "".join(at.line(one) + "\n" for one in made)
    (folder / "commands.sh").write_text(lines, encoding="utf-8")
    if not (at.out / "parts" / parts.RECORD).is_file():
        parts.cut(at.out / "converted", at.out / "model", at.out / "parts", dtype, args.mib)
    sizes = [file.stat().st_size for file in sorted((at.out / "parts").glob("part-*"))]
    print(f"finished: {folder}; {at.out / 'parts'} has {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.verb == "join":
            from .parts import join

            join(args.converted, args.parts, args.model)
            print(f"written: {args.model}")
            return 0
        check_packages(args.source)
        check_files(args.source, args.text, args.held_out)
        with alone(args.out):
            make(args)
    except Paused as pause:
        print(f"paused after {args.seconds:g} s: {pause}; the same call goes on")
    except Exception as error:
        # The class of Loopwise's own errors cannot be imported where packages are absent.
        if not isinstance(error, Failed) and type(error).__name__ != "UserError":
            raise
        print(f"gained: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m loopwise.demo [--model MODEL] [--text PATH] [--out DIR]`: all parts of the demo."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

from ..arguments import Parser
from ..cli import guarded
from ..directory import claimed, foreign_in, place, removable, remove
from ..errors import UserError
from ..foreign import entries, remove_system_files

OURS = ".loopwise-demo"  # marks a directory that the demo may replace
# Output of a demo: models, which have Loopwise's record, and files.
MODELS = {"converted", "retrained", "chains-empty", "chains-base", "chains-converted", "chains-trained"}
FILES = {"source.json", "converted.json", "retrained.json", "chains.json", "served.json", "served-by-rule.json"}
FILES |= {"accuracy.png", "depth.png", "serve-chat.log", "serve-chains.log", OURS}


def main(argv: list[str]) -> int:
    """Run the demo. Returns the exit code; raises UserError for bad input."""
    about = "Convert, retrain and serve a pretrained model; train and serve a small one that gains by depth."
    parser = Parser(prog="loopwise.demo", description=about)
    parser.add_argument(
        "--model", metavar="MODEL", help="a directory, .gguf file or hub id; default SmolLM2-135M-Instruct, downloaded"
    )
    parser.add_argument(
        "--text", metavar="PATH", help="text to retrain it on, like data.train; default the installed packages' readmes"
    )
    parser.add_argument("--out", metavar="DIR", default="demo-run", help="output directory (default demo-run)")
    args = parser.parse_args(argv)
    stop_by_signals()
    with claimed(Path(args.out)):
        demo(Path(args.out), args.model, args.text)
    return 0


def stop_by_signals() -> None:
    """Make SIGTERM and SIGHUP end the steps like Ctrl-C, except for a signal that nohup ignores."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def check_out(out: Path, *read: str | None) -> Path:
    """The resolved path of `out`.

    Raises UserError if `out`, or a model in it, holds files that are not from a demo, and if one of the inputs `read`
    lies in it.
    """
    found = place(out)
    if entries(found) and not (found / OURS).is_file():
        raise UserError(f"{out} exists and is not a demo's; choose another directory with --out")
    for given in filter(None, read):
        if Path(given).expanduser().resolve().is_relative_to(found):
            raise UserError(f"{given} lies in {out}, which the demo replaces; choose another directory with --out")
    for path in entries(found):
        # Left by a demo that was killed.
        name = re.sub(r"^\.(.+)\.((partial|old)-[0-9]+(-[0-9a-f]{12})?|lock)$", r"\1", path.name)
        theirs = "" if (removable(path) if path.is_dir() else path.is_file()) and name in MODELS | FILES else path.name
        if not theirs and path.is_dir() and (inside := foreign_in(path)):
            theirs = f"{path.name}/{inside}"
        if theirs:
            raise UserError(f"{out} holds {theirs}, which no demo left: move it, or choose another with --out")
    return found


def prepare(out: Path) -> None:
    """Make `out`, which `check_out` has returned, an empty directory of the demo. Raises UserError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / OURS).touch()
        remove_system_files(out)
        for path in out.iterdir():
            if path.is_dir():
                remove(path)
            elif path.name != OURS:
                path.unlink()
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None


def demo(out: Path, model: str | None, text: str | None) -> None:
    """Run all parts in order and print the time of each. Raises UserError if a step fails."""
    from . import chains, pretrained, serving

    pretrained.check(model, text)
    prepare(check_out(out, model, text))
    start = last = time.monotonic()
    times = []

    def record_time(name: str) -> None:
        nonlocal last
        now = time.monotonic()
        times.append(f"{name} {now - last:.0f} s")
        last = now

    print(f"== (a) {model or 'SmolLM2-135M-Instruct'}: made recurrent, and its quality kept", flush=True)
    retrained = pretrained.part(out, model, text)
    record_time("(a)")
    print("\n== (b) Chains of assignments: what depth buys", flush=True)
    trained, accuracy = chains.part(out)
    record_time("(b)")
    print("\n== (c) Both models served with vLLM", flush=True)
    depths = serving.part(out, retrained, trained)
    record_time("(c)")
    print(
        "\nThe pretrained model shows that conversion keeps quality, and that a few training steps keep it at more "
        "recurrences.\nThe small model shows that depth pays. No model here shows both.\n\n"
        f"accuracy by hops and R  {accuracy}\ndepth by hops           {depths}\nmodels                  "
        f"{retrained}, {trained}: loopwise serve serves either\n"
        f"time                    {', '.join(times)}; {time.monotonic() - start:.0f} s in all"
    )


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))

"""The whole search: a scan of blocks, or chains by tree search, and the comparison of the best program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ...directory import check_new
from ...errors import UserError, missing
from ...gguf_source import unpacked
from ...quiet import quiet
from ...version import __version__
from ..result import standard_error
from .recipe import Search
from .record import Record, check_out


def run(
    model: str,
    recipe: Search,
    out: Path | None = None,
    save_as: Path | None = None,
    force: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Search for the best program of `model`, a plain model, by `recipe`.

    out: a .json file that gets the result, and whose measured programs are not measured again.   save_as: directory for
    the best program as a checkpoint.   force: start anew, and replace a `save_as` that Loopwise wrote.
    trust: run the code that task files name.
    Returns {"loopwise", "model", "settings", "layers", "metric", "higher" (True if more is better), "source",
    "programs" (rows of a scan), "tried" (chains for all questions), "questions" (chains for each), "each" (their
    summary), "best", "check", "seconds", "layers_run"}. A value has "value" and "value_error", a program "layers",
    "parts" and "text".
    Raises UserError for bad input.
    """
    quiet()
    if out:
        check_out(out)
    if save_as:
        check_new(save_as, Path(model), force)
    with ExitStack() as stack:
        path = str(stack.enter_context(unpacked(Path(model))))
        searching = Searching(model, path, recipe, out, force, trust)
        result = searching.run()
        if save_as:
            from .save import save

            save(model, save_as, searching.best, recipe.revision, force)
        return result


class Searching:
    """One search. path: directory of `model`, or its hub id. Raises UserError for bad input."""

    def __init__(self, model: str, path: str, recipe: Search, out: Path | None, force: bool, trust: bool = False):
        from ...train.pretrained import is_recurrent, load_config, load_tokenizer
        from ..harness.record import model_fingerprint
        from ..loss import load_weights
        from .model import ProgramModel

        self.recipe, self.path, self.trust = recipe, path, trust
        self.config = load_config(path, recipe.revision)
        if is_recurrent(self.config):
            raise UserError(f"{model}: a recurrent-depth model; loopwise search starts from a plain one")
        self.layers: int = self.config.num_hidden_layers
        self.tokenizer = load_tokenizer(path, recipe.revision)
        settings = {"model": model, **recipe.model_dump(mode="json", exclude={"check"})}
        facts = {"loopwise": __version__, "model": model, "settings": settings}
        self.record = Record(out, {**facts, "fingerprint": model_fingerprint(path, recipe.revision)})
        if not force:
            self.record.resume()
        self.model = ProgramModel(load_weights(path, recipe.revision)).eval()
        self.bench = self._bench(recipe.data or None)
        self.record.take_data(self.bench.fingerprint())
        self.checks = {source: self._other(source) for source in recipe.check}
        self._check_sizes()
        self.best = self.source

    @property
    def source(self) -> Any:
        """The program that is the source."""
        from .program import Program

        return Program.chain(tuple(range(self.layers)))

    def _bench(self, sources: list[str] | None) -> Any:
        """The bench of data `sources`, or of the tasks (None)."""
        from .bench import TaskBench, TextBench

        asked = self.recipe.asked(sources)
        if sources is None:
            try:
                import lm_eval  # noqa: F401
            except ImportError:
                raise missing("tasks", "lm-eval", "eval") from None
            return TaskBench(self.model, asked, self.tokenizer, self.trust)
        from ..loss import held_out

        sequences = held_out(self.path, asked, self.config, self.tokenizer)
        return TextBench(self.model, sequences, asked.batch_size * asked.sequence_length)

    def _other(self, source: str) -> Any:
        """The bench of `source`, on which the best program is compared with the source."""
        bench = self._bench([source])
        if bench.metric != self.bench.metric:
            raise UserError(
                f"check={source}: its metric is {bench.metric}, that of data {self.bench.metric}; give data of one kind"
            )
        if bench.fingerprint() == self.bench.fingerprint():
            raise UserError(
                f"check={source}: these are the samples of data, on which the program is chosen; give others (of a "
                "generated task: &seed=1)"
            )
        known = {*self.bench.samples()}
        if shared := sum(sample in known for sample in bench.samples()):
            print(
                f"warning: check={source}: {shared:,} of its {len(bench.weights):,} samples are samples of data, too, "
                "on which the program is chosen",
                file=sys.stderr,
            )
        return bench

    def _check_sizes(self) -> None:
        recipe = self.recipe
        most = max(recipe.sizes) if "sizes" in recipe.model_fields_set else min(recipe.sizes)
        if recipe.kind == "scan" and most > self.layers:
            raise UserError(f"sizes={recipe.sizes}: {self.layers} layers hold no block of {most}")

    def run(self) -> dict[str, Any]:
        """The result, after all programs that the record lacks. The record keeps what a stopped search has measured."""
        try:
            return self._run()
        except BaseException:
            self.record.write_rest()
            raise

    def _run(self) -> dict[str, Any]:
        from .bench import mean

        began, result, bench = time.monotonic(), self.record.result, self.bench
        self.record.spending = lambda: {"seconds": time.monotonic() - began, "layers_run": self.model.layers_run}
        result |= {"layers": self.layers, "metric": bench.metric, "higher": bench.higher}
        result |= {"samples": len(bench.weights), "of": "questions" if bench.higher else "blocks"}
        before = bench.values(self.source)
        result["source"] = mean(before, bench.weights)
        if self.recipe.kind == "scan":
            self._scan(before)
        else:
            self._chains()
        self.model.forget()
        values = bench.values(self.best)
        over = values - before
        result["best"] = {
            **_described(self.best),
            **mean(values, bench.weights),
            "over_source": float(over.sum() / bench.weights.sum()),
            "over_source_error": standard_error(over, bench.weights),
        }
        result["check"] = []
        self.record.write()
        for source, other in self.checks.items():
            result["check"].append(self._check(source, other))
        self.record.write()
        return result

    def _scan(self, before: np.ndarray) -> None:
        from .bench import mean
        from .scan import blocks

        bench, result = self.bench, self.record.result
        done = {(row["way"], row["first"], row["size"]) for row in result["programs"]}
        wanted = [*blocks(self.recipe, self.layers)]
        with Bar(len(wanted)) as report:
            for way, first, size, program in wanted:
                if (way, first, size) not in done:
                    values = bench.values(program)
                    over = values - before
                    row = {"way": way, "first": first, "size": size, **_described(program)}
                    row |= mean(values, bench.weights)
                    row["over_source"] = float(over.sum() / bench.weights.sum())
                    row["over_source_error"] = standard_error(over, bench.weights)
                    self.record.add("programs", row)
                report()
        sign = 1 if bench.higher else -1
        best = max(result["programs"], key=lambda row: sign * row["value"])
        if sign * best["value"] > sign * result["source"]["value"]:
            self.best = _program(best["parts"])

    def _chains(self) -> None:
        from . import chains

        recipe, result = self.recipe, self.record.result
        if recipe.search_for != "all":
            with Bar(len(self.bench.weights)) as report:
                result["each"] = chains.each(self.bench, recipe, self.layers, self.record, report)
        if recipe.search_for != "each":
            self.model.forget()
            with Bar(recipe.simulations) as report:
                self.best = chains.together(self.bench, recipe, self.layers, self.record, report)

    def _check(self, source: str, bench: Any) -> dict[str, Any]:
        """The best program beside the source on other data, with a difference that is paired over samples."""
        from .bench import mean

        self.model.forget()
        before, after = bench.values(self.source), bench.values(self.best)
        return {
            "data": [source],
            "samples": len(bench.weights),
            "source": mean(before, bench.weights),
            "best": mean(after, bench.weights),
            "over_source": float((after - before).sum() / bench.weights.sum()),
            "over_source_error": standard_error(after - before, bench.weights),
        }


def _described(program: Any) -> dict[str, Any]:
    return {"layers": [*program.layers], "parts": program._asdict(), "text": program.text()}


def _program(parts: dict[str, Any]) -> Any:
    from .program import Program

    prelude, core, coda = (tuple(parts[name]) for name in ("prelude", "core", "coda"))
    return Program(prelude, core, coda, parts["recurrences"], parts["damping"])


class Bar:
    """A block with a progress bar on stderr, if that is a terminal; `report` moves it."""

    def __init__(self, total: int):
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc="search", disable=not sys.stderr.isatty())

    def __enter__(self) -> Callable[[], object]:
        return lambda: self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()

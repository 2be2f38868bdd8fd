"""Every pair of a task and a depth, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...convert.inspection import flops_per_token
from ...errors import UserError
from ...train.pretrained import is_recurrent, load_config
from ...trained import beyond_trained, is_beyond
from ...version import __version__
from ..recipe import Evaluate
from ..result_file import places
from .catalogue import fingerprint, load_tasks
from .loaded import load
from .prepare import check_generation, check_used, configure, depths_of
from .record import Record, model_fingerprint
from .rows import group_row, row, scores
from .table import metric_name, score_text
from .work import Work

# Keys of the recipe that choose what is measured; all others are settings, which stay the same in a file of results.
CHOICES = ("tasks", "num_recurrences", "data")


class Measurement:
    """The pairs of `recipe`, and the record of those that are finished.

    paths: the directory of `model` and of the baseline, by their names, or their hub ids.   out, force, trust: as for
    `evaluate_tasks`. Raises UserError for bad input, before any model is loaded.
    """

    def __init__(self, model: str, paths: dict[str, str], recipe: Evaluate, out: Path | None, force: bool, trust: bool):
        self.model, self.paths, self.recipe = model, paths, recipe
        if recipe.baseline == model and recipe.baseline_revision != recipe.revision:
            raise UserError(f"baseline={model} is MODEL itself; give it another name, as that of a directory")
        revisions = {name: recipe.revision if name == model else recipe.baseline_revision for name in paths}
        self.configs = {name: load_config(path, revisions[name]) for name, path in paths.items()}
        if recipe.baseline and is_recurrent(self.configs[recipe.baseline]):
            raise UserError(f"baseline={recipe.baseline} is a recurrent-depth model; give a plain one, as the source")
        self.depths = depths_of(model, self.configs[model], recipe.num_recurrences)
        self.trained = getattr(self.configs[model], "trained_recurrences", None)
        self.found = load_tasks(recipe.tasks, trust)
        check_used([*self.found.tasks.values()], recipe)
        for name, task in self.found.tasks.items():
            with self.found.faults(name):
                configure(task, recipe)
        settings = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in CHOICES}
        facts = {
            "loopwise": __version__,
            "model": model,
            "model_path": places(model, recipe)["model_path"],
            "settings": {"model": model, **settings},
            "models": {name: model_fingerprint(path, revisions[name]) for name, path in paths.items()},
            "tasks": {name: self._fingerprint(name) for name in self.found.tasks},
            "groups": [name for name, group in self.found.groups.items() if group.has_aggregation],
            "trained_recurrences": self.trained,
        }
        self.record = Record(out, facts)
        if not force:
            self.record.resume()

    def _fingerprint(self, name: str) -> str:
        with self.found.faults(name):
            return fingerprint(self.found.tasks[name])

    def run(self) -> dict[str, Any]:
        """The result, after all pairs that the record lacks."""
        pairs = [(name, None, True) for name in self.found.tasks if self.recipe.baseline]
        pairs += [(name, depth, False) for name in self.found.tasks for depth in self.depths]
        pending = [pair for pair in pairs if not self.record.has(*pair)]
        if done := len(pairs) - len(pending):
            print(f"{self.record.out}: {done} of {len(pairs)} pairs of task and depth are there", file=sys.stderr)
        for baseline in (True, False):  # one of the two models is in memory at a time
            chosen = [pair for pair in pending if pair[2] == baseline]
            lm = self._load(baseline) if chosen else None
            for name, depth, _ in chosen:
                found = self._measure(lm, name, depth, baseline)
                self.record.add(found)
                done += 1
                _tell(f"[{done}/{len(pairs)}]", found)
        self._add_groups()
        self.record.write()
        return self.record.result

    def _name(self, baseline: bool) -> str:
        return self.recipe.baseline if baseline and self.recipe.baseline else self.model

    def _load(self, baseline: bool) -> Any:
        name, depths = self._name(baseline), None if baseline else self.depths
        lm = load(name, self.paths[name], self.configs[name], self.recipe, depths)
        for task_name, task in self.found.tasks.items():
            with self.found.faults(task_name):
                check_generation(task, lm)
        if warning := beyond_trained(self.trained, [depth for depth in depths or () if depth]):
            print(warning, file=sys.stderr)
        return lm

    def _measure(self, lm: Any, name: str, depth: int | None, baseline: bool) -> dict[str, Any]:
        """The row of task `name` at `depth`."""
        task, config = self.found.tasks[name], self.configs[self._name(baseline)]
        lm.num_recurrences, lm.work = depth, Work()
        with self.found.faults(name):
            scored = row(scores(lm, task, name, self.recipe), name)
        work: Work = lm.work
        return {
            "task": name,
            "baseline": baseline,
            "num_recurrences": depth,
            **scored,
            "tokens": work.tokens,
            "seconds": work.seconds,
            "seconds_per_token": work.seconds_per_token,
            "mean_recurrences": None if baseline else work.mean_recurrences,
            "flops_per_token": flops_per_token(config, work.mean_computed),
            "beyond_trained": is_beyond(self.trained, depth),
        }

    def _add_groups(self) -> None:
        """Add the rows of groups whose tasks are all there."""
        rows = self.record.result["results"]
        for depth, baseline in dict.fromkeys((one["num_recurrences"], one["baseline"]) for one in rows):
            of_depth = {
                one["task"]: one for one in rows if (one["num_recurrences"], one["baseline"]) == (depth, baseline)
            }
            for group in self.found.groups.values():
                with self.found.faults(group.name):
                    found = group_row(group, of_depth) if group.has_aggregation else None
                if found:
                    self.record.add(found)


def _tell(place: str, found: dict[str, Any]) -> None:
    """A line about a finished pair."""
    depth = (
        f"R={found['num_recurrences']}" if found["num_recurrences"] else "baseline" if found["baseline"] else "model"
    )
    facts = (
        f"{metric_name(found['metric'])} {score_text(found)}, {found['samples']} questions, {found['seconds']:.1f} s"
    )
    print(f"{place} {found['task']} {depth}: {facts}", file=sys.stderr, flush=True)

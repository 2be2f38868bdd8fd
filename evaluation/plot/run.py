"""A training run as a picture, drawn from its logs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...train.checkpoint import RUN, checkpoints
from ...train.curriculum import curriculum_of
from ...train.recipe import PhaseRecurrence, Recurrence
from .curriculum import histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = "trainer_state.json"


def run_figure(out: Path) -> Figure:
    """Loss against step, held-out loss by depth, a histogram of R, and the convergence of the state.

    Raises UserError if `out` holds no run that has ended or written a checkpoint.
    """
    from matplotlib.figure import Figure

    folder = next((path for path in (out, *checkpoints(out)) if (path / STATE).is_file()), None)
    if folder is None:
        raise UserError(f"{out}: no training run in it that has ended or written a checkpoint (no {STATE})")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    log = state["log_history"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, held_out), (depth, convergence) = figure.subplots(2, 2)
    loss.plot(*series(log, "loss"), color="0.3")
    loss.set_xlabel("step")
    loss.set_ylabel("training loss")
    for name, label in by_depth(log, "eval_loss"):
        held_out.plot(*series(log, name), marker="o", markersize=3, label=label)
    held_out.set_xlabel("step")
    held_out.set_ylabel("held-out loss")
    sampled = sampled_recurrences(json.loads((folder / RUN).read_text(encoding="utf-8"))["run"], state)
    if sampled:
        histogram(depth, sampled)
    for record in log:
        names = [name for name in record if name.startswith("state_change_r")]
        changes = [(_depth(name), record[name]) for name in names]
        if changes:
            shade = str(0.8 * (1 - record["step"] / max(1, state["global_step"])))
            convergence.semilogy(*zip(*sorted(changes), strict=True), color=shade, label=f"step {record['step']}")
    convergence.xaxis.get_major_locator().set_params(integer=True)
    convergence.set_xlabel("recurrence r")
    convergence.set_ylabel("|s_r - s_(r-1)| / |s_r|")
    for axes in (held_out, convergence):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
        else:
            axes.set_title("not measured: no held-out text, or no recurrence", fontsize="small")
    return figure


def series(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the metric `name`."""
    found = [(record["step"], record[name]) for record in log if name in record]
    return [step for step, _ in found], [value for _, value in found]


def by_depth(log: list[dict[str, Any]], prefix: str) -> list[tuple[str, str]]:
    """(metric, label) of the held-out losses, ordered by depth."""
    names = {name for record in log for name in record if re.fullmatch(prefix + r"(_r\d+)?", name)}
    return [(name, f"R = {name.rpartition('_r')[2]}" if "_r" in name else "loss") for name in sorted(names, key=_depth)]


def _depth(name: str) -> int:
    return int(name.rpartition("_r")[2]) if "_r" in name else 0


def sampled_recurrences(run: dict[str, Any], state: dict[str, Any]) -> list[int]:
    """R of every step that the run has done; [] for a plain model, and where R follows from the records."""
    recipe, mean = run["recipe"], run.get("mean recurrences")
    if mean is None or recipe["data"].get("recurrences"):
        return []
    keys, phases = Recurrence.model_validate(recipe.get("recurrence") or {}), recipe["data"].get("phases") or []
    by_phase = [(p["share"], p.get("recurrence") and PhaseRecurrence.model_validate(p["recurrence"])) for p in phases]
    curriculum = curriculum_of(keys, mean, state["max_steps"], recipe["seed"], by_phase)
    return [curriculum.at(step).num_recurrences for step in range(state["global_step"])]

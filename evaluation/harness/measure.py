"""`evaluate_tasks`: the whole measurement, if lm-eval is there."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...errors import missing
from ...gguf_source import unpacked
from ...quiet import quiet
from ..recipe import Evaluate


def evaluate_tasks(
    model: str, recipe: Evaluate, out: Path | None = None, force: bool = False, trust: bool = False
) -> dict[str, Any]:
    """Scores of `model` on `recipe.tasks` at each of its depths, and those of `recipe.baseline`.

    out: a file that gets the result after every pair, and whose finished pairs are not measured again.   force: start
    anew.   trust: run the code that task files name. Returns {"model", "settings", "models", "tasks", "groups",
    "trained_recurrences", "results"}. A result has "task", "baseline" (True for its row), "num_recurrences" (None for a
    plain model), "metric" (the task's first, as `metric,filter`), "score", "score_error" (standard error; None if
    unknown), "samples" (questions), "metrics" (all of lm-eval's), "tokens" (prompts and answers), "seconds",
    "seconds_per_token", "mean_recurrences" (None if unknown), "flops_per_token", "beyond_trained", and "logged" with
    `log_samples`. Progress goes to stderr.

    Raises UserError for bad input, and if lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise missing("tasks", "lm-eval", "eval") from None
    from .pairs import Measurement

    quiet()
    for name in ("lm_eval", "huggingface_hub"):  # the hub names each of its tries to reach a network that is not there
        logging.getLogger(name).setLevel(logging.ERROR)
    with ExitStack() as stack:
        names = filter(None, [model, recipe.baseline])
        paths = {name: str(stack.enter_context(unpacked(Path(name)))) for name in names}
        return Measurement(model, paths, recipe, out, force, trust).run()

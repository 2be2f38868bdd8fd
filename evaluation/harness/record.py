"""The file of results: finished pairs of task and depth stay in it, and are not measured again.

FILE.json holds the settings of its measurement, and hashes of the models and tasks. It is replaced whole after each
pair, so a kill at any moment loses the pair that was running at most.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...directory import check_file, new_file
from ...errors import UserError
from ...find_source import SHORT, snapshot
from ...hub import asking, not_found
from ..result_file import read_result, two_values, write_result
from .table import markdown

ANEW = "name another file, or start anew with --force"
ADDED = ("baseline", "baseline_revision")  # settings that may come to a file without a baseline
ENDINGS = (".safetensors", ".bin", ".gguf")  # of weights, whose size and time stand for their content


class Record:
    """The result of one measurement, with `results` in it, and the file that it is kept in.

    out: the .json file, or None to keep nothing. A regular file has a .md file beside it, with the table.
    """

    def __init__(self, out: Path | None, facts: dict[str, Any]):
        self.out = out
        self.result: dict[str, Any] = {**facts, "results": []}

    def resume(self) -> None:
        """Take over the finished pairs in the file. Raises UserError if other models, tasks or settings gave them."""
        found = _read(self.out) if self.out else None
        if found is None:
            return
        before, now = found["settings"], self.result["settings"]
        if before.get("baseline") and now.get("baseline") is None:
            now |= {name: before.get(name) for name in ADDED}  # its column stays
        added = ADDED if before.get("baseline") is None else ()
        for name in {**before, **now}:
            if before.get(name) != now.get(name) and name not in added:
                values = two_values(name, before, now)
                raise UserError(
                    f"--out {self.out}: it was measured with {name}={values[0]}, and now {name}={values[1]}; {ANEW}"
                )
        for kind in ("models", "tasks"):
            for name, value in self.result[kind].items():
                if found[kind].get(name, value) != value:
                    raise UserError(f"--out {self.out}: {kind.removesuffix('s')} {name} has changed since; {ANEW}")
            self.result[kind] = {**found[kind], **self.result[kind]}
        self.result["groups"] = list(dict.fromkeys([*found["groups"], *self.result["groups"]]))
        self.result["results"] = found["results"]

    def has(self, task: str, depth: int | None, baseline: bool) -> bool:
        """True if the pair was measured."""
        return any(_key(row) == (task, depth, baseline) for row in self.result["results"])

    def add(self, row: dict[str, Any]) -> None:
        """Add the result of a pair, in place of an earlier one, and write the files."""
        rows = [one for one in self.result["results"] if _key(one) != _key(row)]
        tasks = [*self.result["tasks"], *self.result["groups"]]
        rows.append(row)
        rows.sort(key=lambda one: (tasks.index(one["task"]), not one["baseline"], one["num_recurrences"] or 0))
        self.result["results"] = rows
        self.write()

    def write(self) -> None:
        """Replace FILE.json, then FILE.md. Raises UserError for a full disk."""
        if self.out is None:
            return
        write_result(self.out, self.result)
        if not _is_special(self.out):
            try:
                with new_file(beside(self.out)) as partial:
                    partial.write_text(markdown(self.result) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out {self.out}: {error.strerror}") from None


def check_out(out: Path) -> None:
    """Raises UserError if `out`, or the .md beside it, cannot be written, or is a file of another kind."""
    check_file(out)
    if _is_special(out):
        return
    if out.suffix == ".md":
        raise UserError(f"--out {out}: the table is written to the .md; name a .json file")
    check_file(beside(out))
    if not out.exists() and beside(out).exists():
        raise UserError(f"--out {out}: its table would replace {beside(out)}, which is of something else")
    if out.exists() and out.stat().st_size and _read(out) is None:
        raise UserError(f"--out {out} exists and is not a result of loopwise eval tasks=...; name another file")


def beside(out: Path) -> Path:
    """The Markdown file of the result file `out`."""
    return out.with_suffix(".md")


def model_fingerprint(model: str, revision: str | None) -> str:
    """A hash of the files of `model`, a directory; of a hub id, the commit of its `revision`, from the cache.

    Weights count by name, size and time of their last change: reading them would take as long as a short measurement.
    """
    folder = Path(model)
    if not folder.exists():
        with asking(lambda error: not_found(model, error, revision)):
            return snapshot(model, revision, SHORT).name
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in ENDINGS:
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
        elif file.suffix in (".json", ".jinja"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _read(out: Path) -> dict[str, Any] | None:
    """The result of tasks in `out`; None where there is none."""
    return read_result(out, ("results", "settings", "tasks", "groups", "models"))


def _key(row: dict[str, Any]) -> tuple[str, int | None, bool]:
    return row["task"], row["num_recurrences"], row["baseline"]


def _is_special(out: Path) -> bool:
    """True for a device or a pipe, like /dev/stdout."""
    return out.exists() and not out.is_file()

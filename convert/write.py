"""Writing a checkpoint: one tensor after another into safetensors shards, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from .journal import Journal
from .pending import Pending, units
from .shards import SHARD_BYTES, Done, Shards

Work = Callable[[list[int]], Generator[tuple[int, Done]]]  # numbers of units -> each of them, once it is written


def write_weights(
    tensors: list[Pending],
    directory: Path,
    show_progress: bool,
    shard_bytes: int = SHARD_BYTES,
    journal: Journal | None = None,
    work: Work | None = None,
) -> dict[str, float]:
    """Write `tensors` into `directory` as model.safetensors, or as numbered shards and an index.

    journal: units that it names are not made again where the files hold them; new ones are added.   work: writes units;
    None for this process, with one tensor in memory at a time. Returns the errors that were measured, by group. Raises
    UserError for values that are not finite in the type of the tensor.
    """
    shards, every = Shards(tensors, directory, shard_bytes), units(tensors)
    shards.prepare()
    found: dict[int, Done] = {}
    before = journal.finished if journal else {}
    with tqdm(total=shards.total, unit="B", unit_scale=True, desc="writing", disable=not show_progress) as progress:

        def count(number: int, done: Done) -> None:
            found[number] = done
            progress.update(sum(t.bytes for t in every[number]))

        for number, unit in enumerate(every):
            done = before.get(tuple(t.name for t in unit))
            if done and shards.holds(unit, done.checksums):
                count(number, done)
        todo = [number for number in range(len(every)) if number not in found]
        here = ((number, shards.write(every[number])) for number in todo)
        with closing(work(todo) if work and todo else here) as results:
            for number, done in results:
                if journal:
                    journal.add(every[number], done)
                count(number, done)
    return {
        every[n][0].group: done.error
        for n, done in sorted(found.items(), key=lambda item: item[0])
        if done.error is not None
    }

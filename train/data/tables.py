"""Tables and datasets that the `datasets` library reads: parquet and arrow files, hub ids, saved directories."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loopwise.checkpoint import read_json
from loopwise.errors import UserError, missing, reason
from loopwise.input_files import check_tree, is_plain_name

from .snapshot import kind_of

if TYPE_CHECKING:
    from datasets import Dataset

TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # suffix: builder of `datasets`


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Turn every error that `datasets` raises about `source` into a UserError of one line.

    Text, JSON lines and generated tasks need no `datasets`. Raises UserError where it is absent and a source needs it.
    """
    try:
        if find_spec("datasets"):
            import datasets

            datasets.disable_progress_bars()
        yield
    except UserError:
        raise
    except ImportError:
        otherwise = "; or give a file of text or JSON lines, which needs none"
        raise missing(source, "the datasets library", "train", otherwise) from None
    except Exception as error:  # errors of datasets, pyarrow and the hub share no base class
        raise UserError(f"{source}: not readable as a file, a directory or a dataset ({reason(error)})") from None


def is_empty(path: Path) -> bool:
    """True for a parquet file without rows, which `datasets` cannot read. The last part of a table may be one."""
    if kind_of(path, strict=False) != ".parquet":
        return False
    with one_line_errors(str(path)):
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows == 0


def load_table(path: Path) -> Dataset:
    """The rows of a parquet or arrow file. Raises UserError for a damaged file."""
    # A cache in the user's directory would outlive the run, so the rows stay in memory.
    with tempfile.TemporaryDirectory() as cache, one_line_errors(str(path)):
        import datasets

        keys: dict[str, Any] = {"split": "train", "cache_dir": cache, "keep_in_memory": True}
        return cast(Any, datasets.load_dataset(TABLES[kind_of(path)], data_files=str(path), **keys))


def load_dataset(source: str, path: Path, split: str, subset: str | None) -> Dataset:
    """One split of a hub dataset, or of the dataset saved in the directory `path`. Raises UserError."""
    with one_line_errors(source):
        import datasets

        if path.is_dir():
            return load_saved(source, path, split)
        return cast(Any, datasets.load_dataset(source, subset, split=split))


def load_saved(source: str, path: Path, split: str) -> Dataset:
    """The dataset saved in the directory `path`. Raises UserError if it lacks `split`."""
    import datasets

    check_tree(path)
    for state in path.rglob("state.json"):
        for part in read_json(state).get("_data_files") or []:
            name = part.get("filename") if isinstance(part, dict) else part
            if not is_plain_name(name):
                raise UserError(f"{state}: names {name!r}; the files of a dataset lie in its directory")
    splits = read_json(path / "dataset_dict.json").get("splits") if (path / "dataset_dict.json").is_file() else None
    for name in splits if isinstance(splits, list) else []:
        if not is_plain_name(name):
            raise UserError(
                f"{path / 'dataset_dict.json'}: names {name!r}; the splits of a dataset lie in its directory"
            )
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{source}: no split {split!r}; it has {', '.join(map(repr, dataset))}")
    return dataset[split]


def is_saved_dataset(directory: Path) -> bool:
    """True for a directory that `Dataset.save_to_disk` wrote."""
    names = ("dataset_info.json", "state.json", "dataset_dict.json")
    return any((directory / name).is_file() for name in names)

"""Folders that `datasets` reads as a dataset with splits, for example a download of a hub dataset."""

from __future__ import annotations

import tempfile
from pathlib import Path

from loopwise.errors import UserError

RECORDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
UNREAD = (".zst", ".zip", ".tar", ".tgz", ".7z", ".lz4")
ABOUT = ("README", "LICENSE", "NOTICE", "dataset_infos.json")  # files beside the data


def kind_of(path: Path, strict: bool = True) -> str:
    """The suffix of a file without its compression: `.jsonl` for `a.jsonl.gz`.

    Raises UserError for an unsupported compression; without `strict`, only on files of records.
    """
    inner, outer = Path(path.stem).suffix.lower(), path.suffix.lower()
    if outer in UNREAD and (strict or inner in RECORDS):
        raise UserError(f"{path}: {outer} files are not read; unpack it, or compress it as .gz, .bz2 or .xz")
    return inner if outer in PACKED else outer


def is_snapshot(folder: Path, files: list[Path]) -> bool:
    """True if `files`, the files of `folder`, form a dataset: with a dataset card, or with splits of tables or records.

    Scripts and pictures beside the data do not matter. A folder with text files only needs the card, as train.py and
    test.py are not splits.
    """
    card = folder / "README.md"
    data = [path for path in files if not path.name.startswith(ABOUT) and path.suffix != ".md"]
    if data and card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---"):
        return True
    if not any(kind_of(path, strict=False) in RECORDS for path in data):
        return False
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        return {str(split) for split in get_data_patterns(str(folder))} != {"train"}
    except EmptyDatasetError:
        return False


def files_of_split(folder: Path, split: str, subset: str | None) -> list[Path]:
    """The files of one split, as `datasets.load_dataset` finds them. Raises UserError for an unknown split."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        if subset is None:
            names = datasets.get_dataset_config_names(str(folder))
            if len(names) > 1 and "default" not in names:
                raise UserError(f"{folder}: choose a subset of it: {', '.join(names)}")
        builder = datasets.load_dataset_builder(str(folder), subset, cache_dir=cache)
    found = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if split not in found:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(map(repr, found))}")
    return [Path(file) for file in found[split]]

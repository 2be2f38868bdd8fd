"""The teacher of a distillation: it runs beside the model, or once before training with its top k on disk.

Shapes: n blocks, B of a micro-batch, T tokens, V vocabulary, k most likely tokens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from loopwise.disk import naming
from loopwise.errors import UserError
from loopwise.foreign import TEACHER_DONE, TEACHER_IDS, TEACHER_LOG_PROBS
from loopwise.model.some_logits import head_at

from . import separation
from .data import Blocks
from .pretrained import is_recurrent, load_config, load_model
from .recipe import Distillation

FILES = (TEACHER_IDS, TEACHER_LOG_PROBS)
DONE = TEACHER_DONE  # written last; after a kill the computation starts over


def check(keys: Distillation, config: Any) -> None:
    """Raises UserError for a teacher that cannot be loaded, or whose vocabulary differs from that of `config`."""
    teacher = load_config(keys.teacher, keys.revision)
    if keys.num_recurrences and not is_recurrent(teacher):
        raise UserError(
            f"objectives.distillation.num_recurrences={keys.num_recurrences}: {keys.teacher} is a plain "
            f"{teacher.model_type}, without recurrence"
        )
    if teacher.vocab_size != config.vocab_size:
        raise UserError(
            f"objectives.distillation.teacher={keys.teacher}: its vocabulary has {teacher.vocab_size} tokens, the "
            f"model's {config.vocab_size}; both must be the same"
        )
    if keys.top_k and keys.top_k >= teacher.vocab_size:
        raise UserError(
            f"objectives.distillation.top_k={keys.top_k}: give less than the vocabulary of {teacher.vocab_size}"
        )


class Teacher:
    """A frozen model. Calling it gives logits [B, T, V] for the inputs of a micro-batch, without gradient.

    If the inputs have a mask `logits_at` [B, T], the logits are [1, N, V], at its N True positions.
    separate: mask attention between packed documents. Raises UserError if the model cannot do that.
    """

    def __init__(self, keys: Distillation, device: torch.device, precision: str, separate: bool = False):
        model: Any = load_model(keys.teacher, keys.revision).eval().requires_grad_(False)
        if separate:
            separation.check(model, f"objectives.distillation.teacher={keys.teacher}")
        self.model = model.to(device, getattr(torch, precision))
        self.recurrences = keys.num_recurrences
        self.recurrent = is_recurrent(self.model.config)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        keys = {name: inputs[name] for name in ("position_ids",) if name in inputs}
        if self.recurrent:
            keys |= {"num_recurrences": self.recurrences, "sequence_ids": inputs["sequence_ids"]}
        with head_at(self.model.get_output_embeddings(), inputs.get("logits_at")):
            return self.model(input_ids=inputs["input_ids"], use_cache=False, **keys).logits


def stored(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's top k of a micro-batch, from `precompute`: ids and log-probabilities [B, T, k].

    If the inputs have a mask `logits_at` [B, T], these are [1, N, k], at its N True positions.
    """
    ids, log_probs, at = inputs["teacher_ids"], inputs["teacher_log_probs"], inputs.get("logits_at")
    return (ids, log_probs) if at is None else (ids[at][None], log_probs[at][None])


def precompute(
    keys: Distillation,
    blocks: Blocks,
    device: torch.device,
    precision: str,
    batch_size: int,
    shard: tuple[int, int],
) -> None:
    """Compute the teacher's top k of this rank's share of the training blocks, and write them into the files.

    shard: (rank, ranks). Log-probabilities are at `keys.temperature`. `allocate` must have made the files before.
    """
    teacher = Teacher(keys, device, precision, blocks.train.separate)
    ids, log_probs = (np.load(blocks.directory / name, mmap_mode="r+") for name in FILES)
    rank, ranks = shard
    starts = range(rank * batch_size, len(blocks.train), ranks * batch_size)
    for start in tqdm(starts, desc="teacher", unit="batch", disable=rank > 0 or not sys.stderr.isatty()):
        rows = slice(start, min(start + batch_size, len(blocks.train)))
        found = blocks.train.rows(range(rows.start, rows.stop))
        inputs = {name: torch.from_numpy(x).to(device) for name, x in found.items()}
        inputs["sequence_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64, device=device)
        logits = teacher(inputs).float() / keys.temperature
        values, places = logits.log_softmax(-1).topk(keys.top_k or 1)
        ids[rows], log_probs[rows] = places.cpu().numpy(), values.cpu().numpy()
    ids.flush()
    log_probs.flush()


def allocate(keys: Distillation, blocks: Blocks) -> None:
    """Create the files that `precompute` fills. Called by one process. Raises OSError, which names one, for a full
    disk."""
    for name, kind in zip(FILES, (np.int32, np.float32), strict=True):
        shape, path = (*blocks.train.tokens.shape, keys.top_k or 1), blocks.directory / name
        with naming(path):
            np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
            if hasattr(os, "posix_fallocate"):  # on Linux: a disk that is full when a page is written kills the process
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def finish(blocks: Blocks) -> None:
    """Mark the files as complete. Called by one process, after all have written their share."""
    (blocks.directory / DONE).write_text("", encoding="utf-8")


def load(blocks: Blocks) -> dict[str, np.ndarray]:
    """The teacher's ids [n, T, k] int32 and log-probabilities [n, T, k] float32, memory-mapped, by input name."""
    return {Path(name).stem: np.load(blocks.directory / name, mmap_mode="r") for name in FILES}

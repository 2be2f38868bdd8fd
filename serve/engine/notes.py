"""The results of passes, which the host reads while the next ones run."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .graph_steps import Note


class Notes:
    """Copies of a tensor [K] after each pass, which the host reads later: on a GPU, when the device has finished that
    pass, and not when it has done everything started since."""

    def __init__(self, note: Tensor, most: int = 4):
        self.note = note
        pinned = note.is_cuda
        self.room = [torch.empty(len(note), dtype=note.dtype, device="cpu", pin_memory=pinned) for _ in range(most)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(most)]
        self.queue: deque[int] = deque()
        self.at = 0

    def __len__(self) -> int:
        return len(self.queue)

    def add(self) -> None:
        """Copy the tensor as it will be after the work started so far."""
        self.room[self.at].copy_(self.note, non_blocking=True)
        if event := self.events[self.at]:
            event.record(torch.cuda.current_stream(self.note.device))
        self.queue.append(self.at)
        self.at = (self.at + 1) % len(self.room)

    def next(self) -> Note:
        """The oldest copy that was not read yet. Waits for it."""
        at = self.queue.popleft()
        if event := self.events[at]:
            event.synchronize()
        return Note(*self.room[at].tolist())

    def now(self) -> Note:
        """The tensor as it is. Waits for the device."""
        return Note(*self.note.tolist())

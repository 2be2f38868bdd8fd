"""The recipe of `loopwise train`. No torch here: `--help` prints these keys.

Files in reading order:

    fields.py        types of values that several sections share
    recurrence.py    section `recurrence`
    data.py          section `data`
    objectives.py    section `objectives`
    optimiser.py     section `optimiser`
    adapters.py      section `adapters`
    train.py         Train, the recipe of a training run
"""

from .adapters import Adapters
from .data import Data, Phase, RecordRecurrences
from .objectives import (
    DEPTHS,
    DeepSupervision,
    Distillation,
    ExitGate,
    Exits,
    Objectives,
    Ponder,
    Progressive,
    RouterLosses,
)
from .optimiser import ROLES, Optimiser
from .recurrence import PhaseRecurrence, Recurrence
from .train import Train

__all__ = [
    "DEPTHS",
    "ROLES",
    "Adapters",
    "Data",
    "DeepSupervision",
    "Distillation",
    "ExitGate",
    "Exits",
    "Objectives",
    "Optimiser",
    "Phase",
    "PhaseRecurrence",
    "Ponder",
    "Progressive",
    "RecordRecurrences",
    "Recurrence",
    "RouterLosses",
    "Train",
]

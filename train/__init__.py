"""Retrain a model under a recurrence curriculum, and measure its held-out loss at several recurrences.

`Curriculum` and the recipe sections need no torch; `loopwise.train.run.train` does the training.
"""

from .curriculum import Curriculum, Depth, Schedule
from .recipe import Data, Evaluate, Optimiser, Recurrence, Train

__all__ = ["Curriculum", "Data", "Depth", "Evaluate", "Optimiser", "Recurrence", "Schedule", "Train"]

"""Waves: depths at which they draft, and a model whose drafts are right."""

from __future__ import annotations

import random
from typing import Any

from tests.helpers.engines import build


def drafts(draw: random.Random) -> dict[str, Any]:
    """Depths of 1 to 4 at which a wave drafts."""
    depths = tuple(sorted(draw.sample(range(1, 5), draw.randint(1, 3))))
    return draw.choice(({}, {"draft_every": draw.randint(1, 4)}, {"draft_depths": depths}))


def agreeing(depth: int) -> Any:
    """A tiny model whose state is what the first recurrence makes of it: every draft is right."""
    return build(
        num_recurrences=depth, max_recurrences=depth, recurrence_damping=1e-9, prelude=[0], core=[1], coda=[2, 3]
    )

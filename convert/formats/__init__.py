"""Public recurrent-depth checkpoint formats, one file each. A new format is a new file and an entry in `FORMATS`.

Files in reading order, each importing only those above it:

    base.py                Format: how it is recognized, where its tensors go, the formulas of its authors
    layers.py              layer formulas that several formats share
    raven.py               tensors and formulas of Huginn's code base
    huginn.py              Huginn
    retrofitted_olmo.py    retrofitted OLMo 2
    retrofitted_llama.py   retrofitted Llama
    ouro.py                Ouro
    nanbeige.py            Nanbeige4.2
    loopus.py              LoopUS
    parcae.py              Parcae
    loopformer.py          LoopFormer
    mor.py                 Mixture-of-Recursions, expert-choice and token-choice
    unsupported.py         recurrent models that are recognised, and why they are not supported
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import UserError
from . import huginn, loopformer, loopus, mor, nanbeige, ouro, parcae, retrofitted_llama, retrofitted_olmo
from .base import Format
from .unsupported import refuse_unsupported

__all__ = ["FORMATS", "Format", "recognize", "refuse_unsupported"]

FORMATS = (
    huginn.FORMAT,
    retrofitted_olmo.FORMAT,
    retrofitted_llama.FORMAT,
    ouro.FORMAT,
    nanbeige.FORMAT,
    loopus.FORMAT,
    parcae.FORMAT,
    loopformer.FORMAT,
    mor.EXPERT_CHOICE,
    mor.TOKEN_CHOICE,
)


def recognize(fields: dict[str, Any], names: Iterable[str]) -> Format:
    """The format of a checkpoint with these config fields and tensors.

    Raises UserError, with the reason against each format, where none matches.
    """
    present = set(names)
    reasons = {kind.name: kind.mismatch(fields, present) for kind in FORMATS}
    for kind in FORMATS:
        if reasons[kind.name] is None:
            return kind
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"a checkpoint of model_type {fields['model_type']!r} with tensors of no known format ({tried})")

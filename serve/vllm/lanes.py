"""The old place of `LaneConfig`, which stands in loopwise.serve.api.lanes."""

from ...deprecated import print_warning
from ..api.lanes import LaneConfig

__all__ = ["LaneConfig"]

print_warning(f"warning: module {__name__!r} is deprecated since loopwise 0.2.0: use {LaneConfig.__module__!r}")

"""Programs for a process in which a package cannot be imported, as if it were not installed."""

from __future__ import annotations

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import {package}
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("{package} can be imported")
"""


def without(package: str, program: str) -> str:
    """The text of `program`, in a process where `package` cannot be imported. It ends at once if the package can be."""
    return BLOCK.format(package=package) + program

"""Licences of the installed packages: `python -m supply.licenses` writes licenses.txt.

A licence is an SPDX expression where the package gives one; other words of its metadata are looked up in WORDS. A
kind of licence that is not in KINDS has to be read by a person, and then listed there.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.utils import canonicalize_name

from .locks import PINS, read

FILE = Path(__file__).with_name("licenses.txt")
HEAD = """# Licences of the packages that constraints.txt pins, by their own metadata.
# Written by `python -m supply.licenses`.
# Loopwise's wheel and source distribution hold none of these packages; an image does.
"""

# Kinds that may be installed, of SPDX's list; beside them two kinds of conditions, which an image has to keep.
KINDS = {
    "permissive": [
        *("0BSD", "AFL-2.1", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python"),
        *("ISC", "LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense"),
    ],
    "weak copyleft: changes to the package itself stay open": ["LGPL-2.1-only", "LGPL-2.1-or-later", "MPL-2.0"],
    "copyleft, of a tool that no code of ours imports": ["GPL-2.0-only"],
    "proprietary: redistribution by Intel's terms": ["LicenseRef-Intel"],
}
TOOLS = {"codespell"}  # may be GPL: programs that are run by `make lint` alone, and are in no image that only serves

# Words of packages' metadata -> SPDX.
WORDS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Academic Free License (AFL)": "AFL-2.1",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD License": "BSD",
    "BSD-derived (http://www.repoze.org/LICENSE.txt)": "BSD",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.1-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Other/Proprietary License": "LicenseRef-Intel",
    "Python Software Foundation License": "PSF-2.0",
    "The MIT License (MIT)": "MIT",
    "The Unlicense (Unlicense)": "Unlicense",
}
# Packages whose metadata names no licence -> the licence of their sources.
UNNAMED = {"axe-playwright-python": "MIT", "oss-harmony": "Apache-2.0", "promql-parser": "MIT", "setuptools": "MIT"}


def license_of(found: importlib.metadata.Distribution) -> str:
    """The licence of an installed package as an SPDX expression, or its own words where these are not known."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [text.split(" :: ") for text in metadata.get_all("Classifier") or []]
    words = [parts[-1] for parts in classifiers if parts[0] == "License" and parts[1:] != ["OSI Approved"]]
    if not words:
        words = "".join(metadata.get_all("License") or []).strip().splitlines()[:1]
    if not words:
        return UNNAMED.get(canonicalize_name(found.name), "no licence named")
    return " AND ".join(WORDS.get(word, word) for word in sorted(words))


def licenses() -> dict[str, str]:
    """Package -> licence, of all pinned packages that are installed here."""
    pinned = {pin.name for pin in read(PINS) if pin.applies()}
    found: dict[str, importlib.metadata.Distribution] = {}
    for each in importlib.metadata.distributions():
        found.setdefault(canonicalize_name(each.name), each)  # the first one is imported: others carry copies behind it
    return {name: license_of(found[name]) for name in sorted(pinned & found.keys())}


def listed() -> dict[str, str]:
    """Package -> licence, as licenses.txt has them."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)


def kinds(expression: str) -> list[str]:
    """The licences in an SPDX expression."""
    return [part for part in re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression) if part.strip()]


def faults(found: dict[str, str]) -> list[str]:
    """Packages with a licence of a kind that is not listed in KINDS, or with one that only TOOLS may have."""
    known = {kind for names in KINDS.values() for kind in names}
    new = [f"{name}: {text}" for name, text in found.items() if set(kinds(text)) - known]
    gpl = [f"{name}: {text}" for name, text in found.items() if re.match(r"A?GPL", text) and name not in TOOLS]
    return list(dict.fromkeys(new + gpl))


def table(found: dict[str, str]) -> str:
    return HEAD + "".join(f"{name}: {text}\n" for name, text in found.items())


if __name__ == "__main__":
    FILE.write_text(table(licenses()), encoding="utf-8")

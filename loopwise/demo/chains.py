"""Part (b): a small model that learns chains of assignments, where deeper chains need more recurrences."""

from __future__ import annotations

from pathlib import Path

from .processes import loopwise

TASK = "task:hops?lookups=0&questions=1&statements=18"
RESULTS = Path(__file__).parents[2] / "docs" / "results.md"


def part(out: Path) -> tuple[Path, Path]:
    """Init, train, convert, retrain, measure, draw. Returns (directory of the trained model, picture)."""
    empty, base, converted, chains = (out / f"chains-{name}" for name in ("empty", "base", "converted", "trained"))
    loopwise("init", "task:hops", empty)
    loopwise("train", empty, base, "--recipe", "hops-base", "seed=1")
    loopwise("convert", base, converted, "sizes=1,1,0", "injection=linear", "num_recurrences=8")
    # On two cores, two processes take four fifths of the time of one process with two threads.
    loopwise(
        "train", converted, chains, "--recipe", "hops", "seed=1", "batch_size=16", "--launcher", "ddp", "--processes", 2
    )
    result, picture = out / "chains.json", out / "accuracy.png"
    loopwise(
        "eval", chains, f"data={TASK}&hops=0..4+6+8+10+12+16&records=1500", "group=hops",
        "num_recurrences=1,2,3,4,6,8", "--out", result,
    )  # fmt: skip
    loopwise("plot", "eval", result, "--out", picture)
    if (plain := recorded(RESULTS)) is not None:
        print(f"\nA plain model, trained longer: {plain} % in all (docs/results.md, section (c); not measured here).")
    return chains, picture


def recorded(results: Path) -> float | None:
    """Right answers in % of the plain model, from section (c) of the file `results`; None without that file."""
    if not results.is_file():  # an installed package has no docs
        return None
    section = results.read_text(encoding="utf-8").partition("\n## (c) Chains")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| plain")]
    return float(rows[0].strip("| ").split("|")[-1].split("±")[0]) if rows else None

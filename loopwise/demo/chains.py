"""Part (b): a small model that learns chains of assignments, where a recurrence is a step of reasoning."""

from __future__ import annotations

from pathlib import Path

from .processes import loopwise

TASK = "task:hops?lookups=0&questions=1&statements=18"
PLAIN = ("52.2 %", "docs/results.md")


def part(out: Path) -> tuple[Path, Path]:
    """Init, train, convert, retrain, measure, draw. Returns the directory of the trained model and the picture."""
    empty, base, converted, chains = (out / f"chains-{name}" for name in ("empty", "base", "converted", "trained"))
    loopwise("init", "task:hops", empty)
    loopwise("train", empty, base, "--recipe", "hops-base", "seed=1")
    loopwise("convert", base, converted, "sizes=1,1,0", "injection=linear", "num_recurrences=8")
    loopwise("train", converted, chains, "--recipe", "hops", "seed=1")
    result, picture = out / "chains.json", out / "accuracy.png"
    loopwise(
        "eval", chains, f"data={TASK}&hops=0..4+6+8+10+12+16&records=1500", "group=hops",
        "num_recurrences=1,2,3,4,6,8", "--out", result,
    )  # fmt: skip
    loopwise("plot", "eval", result, "--out", picture)
    print(f"\nA plain model after the same FLOPs: {PLAIN[0]} on average ({PLAIN[1]}; not measured here).", flush=True)
    return chains, picture

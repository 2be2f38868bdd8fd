"""`loopwise calibrate MODEL OUT data=...`: a copy of MODEL that exits early, or routes by thresholds."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..arguments import RecipeParser
from ..card import copy_licences
from ..carried import CARD, MODEL_CODE, TOKENIZER_FILES, check_tokenizer_inside, copy_model_code
from ..checkpoint import config_fields, read_json, weight_files
from ..convert.calibrate import calibrate as calibrate_in_place
from ..convert.calibrate import router_table, router_thresholds, write_fields
from ..deprecated import print_warning
from ..directory import OWN, check_new, claimed, ended_by_sigterm, new_directory, record_of, write_record
from ..errors import UserError
from ..exit_rules import ExitRule
from ..find_source import find_model
from ..load import MAPPED
from ..quiet import quiet
from ..recipe import Count, Integer, Number, Section, load_recipe
from ..train.recipe.fields import BadRecords, Fraction, Strings
from ..trained import beyond_trained
from ..unused import Unused
from ..version import __version__
from .exits.table import calibration_table
from .recipe import Evaluate, as_eval

CURVE = "calibration.json"  # the measured curve, in OUT
COPIED = ("*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES, CARD)  # beside weights and licences
OLD_FORM = (
    "warning: 'loopwise calibrate MODEL TEXT', which changes MODEL, is deprecated since loopwise 0.2.0: use 'loopwise "
    "calibrate MODEL OUT data=TEXT'"
)
DATA = (
    "data", "eval_fraction", "text_field", "chat_field", "split", "subset", "bad_records", "sequence_length", "limit",
    "batch_size", "precision",
)  # fmt: skip


class Calibrate(Section):
    """The choice of an exit threshold, or of a router's thresholds."""

    data: Strings = Field(
        min_length=1,
        description="source or list of sources, like data of loopwise eval; one text file for an expert-choice router, "
        "which has no other key",
    )
    rule: ExitRule | None = Field(default=None, description="exit rule (default: that of the model's config)")
    kv_policy: str | None = Field(default=None, description="KV policy that will be served (default: the model's own)")
    budget: Number = Field(default=0.01, ge=0, description="nats a token that the loss may lie above full depth's")
    num_recurrences: Count | None = Field(default=None, description="full depth R (default: the model's own)")
    min_recurrences: Count | None = Field(
        default=None, description="recurrences before the rule may fire (default: the model's own, or 1)"
    )
    prompt_exit: bool = Field(
        default=False,
        description="measure requests with prompt_exit, in which the rule ends the prompt's positions, too",
    )
    eval_fraction: Fraction = as_eval("eval_fraction")
    text_field: str = as_eval("text_field")
    chat_field: str | None = as_eval("chat_field")
    split: str = as_eval("split")
    subset: str | None = as_eval("subset")
    bad_records: BadRecords = as_eval("bad_records")
    sequence_length: Integer = as_eval("sequence_length")
    limit: Count | None = as_eval("limit")
    batch_size: Count = Field(default=8, description="blocks or conversations that are decoded at once")
    precision: Literal["float32", "bfloat16"] = as_eval("precision")
    revision: str | None = as_eval("revision")

    def without_exits(self) -> Iterator[Unused]:
        """The keys without effect for a model with an expert-choice router."""
        for name in type(self).model_fields:
            if name not in ("data", "revision"):
                yield Unused(name, (), "an expert-choice router is calibrated on the first tokens of a text file, data")


def main(argv: list[str]) -> int:
    """Parse, measure, write OUT, print. Returns the exit code; raises UserError for bad input."""
    parser = RecipeParser(
        "calibrate",
        {
            "model": "directory or hub id of a recurrent-depth checkpoint",
            "out": f"directory to write: a copy, and {CURVE}",
        },
        Calibrate,
        "Choose the exit threshold that spends the fewest recurrences within a budget of loss, on one half of the "
        "data, and check it on the other. For an expert-choice router: choose thresholds that as many tokens pass as "
        "its capacities take, so that the model can be cached and served.",
    )
    parser.add_argument("--force", action="store_true", help="replace an OUT that Loopwise wrote")
    args = parser.parse(argv)
    out = Path(args.out).expanduser()
    if not args.settings and not args.recipe:
        quiet()
        return _old_form(args.model, args.out)
    recipe = load_recipe(Calibrate, "calibrate", args.recipe, args.settings)
    with ended_by_sigterm(), claimed(out):
        quiet()
        print(calibrate(args.model, out, recipe, args.force), flush=True)
    return 0


def _old_form(model: str, text: str) -> int:
    from ..convert.source_config import read_recurrent_config

    path = Path(model).expanduser()
    if not read_recurrent_config(path).router and not Path(text).expanduser().exists():
        raise UserError("data: name the data to calibrate on: loopwise calibrate MODEL OUT data=.. rule=..")
    router = calibrate_in_place(model, text)
    print(router_table(router))
    print(f"written: {model}/config.json (router.inference=threshold)")
    print_warning(OLD_FORM)
    return 0


def calibrate(name: str, out: Path, recipe: Calibrate, force: bool = False) -> str:
    """Write the calibrated copy `out` of the checkpoint `name`, a directory or hub id. Returns lines about the result.

    force: replace an `out` that Loopwise wrote. `out` is written whole or not at all; the checkpoint does not change.
    Raises UserError for bad input, and where no threshold stays within the budget.
    """
    from ..convert.source_config import read_recurrent_config

    model = find_model(name, recipe.revision)
    config = read_recurrent_config(model)
    files = weight_files(model)
    check_tokenizer_inside(model)
    check_new(out, model, force)
    if config.router:
        recipe.refuse_unused(recipe.without_exits())
        if len(recipe.data) > 1:
            raise UserError(f"data={','.join(recipe.data)}: a router is calibrated on one text file")
        router = router_thresholds(model, recipe.data[0], "data=")
        _write(name, model, out, files, {"router": router}, None, force)
        return f"{router_table(router)}\nwritten: {out} (router.inference=threshold)"
    found = {**measure(model, config, recipe), "model": name}
    _write(name, model, out, files, _settings(found, config), found, force)
    return f"{calibration_table(found)}\nwritten: {out} ({_told(found)}; {CURVE})"


def measure(model: Path, config: Any, recipe: Calibrate) -> dict[str, Any]:
    """The result of `exits.calibration` for `recipe`, with the facts of the data."""
    import torch

    from ..train.pretrained import load_config, load_tokenizer
    from .exits import calibration
    from .exits.bench import Bench, Decoding
    from .exits.sweep import spread_depths
    from .loss import counts, facts_of, held_out, load_weights

    rule = recipe.rule or (config.exit or {}).get("rule", "fixed")
    if rule == "fixed":
        raise UserError("rule: name the exit rule to calibrate, as rule=latent-diff; the model's own is fixed")
    asked = Evaluate(**{name: getattr(recipe, name) for name in DATA})
    sequences = held_out(str(model), asked, load_config(str(model), None), load_tokenizer(str(model), None))
    halves = calibration.halves(sequences)
    decoding = Decoding.of(recipe, config, recipe.num_recurrences or config.num_recurrences)
    if warning := beyond_trained(config.trained_recurrences, spread_depths(decoding.num_recurrences)):
        print(warning, file=sys.stderr)
    weights = load_weights(str(model), None).to(getattr(torch, recipe.precision))
    bench = Bench.open(weights, sequences, decoding, recipe.batch_size)
    facts = {"loopwise": __version__, **facts_of(str(model), weights, asked), **counts(asked, halves[0])}
    facts["check_tokens"] = counts(asked, halves[1])["tokens"]
    return {**facts, **calibration.calibrate(bench, halves, rule, recipe.budget)}


def _settings(found: dict[str, Any], config: Any) -> dict[str, Any]:
    """The fields of config.json by which the model is served as it was measured."""
    chosen, top = found["chosen"], found["num_recurrences"]
    exit = {"rule": found["rule"], "threshold": chosen["threshold"], "min_recurrences": found["min_recurrences"]}
    depths = {"num_recurrences": top, "max_recurrences": max(top, config.max_recurrences)}
    return {"exit": exit, "kv_policy": found["kv_policy"], **(depths if top != config.num_recurrences else {})}


def _write(
    name: str,
    model: Path,
    out: Path,
    files: list[Path],
    settings: dict[str, Any],
    found: dict[str, Any] | None,
    force: bool,
) -> None:
    """Write `out`: what a checkpoint needs of the directory `model`, `settings` in its config.json, the curve `found`.

    name: the checkpoint as the user named it.   files: the weights, which are linked where the file system allows it.
    Other files of `model` stay there, as optimizer states, programs and notes: an output has Loopwise's alone.
    """
    with new_directory(out, model, force) as directory:
        for file in files:
            copy_file(file, directory / file.name, link=True)
        for file in sorted({file for pattern in COPIED for file in model.glob(pattern) if file.is_file()}):
            if file.suffix == ".py" or (file.name in MAPPED and "auto_map" in read_json(file)):
                continue  # code of others, and files that name it
            target = directory / file.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target, link=False)
        copy_licences(model, directory)
        copy_file(model / "config.json", directory / "config.json", link=False)
        copy_model_code(directory)
        source = {name: x for name, x in config_fields(model)["source_config"].items() if name != "auto_map"}
        write_fields(directory / "config.json", {**settings, "source_config": source, "auto_map": MODEL_CODE})
        known = {key: value for key, value in record_of(model).items() if key not in OWN}  # of strangers, maybe
        record = {"loopwise": __version__, **known, "calibrated": {"from": name, **settings}}
        write_record(directory, record)
        if found:
            (directory / CURVE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        config_fields(directory)


def copy_file(source: Path, target: Path, link: bool) -> None:
    """Copy the file `source`, or the one that it links to; with `link`, make a hard link where that is possible."""
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, target)


def _told(found: dict[str, Any]) -> str:
    chosen = f"exit.rule={found['rule']}, exit.threshold={found['chosen']['threshold']:.3g}"
    ask = "; requests need prompt_exit=true" if found["prompt_exit"] else ""
    return f"{chosen}, kv_policy={found['kv_policy']}{ask}"

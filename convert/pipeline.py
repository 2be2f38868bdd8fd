"""`convert`: a source checkpoint and a recipe in, a recurrent-depth checkpoint out."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from loopwise.version import __version__

from ..carried import CARD
from ..checkpoint import config_fields
from ..directory import check_new, check_room, new_directory, place, unfinished, write_record
from ..find_source import HubWeights, commit_of, find_source, named
from ..gguf_source import unpacked
from ..model import RecurrentDepthConfig
from ..model.configuration_source import COLLECTING
from ..sampling import greatest_id
from .agreement import decisive
from .card import model_card
from .conversion import Conversion
from .convert_checkpoint import open_conversion
from .handle import NoParts
from .import_checkpoint import is_recurrent, open_import
from .journal import JOURNAL, describe, goes_on
from .quantised import find_method
from .recipe import ConvertRecipe
from .source import Compared
from .source_config import read_source
from .tokenizer import load_tokenizer


def convert(
    source: str | Path,
    out: str | Path,
    recipe: ConvertRecipe,
    *,
    force: bool = False,
    check: bool = True,
    dry_run: bool = False,
    resume: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Convert the checkpoint `source` (a directory, GGUF file or hub id) into a recurrent-depth checkpoint at `out`.

    `out` appears complete or not at all; `dry_run` writes nothing; the recipe is left as it is. With `resume` it goes
    on where a killed process was, and leaves what it has written where it is interrupted; the result is the same to
    the byte. Returns the facts that `loopwise.json` records. `max_dlogit` among them is the largest difference of
    logits between the written model, reloaded, and the source's own layers: 0 where they are equal bit for bit in the
    checkpoint's dtype, else in float64; `max_dlogit_by_dtype` names the dtypes. Raises UserError for a source, recipe
    or output that does not do.
    """
    recipe = recipe.model_copy()  # settle_init changes it
    found, there = find_source(str(source), recipe.revision)
    with ExitStack() as stack:
        stack.enter_context(named(str(source), found))
        if there and (recipe.influence is not None or not dry_run):
            size = check_source(found, recipe, there)
            load_tokenizer(found, str(source))
            check_new(Path(out), found, force)
            check_room(Path(out), size)
            there.fetch()
            there = None
        path = found if there else stack.enter_context(unpacked(found))
        conversion = stack.enter_context(opened(path, recipe, there))
        tokenizer = load_tokenizer(path, str(source))
        facts = _facts(str(source), commit_of(found), path, conversion, tokenizer)
        if there:  # a dry run, and no conversion of these weights has begun that could go on
            facts["notes"].append(_left_on_hub(recipe))
            check_new(Path(out), found, force)
            return facts
        identity = _identity(facts, conversion)
        same = partial(goes_on, identity=identity) if resume else None
        if dry_run:
            check_new(Path(out), found, force)
            if same:
                unfinished(place(Path(out)), same)
            return facts
        check_room(Path(out), conversion.bytes)
        with new_directory(Path(out), found, force, same) as directory:
            written = conversion.write(directory, tokenizer, show_progress, identity)
            facts["notes"] += written.notes
            facts["source"]["sha256"] = written.hashes
            facts |= conversion.finish(directory, written)
            differences = conversion.verify(directory) if check else None
            facts["max_dlogit"] = decisive(differences) if differences else None
            facts["max_dlogit_by_dtype"] = differences
            write_record(directory, facts)
            card = model_card(facts, conversion.config, path, directory)
            (directory / CARD).write_text(card, encoding="utf-8")
            (directory / JOURNAL).unlink()
    return facts


def opened(
    path: Path, recipe: ConvertRecipe, there: HubWeights | None = None, compared: Compared | None = None
) -> AbstractContextManager[Conversion]:
    """The import of a public recurrent-depth checkpoint, the conversion by `recipe` of any other.

    there: the weights of the directory `path` on the hub, where it lacks them: headers are read, and few values.
    compared: comparisons of values that another process has made.
    """
    if is_recurrent(path, recipe, there):
        return open_import(path, recipe, there)
    return open_conversion(path, recipe, there, compared)


def _facts(
    source: str, commit: str | None, path: Path, conversion: Conversion, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The facts of a conversion for loopwise.json that are known before it begins."""
    recipe = conversion.recipe
    facts: dict[str, Any] = {
        "loopwise": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "source": {"id": source, "revision": commit or recipe.revision},
        "recipe": recipe.recorded(),
        **conversion.facts,
        **({"router": conversion.config.router} if conversion.config.router else {}),
    }
    facts["notes"] = [*facts.get("notes", []), *_notes(path, conversion.config, tokenizer)]
    facts["weight_bytes"] = conversion.bytes
    facts["parameters"]["unique"] = sum(torch.Size(tensor.shape).numel() for tensor in conversion.pending)
    return facts


def check_source(path: Path, recipe: ConvertRecipe, there: HubWeights) -> int:
    """Raises UserError, as `opened` does, for a source that cannot be converted by `recipe`, before its weights, which
    are `there`, are downloaded. Returns the size of the output; 0 where values decide it, for an import, and where the
    hub gives no headers."""
    try:
        imported = is_recurrent(path, recipe, there)
        if imported or recipe.method == "fold":
            find_method(config_fields(path), path, bool(recipe.dequantize))
            if not imported:
                read_source(path)
            return 0
        with open_conversion(path, recipe.model_copy(update={"influence": None}), there) as conversion:
            return conversion.bytes
    except NoParts:
        return 0


def _identity(facts: dict[str, Any], conversion: Conversion) -> dict[str, Any]:
    """The facts in which a conversion that `--resume` goes on with has to be equal."""
    common = {name: facts[name] for name in ("recipe", "loopwise", "transformers", "torch")}
    return {**common, **describe(conversion.files, conversion.config.to_dict(), conversion.pending)}


def _left_on_hub(recipe: ConvertRecipe) -> str:
    """A line on weights that a dry run leaves on the hub."""
    looked = "" if recipe.method in (None, "fold") else ", and layers that repeat are not looked for"
    return f"the weights stay on the hub: headers are read, and the few values that the plan needs{looked}"


def _notes(path: Path, config: RecurrentDepthConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A line on each field of the source's config that is left out, and on ids without an embedding."""
    fields = config_fields(path)
    notes = [
        f"{name}=true of the source's config is left out: "
        + (
            "objectives.experts of loopwise train balances experts"
            if "router" in name
            else "a layer runs several times"
        )
        for name in COLLECTING
        if fields.get(name)
    ]
    if tokenizer is not None and (greatest := greatest_id(tokenizer)) >= config.vocab_size:
        notes.append(
            f"the tokenizer gives ids up to {greatest}, and the embeddings end at {config.vocab_size - 1}: text with "
            f"{tokenizer.convert_ids_to_tokens(greatest)!r} cannot be computed"
        )
    return notes

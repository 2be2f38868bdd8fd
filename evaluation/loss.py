"""Held-out loss, right answers, and the effect of the recurrences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..emulated import advice
from ..errors import UserError
from ..gguf_source import find_gguf, unpacked
from ..quiet import quiet
from ..trained import beyond_trained, is_beyond
from .recipe import Evaluate
from .result_file import places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .answers import Sequences


def evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    """Loss per token (nats) of `model` on the held-out data of `recipe`, at each of its depths.

    Returns {"model", "parameters", "trained_recurrences", "data", "tokens", "results": [{"num_recurrences", "loss",
    "loss_error", "perplexity", "flops_per_token", "beyond_trained"}], "loop"}. `num_recurrences` is None for a plain
    model; "loop" as from `loop_effect`. "flops_per_token" are those of a forward pass, None for a routed model.
    "trained_recurrences" are the config's, and "beyond_trained" is True for a depth beyond them. "model_path" and
    "data_names" are those of `places`.
    For conversations "tokens" counts the assistant's tokens, and "records", "answers", "group" and "guess" (of
    `guessing`) are added. Each result then has "accuracy" and "groups". An answer is right if each of its tokens is the
    likeliest one after the true tokens before it. Every "_error" is a standard error over sequences or answers, None
    for a single one. With `exit_sweep` the result is that of `exits.sweep`, with the facts of its `Decoding`.
    Raises UserError for bad input.
    """
    facts = places(model, recipe)
    if find_gguf(Path(model)) is None:
        return {**_evaluate(model, recipe), **facts}
    quiet()
    with unpacked(Path(model)) as directory:
        return {**_evaluate(str(directory), recipe), "model": model, **facts}


def _evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    from ..train.pretrained import is_recurrent, load_config, load_tokenizer

    quiet()
    config = load_config(model, recipe.revision)
    recurrent = is_recurrent(config)
    if recipe.num_recurrences and not recurrent:
        raise UserError(
            f"num_recurrences={recipe.num_recurrences}: {model} is a plain {config.model_type}, without recurrence"
        )
    if recipe.exit_sweep and not recurrent:
        raise UserError(f"exit_sweep: {model} is a plain {config.model_type}, without recurrence")
    depths = _depths(recipe, config) if recurrent else None
    if depths and (warning := beyond_trained(config.trained_recurrences, depths)):
        print(warning, file=sys.stderr)
    tokenizer = load_tokenizer(model, recipe.revision)
    sequences = held_out(model, recipe, config, tokenizer)
    if recipe.endpoint:
        from . import endpoint

        trained = getattr(config, "trained_recurrences", None)
        return endpoint.evaluate(model, recipe, sequences, tokenizer, trained)
    if recipe.engine == "lanes":
        from . import lanes

        if not recurrent:
            raise UserError(f"engine=lanes: {model} is a plain {config.model_type}, without recurrence")
        return lanes.evaluate(model, recipe, sequences, routed_by(load_weights(model, recipe.revision), recipe))
    if recipe.exit_sweep:
        return _sweep(model, recipe, sequences, config, depths or [])
    return _measure(model, recipe, sequences, config, depths)


def _depths(recipe: Evaluate, config: Any) -> list[int]:
    """The depths to measure a recurrent-depth model at."""
    from .exits.sweep import spread_depths

    default = spread_depths(config.num_recurrences) if recipe.exit_sweep else [config.num_recurrences]
    return recipe.num_recurrences or default


def facts_of(model: str, loaded: Any, recipe: Evaluate) -> dict[str, Any]:
    """The facts of the model and the data that a result begins with."""
    from ..train.pretrained import parameters

    trained = getattr(loaded.config, "trained_recurrences", None)
    return {"model": model, "parameters": parameters(loaded), "trained_recurrences": trained, "data": recipe.data}


def held_out(model: str, recipe: Evaluate, config: Any, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """The sequences of `recipe` for `model`. Raises UserError for bad data, and for ids or positions that it lacks."""
    from ..train.checks import check_length, check_vocabulary
    from ..train.data import sources
    from .answers import conversations

    recipe.refuse_unused(sources.unused(recipe.data, recipe.split, recipe.subset))
    if recipe.has_answers:
        sequences = conversations(recipe, tokenizer)
        check_length("data", max(map(len, sequences.ids)), model, config)
    else:
        check_length("sequence_length", recipe.sequence_length, model, config)
        sequences = _text(recipe, tokenizer)
    if recipe.limit:
        sequences = sequences.spread(recipe.limit)
    check_vocabulary(model, config, max(int(ids.max()) for ids in sequences.ids))
    return sequences


def _measure(
    model: str, recipe: Evaluate, sequences: Sequences, config: Any, depths: list[int] | None
) -> dict[str, Any]:
    """The result of `evaluate` for the weights of `model`. depths: None for a plain model."""
    import torch
    from tqdm import tqdm

    from ..convert.inspection import flops_per_token
    from . import result
    from .answers import accuracy
    from .depths import measure
    from .guess import guessing

    loaded = routed_by(load_weights(model, recipe.revision), recipe)
    device = loaded.device
    if line := advice(recipe.precision, device.type, "precision=float32"):
        print(line, file=sys.stderr)
    with (
        tqdm(total=len(sequences.ids), desc="eval", unit="sequence", disable=not sys.stderr.isatty()) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"),
    ):
        size = recipe.batch_size * recipe.sequence_length
        found = measure(loaded, sequences, _with_one(config, depths), size, bar.update)
    report = {**facts_of(model, loaded, recipe), **counts(recipe, sequences)}
    routed = depths is not None and bool(config.router)  # how many recurrences a token has is not measured here
    report["results"] = [
        {
            "num_recurrences": depth,
            **result.loss(found.losses[depth], found.tokens),
            **(accuracy(sequences, found.right[depth].tolist()) if recipe.has_answers else {}),
            "flops_per_token": None if routed else flops_per_token(config, depth),
            "beyond_trained": is_beyond(report["trained_recurrences"], depth),
        }
        for depth in depths or [None]
    ]
    if recipe.has_answers:
        report["guess"] = guessing(recipe, len(sequences.answers))
    report["loop"] = None if depths is None else result.loop_effect(found)
    return report


def _sweep(model: str, recipe: Evaluate, sequences: Sequences, config: Any, depths: list[int]) -> dict[str, Any]:
    """The result of `evaluate` with exit_sweep: see `exits.sweep`. It has no "loop"."""
    import torch

    from .exits.bench import Decoding
    from .exits.sweep import sweep

    decoding = Decoding.of(recipe, config, max(depths))
    loaded = load_weights(model, recipe.revision).to(getattr(torch, recipe.precision))
    report = {**facts_of(model, loaded, recipe), **counts(recipe, sequences), **vars(decoding)}
    names: list[str] = [*(recipe.exit_sweep or [])]
    return report | sweep(loaded, sequences, decoding, names, depths, recipe.thresholds, recipe.batch_size)


def load_weights(model: str, revision: str | None) -> Any:
    """The model `model` on the accelerator, if there is one."""
    import torch

    from ..train.pretrained import load_model

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return load_model(model, revision).to(device)  # pyright: ignore[reportArgumentType]


def routed_by(loaded: Any, recipe: Evaluate) -> Any:
    """`loaded`, whose router takes tokens by `recipe.router_inference`. Raises UserError for another model."""
    if recipe.router_inference:
        router = getattr(loaded.config, "router", None)
        if not router or router["kind"] != "expert":
            raise UserError(f"router_inference={recipe.router_inference}: this model has no expert-choice router")
        router["inference"] = recipe.router_inference
    return loaded


def counts(recipe: Evaluate, sequences: Sequences) -> dict[str, Any]:
    """Numbers of tokens, and for conversations of records and answers."""
    if not recipe.has_answers:
        return {"tokens": sum(map(len, sequences.ids))}
    found = {"tokens": sum(int(learned[1:].sum()) for learned in sequences.learned), "records": len(sequences.ids)}
    return {**found, "answers": len(sequences.answers), "group": recipe.group}


def _text(recipe: Evaluate, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Packed blocks of the text; all tokens count."""
    import numpy as np

    from ..train.data import blocks, packing
    from ..train.recipe import Data
    from .answers import Sequences

    keys = {key: getattr(recipe, key) for key in ("text_field", "split", "subset", "bad_records", "sequence_length")}
    corpus = blocks.read(recipe.data, Data(train=recipe.data, **keys), tokenizer)
    tokens = corpus.tokens
    if recipe.eval_fraction:
        tokens = tokens[packing.split(corpus, recipe.eval_fraction)[1]]
    ids = list(packing.pack(tokens, recipe.sequence_length, "data").astype(np.int64))
    return Sequences(ids, [np.ones(len(block), bool) for block in ids], [])


def _with_one(config: Any, depths: list[int] | None) -> list[int] | None:
    """`depths` and, if the model can run it, R=1 for comparison. None for a plain model."""
    if depths is None:
        return None
    always = [] if (config.router or {}).get("kind") == "token" else [1]
    return sorted({*depths, *always})

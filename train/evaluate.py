"""`loopwise eval MODEL data=...`: held-out loss per token at several recurrences."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from loopwise.arguments import RecipeParser
from loopwise.errors import UserError
from loopwise.gguf_source import find_gguf, unpacked
from loopwise.quiet import quiet
from loopwise.recipe import load_recipe
from loopwise.trained import beyond_trained

from .recipe import Data, Evaluate


def main(argv: list[str]) -> int:
    """Measure and print."""
    operands = {"model": "model directory, hub id, or GGUF file"}
    parser = RecipeParser("eval", operands, Evaluate, "Held-out loss per token at several recurrences.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse(argv)
    recipe = load_recipe(Evaluate, "eval", args.recipe, args.settings)
    result = evaluate(args.model, recipe)
    print(json.dumps(result) if args.json else table(result))
    return 0


def evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    """Loss per token (nats) of `model` on the text of `recipe`, at each of its depths.

    Returns {"model", "parameters", "data", "tokens", "results": [{"num_recurrences", "loss", "perplexity"}]};
    `num_recurrences` is None for a plain model. Raises UserError for bad input.
    """
    if find_gguf(Path(model)) is None:
        return _evaluate(model, recipe)
    quiet()
    with unpacked(Path(model)) as directory:
        return {**_evaluate(str(directory), recipe), "model": model}


def _evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from . import sources
    from .measure import held_out_loss
    from .pretrained import is_recurrent, load_config, load_model, parameters
    from .run import check_length, check_vocabulary

    quiet()
    recipe.refuse_unused(sources.unused(recipe.data, recipe.split, recipe.subset))
    config = load_config(model, recipe.revision)
    if recipe.num_recurrences and not is_recurrent(config):
        raise UserError(
            f"num_recurrences={recipe.num_recurrences}: {model} is a plain {config.model_type}, without recurrence"
        )
    depths = recipe.num_recurrences or [config.num_recurrences if is_recurrent(config) else None]
    if is_recurrent(config) and (said := beyond_trained(config.trained_recurrences, depths)):
        print(said, file=sys.stderr)
    check_length("sequence_length", recipe.sequence_length, model, config)
    blocks = _blocks(model, recipe)
    check_vocabulary(model, config, int(blocks.tokens.max()))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded: Any = load_model(model, recipe.revision).to(device)  # pyright: ignore[reportArgumentType]
    results = []
    with (
        tqdm(total=len(blocks) * len(depths), desc="eval", unit="block", disable=not sys.stderr.isatty()) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"),
    ):
        for depth in depths:
            total, count = held_out_loss(loaded, blocks, depth, recipe.batch_size, report=bar.update)
            loss = total.item() / count.item()
            results.append({"num_recurrences": depth, "loss": loss, "perplexity": math.exp(min(loss, 700))})
    return {
        "model": model,
        "parameters": parameters(loaded),
        "data": recipe.data,
        "tokens": blocks.tokens.size,
        "results": results,
    }


def _blocks(model: str, recipe: Evaluate) -> Any:
    import numpy as np

    from . import data
    from .pretrained import load_tokenizer

    keys = {key: getattr(recipe, key) for key in ("text_field", "split", "subset", "sequence_length")}
    tokenizer = load_tokenizer(model, recipe.revision)
    corpus = data.read(recipe.data, Data(train=recipe.data, **keys), tokenizer)
    tokens = corpus.tokens[data.split(corpus, recipe.eval_fraction)[1]] if recipe.eval_fraction else corpus.tokens
    blocks = data.pack(tokens, recipe.sequence_length, "data")
    return data.Packed(blocks, np.full(blocks.shape, data.LEARN, np.uint8), separate=False)


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` for people."""
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, {result['tokens']:,} held-out tokens",
        f"{'recurrences':>11}  {'loss':>8}  {'perplexity':>10}",
    ]
    for row in result["results"]:
        depth = "-" if row["num_recurrences"] is None else row["num_recurrences"]
        lines.append(f"{depth:>11}  {row['loss']:>8.4f}  {row['perplexity']:>10.2f}")
    return "\n".join(lines)

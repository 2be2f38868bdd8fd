"""`loopwise eval MODEL data=...`: held-out loss, right answers, and what the recurrences change."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.arguments import RecipeParser
from loopwise.directory import check_file, new_file
from loopwise.errors import UserError
from loopwise.gguf_source import find_gguf, unpacked
from loopwise.quiet import quiet
from loopwise.recipe import load_recipe
from loopwise.trained import beyond_trained

from .recipe import Data, Evaluate

if TYPE_CHECKING:
    import numpy as np

    from .answers import Sequences
    from .depths import Measured

FEW = 8  # sequences: with fewer, a standard error says little
NO_CHANGE = (
    "the recurrences change nothing: R=1 and R={} agree within noise; this model supports no claim about depth, exits "
    "or waves"
)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = RecipeParser(
        "eval",
        {"model": "model directory, hub id, or GGUF file"},
        Evaluate,
        "Held-out loss per token, and of conversations the share of right answers, at several recurrences.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object there, too: loopwise plot eval draws it")
    args = parser.parse(argv)
    recipe = load_recipe(Evaluate, "eval", args.recipe, args.settings)
    out = Path(args.out).expanduser() if args.out else None
    if out:
        check_file(out)
        _check_result(out)
    result = evaluate(args.model, recipe)
    print(json.dumps(result) if args.json else table(result), flush=True)  # first: it is not lost where FILE cannot be
    if out:
        try:
            with new_file(out) as partial:
                partial.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}") from None
    return 0


def _check_result(file: Path) -> None:
    """Raise UserError where `file` holds something else than a result: the data, for one, or a model's config.json."""
    if not file.is_file() or not file.stat().st_size:
        return
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "results" in found:
            return
    raise UserError(f"--out {file} is there and holds no result of loopwise eval; name another file")


def evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    """Loss per token (nats) of `model` on the held-out data of `recipe`, at each of its depths.

    Returns {"model", "parameters", "data", "tokens", "results": [{"num_recurrences", "loss", "loss_error",
    "perplexity"}], "loop"}; `num_recurrences` is None for a plain model, `loop` as `_loop`. Of conversations `tokens`
    are those that the assistant says; "records", "answers" and "group" stand beside them, and in each result
    "accuracy" (share of answers of which every token is the likeliest one, after the true ones before), and "groups".
    Every "_error" is a standard error over sequences or answers, None for one alone. Raises UserError for bad input.
    """
    if find_gguf(Path(model)) is None:
        return _evaluate(model, recipe)
    quiet()
    with unpacked(Path(model)) as directory:
        return {**_evaluate(str(directory), recipe), "model": model}


def _evaluate(model: str, recipe: Evaluate) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from . import depths, sources
    from .answers import accuracy, conversations
    from .pretrained import is_recurrent, load_config, load_model, load_tokenizer, parameters
    from .run import check_length, check_vocabulary

    quiet()
    recipe.refuse_unused(sources.unused(recipe.data, recipe.split, recipe.subset))
    config = load_config(model, recipe.revision)
    recurrent = is_recurrent(config)
    if recipe.num_recurrences and not recurrent:
        raise UserError(
            f"num_recurrences={recipe.num_recurrences}: {model} is a plain {config.model_type}, without recurrence"
        )
    asked = (recipe.num_recurrences or [config.num_recurrences]) if recurrent else None
    if asked and (said := beyond_trained(config.trained_recurrences, asked)):
        print(said, file=sys.stderr)
    tokenizer = load_tokenizer(model, recipe.revision)
    if recipe.asks:
        sequences = conversations(recipe, tokenizer)
        check_length("data", max(map(len, sequences.ids)), model, config)
    else:
        check_length("sequence_length", recipe.sequence_length, model, config)
        sequences = _text(recipe, tokenizer)
    if recipe.limit:
        sequences = sequences.spread(recipe.limit)
    if recipe.endpoint:
        from .endpoint import evaluate as ask

        return ask(model, recipe, sequences, tokenizer)
    check_vocabulary(model, config, max(int(ids.max()) for ids in sequences.ids))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded: Any = load_model(model, recipe.revision).to(device)  # pyright: ignore[reportArgumentType]
    with (
        tqdm(total=len(sequences.ids), desc="eval", unit="sequence", disable=not sys.stderr.isatty()) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"),
    ):
        size = recipe.batch_size * recipe.sequence_length
        found = depths.measure(loaded, sequences, _depths(config, asked), size, bar.update)
    result: dict[str, Any] = {"model": model, "parameters": parameters(loaded), "data": recipe.data}
    if recipe.asks:
        result |= {"tokens": int(found.tokens.sum()), "records": len(sequences.ids)}
        result |= {"answers": len(sequences.answers), "group": recipe.group}
    else:
        result["tokens"] = sum(map(len, sequences.ids))
    result["results"] = [
        {
            "num_recurrences": depth,
            **_loss(found.losses[depth], found.tokens),
            **(accuracy(sequences, found.right[depth].tolist()) if recipe.asks else {}),
        }
        for depth in asked or [None]
    ]
    result["loop"] = _loop(found) if recurrent else None
    return result


def _text(recipe: Evaluate, tokenizer: Any) -> Sequences:
    """Packed blocks of the text, all of whose tokens count."""
    import numpy as np

    from . import data
    from .answers import Sequences

    keys = {key: getattr(recipe, key) for key in ("text_field", "split", "subset", "bad_records", "sequence_length")}
    corpus = data.read(recipe.data, Data(train=recipe.data, **keys), tokenizer)
    tokens = corpus.tokens[data.split(corpus, recipe.eval_fraction)[1]] if recipe.eval_fraction else corpus.tokens
    blocks = list(data.pack(tokens, recipe.sequence_length, "data").astype(np.int64))
    return Sequences(blocks, [np.ones(len(block), bool) for block in blocks], [])


def _depths(config: Any, asked: list[int] | None) -> list[int] | None:
    """The depths to measure: those asked for, and one recurrence to compare them with, where the model can run it."""
    if asked is None:
        return None
    always = [] if (config.router or {}).get("kind") == "token" else [1]
    return sorted({*asked, *always})


def _loss(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    loss = float(losses.sum() / tokens.sum())
    return {
        "loss": loss,
        "loss_error": _standard_error(losses, tokens),
        "perplexity": math.exp(min(loss, 700)),
    }


def _standard_error(sums: np.ndarray, tokens: np.ndarray) -> float | None:
    """Of a mean per token, over sequences with these sums and numbers of tokens (a ratio of two means)."""
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - tokens * (sums.sum() / tokens.sum())
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / tokens.sum())


def _loop(found: Measured) -> dict[str, Any]:
    """The change by recurrences: {"num_recurrences": the most that were measured, "gain": loss at R=1 less that at it,
    "gain_error": its standard error, paired, "changes_nothing": whether the gain is within two of these (None where
    that cannot be told), "state_norm": |s_r| from r = 1 on, "state_change": |s_r - s_{r-1}| / |s_r| from r = 2 on}."""
    depths = [depth for depth in found.losses if depth is not None]
    top = max(depths)
    gain = error = nothing = None
    if min(depths) < top:
        difference = found.losses[1] - found.losses[top]
        gain = float(difference.sum() / found.tokens.sum())
        error = _standard_error(difference, found.tokens)
        nothing = None if error is None or len(difference) < FEW else abs(gain) <= 2 * error
    return {
        "num_recurrences": top,
        "gain": gain,
        "gain_error": error,
        "changes_nothing": nothing,
        "state_norm": found.norm,
        "state_change": found.change,
    }


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` for people."""
    if "endpoint" in result:
        from .endpoint import table as asked

        return asked(result)
    asks = "answers" in result
    counted = (
        f"{result['answers']:,} answers, {result['tokens']:,} tokens"
        if asks
        else f"{result['tokens']:,} held-out tokens"
    )
    lines = [f"{result['model']}: {result['parameters']:,} parameters, {counted}"]
    groups = list(result["results"][0]["groups"]) if asks else []
    if groups:
        lines.append(f"right answers in %, by {result['group']}")
    head = f"{'recurrences':>11}  {'loss':>8}  {'perplexity':>10}"
    width = max(5, *map(len, groups)) if groups else 5
    lines.append(head + ("  " + " ".join(f"{name:>{width}}" for name in [*groups, "all"]) if asks else ""))
    for row in result["results"]:
        depth = "-" if row["num_recurrences"] is None else row["num_recurrences"]
        line = f"{depth:>11}  {row['loss']:>8.4f}  {row['perplexity']:>10.2f}"
        if asks:
            shares = [*(row["groups"][name]["accuracy"] for name in groups), row["accuracy"]]
            line += "  " + " ".join(f"{100 * share:>{width}.1f}" for share in shares)
        lines.append(line)
    return "\n".join(lines + (_loop_lines(result["loop"]) if result["loop"] else []))


def _loop_lines(loop: dict[str, Any]) -> list[str]:
    top, lines = loop["num_recurrences"], []
    if loop["gain"] is not None:
        error = "" if loop["gain_error"] is None else f" ± {loop['gain_error']:.4f}"
        lines.append(f"loss at R=1 less that at R={top}: {loop['gain']:.4f}{error}")
    for name, key in (("|s_r|", "state_norm"), ("|s_r - s_(r-1)| / |s_r|", "state_change")):
        if loop[key]:
            first = 1 if key == "state_norm" else 2
            lines.append(f"{name}, r = {first} ..: {' '.join(f'{value:.3g}' for value in loop[key])}")
    if loop["changes_nothing"]:
        lines.append(NO_CHANGE.format(top))
    return lines

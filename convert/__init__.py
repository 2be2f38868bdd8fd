"""Conversion of pretrained decoders and import of public checkpoints: `convert(source, out, recipe)`.

Files in reading order, each importing only those above it:

    recipe.py                the keys of a convert recipe
    plan.py                  the source layers that each layer of the new model is made from
    dtypes.py                types of weights by their names
    double.py                computation in float64
    agreement.py             differences of logits: rounding, or a fault
    architectures.py         supported source architectures
    text_model.py            the text model inside of a multimodal one
    source_config.py         configs of sources, and their empty models
    handle.py                open weight files
    quantisation.py          ways of quantisation
    quantised.py             quantised tensors, dequantised one at a time
    pieces.py                a tensor as its files hold it, in one piece or several
    source.py                weights by their names in the transformers model
    repeats.py               layers of a source that repeat
    raw.py                   weights by their names on disk
    hashes.py                sha256 of the source's files
    finished.py              an OUT that need not be made again
    stream.py                models that hold one module's weights at a time
    tokenizer.py             the source's tokenizer, written and compared
    generation.py            generation_config.json, in a form that can be saved
    pending.py               tensors to be made, in units of work
    published.py             a plain model's tensors as transformers saves them
    shards.py                safetensors files, laid out before they are filled
    journal.py               units that are written, for --resume
    workers.py               worker processes
    write.py                 tensors into shards, in one process or several
    device.py                where averages and SVDs are computed
    relax.py                 LoRA factors, and parameters of each depth
    tensors.py               every tensor of a conversion
    influence.py             block influence of the source's layers
    expected.py              written tensors against the plan's
    verify.py                written model against the source's layers
    formats/                 public recurrent-depth checkpoint formats
    conversion.py            the base of the two kinds of conversion
    convert_checkpoint.py    conversion by a recipe
    import_checkpoint.py     import of a public checkpoint
    inspection.py            `loopwise inspect`
    card.py                  the model card
    pipeline.py              `convert`, from source to directory
    worker.py                one worker process
    unrolled.py              a fixed depth as a plain model
    export.py                `loopwise export`
    calibrate.py             thresholds of an expert-choice router
    command.py               `loopwise convert`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import ConvertRecipe

if TYPE_CHECKING:
    from .pipeline import convert

__all__ = ["ConvertRecipe", "convert"]


def __getattr__(name: str) -> Any:
    """`convert` is imported when it is first used: it needs torch, and `--help` does not."""
    if name == "convert":
        from .pipeline import convert

        return convert
    raise AttributeError(f"module 'loopwise.convert' has no attribute {name!r}")

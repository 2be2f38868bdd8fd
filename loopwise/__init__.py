"""Loopwise: convert a pretrained decoder into a recurrent-depth model, retrain it, serve it.

Importing `loopwise` is cheap; the model classes load torch and transformers on first use. Files in reading order; a
file imports only files above it:

    version.py        the release
    errors.py         UserError: one line, exit 2
    bounded.py        limits of time and memory for a program in a file
    streams.py        stdout and stderr that end no command
    process.py        a server's processes end with it
    caches.py         private caches of compiled code
    quiet.py          less chatter of libraries
    emulated.py       advice for CPUs without units for bfloat16
    deprecated.py     old names of keys
    unused.py         settings without effect
    aliases.py        YAML whose aliases multiply
    recipe.py         recipes: YAML files and key=value settings
    recipe_schema.py  JSON schemas of recipes, for editors
    hub.py            ids of the Hugging Face hub
    input_files.py    regular files alone, inside of their directory
    carried.py        files that travel with a checkpoint
    card.py           metadata of model cards
    disk.py           writes that reach the disk, checksums, a disk's errors in words
    foreign.py        files of others among ours
    lock.py           one writer of a directory at a time
    directory.py      output directories: written whole or not at all
    sampling.py       ranges of sampling parameters
    exit_rules.py     names of the exit rules
    trained.py        depths beyond those that a model was trained at
    diagnosis.py      states and gain by recurrence, and lines on what is wrong
    candidates.py     answers to TAB
    arguments.py      command-line arguments
    completion.py     loopwise completion
    active.py         parameters that take part in a token's pass
    unroll.py         layers of a recurrent model as a plain one's
    model/            the recurrent-depth model, which travels with checkpoints
    config_limits.py  values of a config that are refused
    checkpoint.py     reading a checkpoint directory
    gguf_header.py    a GGUF file's header
    gguf_config.py    its config
    gguf_source.py    a GGUF file as a source
    gguf_tensors.py   its tensors
    find_source.py    a directory, a GGUF file, or a download from the hub
    model_index.py    results of loopwise eval as metadata of a card
    push.py           a finished OUT, uploaded to the hub
    load.py           configs, tokenizers and models, loaded without code of theirs
    convert/          loopwise convert, export, inspect
    train/            loopwise train, init
    serve/            loopwise serve, generate
    evaluation/       loopwise eval, plot, calibrate
    recipes/          recipes that come with loopwise
    cli.py            the command `loopwise`
    demo/             the main job end to end
    __main__.py       python -m loopwise
"""

from typing import TYPE_CHECKING

from .version import __version__

__all__ = ["RecurrentDepthConfig", "RecurrentDepthForCausalLM", "__version__"]

if TYPE_CHECKING:
    from .model import RecurrentDepthConfig, RecurrentDepthForCausalLM


def __getattr__(name: str):
    if name in ("RecurrentDepthConfig", "RecurrentDepthForCausalLM"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module 'loopwise' has no attribute {name!r}")

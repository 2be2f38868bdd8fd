"""`loopwise init TOKENIZER OUT`: an untrained plain Llama, to train from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pydantic import Field, model_validator

from loopwise.arguments import RecipeParser
from loopwise.carried import check_tokenizer_inside
from loopwise.directory import claimed, new_directory, write_record
from loopwise.errors import UserError
from loopwise.quiet import quiet
from loopwise.recipe import Count, Integer, Number, Section, load_recipe
from loopwise.version import __version__

from . import tasks


class Init(Section):
    """Sizes and initialisation of an untrained Llama, named as in its transformers config."""

    num_hidden_layers: Count = Field(default=2, description="layers")
    hidden_size: Count = Field(default=128, description="width")
    intermediate_size: Count | None = Field(default=None, description="width of the MLP (default: 2 x hidden_size)")
    num_attention_heads: Count = Field(default=4, description="attention heads")
    num_key_value_heads: Count | None = Field(
        default=None, description="key and value heads (default: num_attention_heads)"
    )
    max_position_embeddings: Count = Field(default=256, description="longest sequence in tokens")
    tie_word_embeddings: bool = Field(default=True, description="use the embedding matrix as the head")
    initializer_range: Number = Field(default=0.08, gt=0, description="standard deviation of the weights")
    embedding_range: Number = Field(default=0.3, gt=0, description="standard deviation of the embeddings")
    revision: str | None = Field(default=None, description="revision of TOKENIZER when it is a hub id")
    seed: Integer = Field(default=0, ge=0, lt=2**32, description="seed of the weights")

    @model_validator(mode="after")
    def _consistent(self) -> Init:
        heads, shared = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size={self.hidden_size} is not 2 x num_attention_heads={heads} x a whole number")
        if heads % shared:
            raise ValueError(f"num_key_value_heads={shared} does not divide num_attention_heads={heads}")
        return self


def main(argv: list[str]) -> int:
    """Write the model. Returns the exit code; raises UserError for bad input."""
    operands = {
        "tokenizer": "task:NAME for the tokenizer of a generated task, or a directory or hub id with a tokenizer",
        "out": "directory for the model",
    }
    parser = RecipeParser("init", operands, Init, "Write an untrained plain Llama with a tokenizer.")
    parser.add_argument("--force", action="store_true", help="replace an OUT that Loopwise wrote")
    args = parser.parse(argv)
    recipe = load_recipe(Init, "init", args.recipe, args.settings)
    with claimed(Path(args.out)):
        count = init(args.tokenizer, Path(args.out).expanduser(), recipe, args.force)
    print(f"untrained model of {count:,} parameters written to {args.out}")
    return 0


def init(tokenizer: str, out: Path, recipe: Init, force: bool = False) -> int:
    """Write an untrained model and the tokenizer into `out`. Returns the number of parameters.

    force: replace an `out` that Loopwise wrote. Sets torch's seed. Raises UserError for a tokenizer that cannot be
    loaded or has no EOS token, and if `out` may not be written.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .pretrained import load_tokenizer, parameters

    quiet()
    if tasks.is_task(tokenizer):
        loaded = tasks.tokenizer(tasks.parse(tokenizer).name)
    else:
        check_tokenizer_inside(Path(tokenizer))
        loaded = load_tokenizer(tokenizer, recipe.revision)
    if loaded.eos_token_id is None:
        raise UserError(f"{tokenizer}: the tokenizer has no EOS token, which ends every document; set its eos_token")
    fields = recipe.model_dump(exclude={"embedding_range", "revision", "seed"})
    fields["intermediate_size"] = recipe.intermediate_size or 2 * recipe.hidden_size
    fields["num_key_value_heads"] = recipe.num_key_value_heads or recipe.num_attention_heads
    special = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    source = None if tasks.is_task(tokenizer) else Path(tokenizer)
    with new_directory(out, source, force) as directory:
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **fields, **special))
        torch.nn.init.normal_(cast(Any, model.get_input_embeddings()).weight, std=recipe.embedding_range)
        model.save_pretrained(directory)
        loaded.save_pretrained(directory)
        facts = {"loopwise": __version__, "tokenizer": tokenizer, "init": recipe.model_dump()}
        write_record(directory, facts)
    return parameters(model)

"""`loopwise generate MODEL [key=value ...]`: continue prompts with the offline engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..arguments import RecipeParser
from ..checkpoint import weight_files
from ..emulated import advice
from ..errors import UserError
from ..exit_rules import CHOICES
from ..find_source import find_model
from ..quiet import quiet
from ..recipe import Count, Integer, Number, Section, load_recipe
from ..sampling import SETTINGS
from ..unused import Unused
from .api.generation_config import FILE, fields_of, sampling_of
from .checkpoint import read_fields


class GenerateRecipe(Section):
    """Keys of `loopwise generate`."""

    prompt: str | None = Field(None, description="one prompt; without, every line of the standard input is one")
    max_tokens: Count | None = Field(
        None, description="tokens to generate (default: max_new_tokens of generation_config.json, or 64)"
    )
    num_recurrences: Count | None = Field(None, description="R (default: the model's)")
    max_recurrences: Count | None = Field(
        None, description="greatest R, for which keys and values get memory (default: the model's)"
    )
    min_recurrences: Count | None = Field(None, description="recurrences before the exit rule may fire")
    exit_rule: str | None = Field(
        None, description=f"test after which a token exits: {CHOICES} (default: the model's, or fixed)"
    )
    exit_threshold: Number | None = Field(None, description="of the exit rule (default: the rule's own)")
    prompt_exit: bool = Field(False, description="let the rule end prompt tokens, too")
    kv_policy: str | None = Field(None, description="which recurrences keep keys and values (default: the model's)")
    decoder: Literal["plain", "wave", "diffusion"] = Field(
        "plain", description="wave: several tokens in flight, the same text; diffusion: refined together"
    )
    max_in_flight: Count | Literal["auto"] = Field(
        8, description="most tokens in flight, in a wave or a diffusion; auto: as many as a wave can use"
    )
    draft_every: Count | Literal["auto"] | None = Field(
        None, description="recurrences between read-outs of a wave's token; auto: by measured acceptance; default 1"
    )
    draft_depths: list[Count] | None = Field(
        None, description="depths at which a wave's token is read out, in place of draft_every"
    )
    temperature: Number | None = Field(
        None, description="0 is greedy (default: generation_config.json's, as for the next three; or 0)"
    )
    top_p: Number | None = Field(None, description="share of the probability that is sampled from")
    top_k: Integer | None = Field(None, description="tokens that are sampled from; 0: all")
    min_p: Number | None = Field(None, description="least probability, as a share of the likeliest token's")
    repetition_penalty: Number | None = Field(
        None, description="above 1: against tokens of prompt and text (default: generation_config.json's, or 1)"
    )
    presence_penalty: Number | None = Field(
        None, description="above 0: against tokens of the text (default as before, or 0)"
    )
    frequency_penalty: Number | None = Field(
        None, description="above 0: against tokens of the text, each time (default as before, or 0)"
    )
    seed: Integer = Field(0, ge=0, lt=2**62, description="of random sampling")
    max_num_seqs: Count = Field(16, description="prompts in the engine at once")
    max_model_len: Count | None = Field(
        None,
        description="greatest number of tokens of prompt and continuation (default: 1024, or all that the model has)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of weights and KV cache")
    revision: str | None = Field(None, description="branch, tag or commit of MODEL when it is a hub id")
    logprobs: Integer | None = Field(
        None, ge=0, le=20, description="log-probabilities of each token and of so many likeliest ones, in the details"
    )
    details: bool = Field(False, description="print JSON lines, with tokens, their depths and core passes")

    @field_validator(*SETTINGS)
    @classmethod
    def _in_range(cls, value: float | None, field: ValidationInfo) -> float | None:
        """The ranges of `loopwise.sampling`, as for every engine."""
        holds, rule = SETTINGS[str(field.field_name)]
        if value is not None and not holds(value):
            raise ValueError(rule)
        return value

    def unused(self) -> Iterator[Unused]:
        if self.decoder == "plain":
            yield Unused(
                "max_in_flight", ("decoder",), "decoder=plain has one token in flight; choose wave or diffusion"
            )
        if self.decoder != "wave":
            for name in ("draft_every", "draft_depths"):
                yield Unused(name, ("decoder",), f"decoder={self.decoder} drafts nothing; choose wave")
        if not self.details:
            yield Unused("logprobs", ("details",), "details=false prints text alone; set details=true")
        if self.temperature == 0:
            yield from self.without_draws(("temperature",))
        if self.exit_rule == "fixed":
            yield from self.without_exits(("exit_rule",))

    def without_draws(self, switches: tuple[str, ...] = ()) -> Iterator[Unused]:
        """The keys without effect in greedy decoding."""
        for name in ("top_p", "top_k", "min_p", "seed"):
            yield Unused(name, switches, "temperature=0 draws nothing; set a temperature")

    def without_exits(self, switches: tuple[str, ...] = ()) -> Iterator[Unused]:
        """The keys without effect where all tokens run at the same depth."""
        why = "exit_rule is fixed, so all tokens run at the same depth; choose an exit_rule"
        for name in ("exit_threshold", "min_recurrences", "prompt_exit"):
            yield Unused(name, switches, why)
        if self.kv_policy == "last-exited":
            yield Unused("kv_policy", switches, why)


def main(argv: list[str]) -> int:
    """Read prompts, print continuations. Returns the exit code."""
    operands = {"model": "directory or hub id of a recurrent-depth checkpoint"}
    parser = RecipeParser("generate", operands, GenerateRecipe, "Continue prompts on this machine, without a server.")
    args = parser.parse(argv)
    recipe = load_recipe(GenerateRecipe, "generate", args.recipe, args.settings)
    folder = find_model(args.model, recipe.revision)
    fields = read_fields(folder)
    if recipe.exit_rule is None and (fields.get("exit") or {}).get("rule", "fixed") == "fixed":
        recipe.refuse_unused(recipe.without_exits())
    weight_files(folder)
    if recipe.temperature is None and not sampling_of(fields_of(folder)).get("temperature"):
        recipe.refuse_unused(recipe.without_draws())
    prompts = [recipe.prompt] if recipe.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty: give prompt=..., or one prompt a line on the standard input")
    quiet()
    from .offline import Engine, Params

    def warn(line: str) -> None:
        print(f"loopwise: {line}", file=sys.stderr, flush=True)

    depths = tuple(recipe.draft_depths or ())
    names = set(Params.__dataclass_fields__) & set(GenerateRecipe.model_fields)
    given: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    params = Params(**{**given, "draft_depths": depths})
    engine = Engine(
        folder,
        max_num_seqs=min(recipe.max_num_seqs, len(prompts)),
        max_model_len=recipe.max_model_len,
        kv_policy=recipe.kv_policy,
        max_recurrences=recipe.max_recurrences,
        max_in_flight=recipe.max_in_flight if recipe.decoder != "plain" else 1,
        dtype=recipe.dtype,
        tell=warn,
    )
    if line := advice(str(engine.model.dtype), engine.model.device.type, "dtype=float32"):
        warn(line)
    engine.request(params)  # raises UserError for wrong ones before any other line is printed
    if taken := [n for n in engine.defaults if getattr(recipe, n) is None]:
        applied = ", ".join(f"{name}={engine.defaults[name]}" for name in taken)
        warn(f"{FILE}: {applied} (keys of the command win; temperature=0 is greedy)")
    used = params.filled(engine.defaults)
    sampling = {name: getattr(used, name) for name in (*SETTINGS, "seed", "max_tokens")}
    completions = engine.generate(prompts, params)
    for prompt, done in zip(prompts, completions, strict=True):
        facts: dict[str, Any] = {"prompt": prompt, **vars(done), "sampling": sampling}
        facts["logprobs"] = [each._asdict() for each in done.logprobs]
        if recipe.logprobs is None:
            del facts["logprobs"]
        print(json.dumps(facts) if recipe.details else f"{prompt}{done.text}", flush=True)
        if done.error:
            warn(f"a prompt ended by an error, {prompt[:40]!r}: {done.error}")
    return int(any(done.error for done in completions))

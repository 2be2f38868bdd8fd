"""One of twelve requests meets an exception: it ends by an error, and the others' tokens stay as they are."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.serve import Completion, Engine, Params
from loopwise.serve.engine import sampling, transitions
from loopwise.serve.engine.sampling import Draws
from loopwise.serve.generate import main
from tests.helpers.engines import build
from tests.helpers.tiny import tokenizer

POISON = 7  # the request that meets the fault
MARK = 0.8125  # its temperature, which no other request has, and a float32 holds
SEED = 4242
PROMPT = [9, 8, 7, 6, 5]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"exit_rule": "latent-diff", "exit_threshold": 0.5},
    {"decoder": "wave", "max_in_flight": 3},
    {"repetition_penalty": 1.25},
]


class Poison(Exception):
    """An exception that no code of ours raises or catches by name."""


def before(function: Callable[..., Any], wrong: Callable[..., Any], error: type[Exception] = Poison) -> Any:
    """`function`, which raises where `wrong` holds of its arguments."""

    def call(*args: Any, **options: Any) -> Any:
        if bool(wrong(*args, **options)):
            raise error("of this request")
        return function(*args, **options)

    return call


def after(function: Callable[..., Any], wrong: Callable[..., Any]) -> Any:
    """As `before`, once `function` has done its work."""

    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if bool(wrong(*args, **options)):
            raise Poison("of this request")
        return result

    return call


def marked(name: str, at: int) -> Callable[..., Any]:
    """The argument number `at`, a tensor, has the mark."""
    return lambda *args, **_: (args[at] == MARK).any()


def of_noise(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return (seed == SEED).any()


def late_noise(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return ((seed == SEED) & (position > len(PROMPT) + 2)).any()


def request_of(state: Any, row: int, request: Any, *_: Any) -> bool:
    return request.max_tokens == 11


class Decoder:
    """The tokenizer, whose `decode` fails for the tokens of one request, at its end or while a stop is looked for."""

    def __init__(self, real: Any, tokens: list[int], at_end: bool):
        self.real, self.tokens, self.at_end = real, tokens, at_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        if bool(options) == self.at_end and len(tokens) > 2 and tokens == self.tokens[: len(tokens)]:
            raise Poison("of this request")
        return self.real.decode(tokens, **options)


def in_module(module: Any, name: str, change: Callable[..., Any], *args: Any) -> Callable[..., None]:
    return lambda patch, engine, want: patch.setattr(module, name, change(getattr(module, name), *args))


def in_rules(patch: Any, engine: Engine, want: Completion) -> None:
    patch.setattr(engine.loop.rules, "use", before(engine.loop.rules.use, lambda names: "cosine" in names))


def in_decode(at_end: bool) -> Callable[..., None]:
    return lambda patch, engine, want: patch.setattr(
        engine, "tokenizer", Decoder(engine.tokenizer, want.tokens, at_end)
    )


ADMIT = transitions.requests
FAULTS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {  # name -> (the change, the poisoned request's params)
    "admission to the sampler": (
        in_module(Draws, "admit", before, lambda self, row, temperature, *_: temperature == MARK),
        {"temperature": MARK},
    ),
    "admission with penalties": (
        in_module(Draws, "penalise", before, lambda self, row, prompt, length, repetition, *_: repetition == MARK),
        {"repetition_penalty": MARK},
    ),
    "admission, nothing written": (in_module(ADMIT, "admit", before, request_of), {"max_tokens": 11}),
    "admission, all written": (in_module(ADMIT, "admit", after, request_of), {"max_tokens": 11}),
    "admission, last line": (in_rules, {"exit_rule": "cosine", "exit_threshold": 0.3}),
    "noise": (in_module(sampling, "waiting_times", before, of_noise), {"temperature": 1.0, "seed": SEED}),
    "noise of a later token": (
        in_module(sampling, "waiting_times", before, late_noise),
        {"temperature": 1.0, "seed": SEED},
    ),
    "cuts": (in_module(sampling, "sample", before, marked("temperature", 2)), {"temperature": MARK, "top_k": 9}),
    "no memory for a draw": (
        in_module(sampling, "sample", before, marked("temperature", 2), torch.OutOfMemoryError),
        {"temperature": MARK},
    ),
    "penalties": (in_module(sampling, "penalise", before, marked("repetition", 3)), {"repetition_penalty": MARK}),
    "a stop text": (in_decode(False), {"stop": ("never in it",)}),
    "the text": (in_decode(True), {}),
}


def requests(poisoned: dict[str, Any]) -> tuple[list[list[int]], list[Params]]:
    """Twelve prompts and params; those of POISON have `poisoned`."""
    prompts = [[3 + n, 5, 8, *range(10, 10 + 3 * (n % 4))] for n in range(12)]
    params = [Params(6, 4, ignore_eos=True, seed=n, **KINDS[n % len(KINDS)]) for n in range(12)]
    prompts[POISON], params[POISON] = PROMPT, replace(Params(6, 4, ignore_eos=True), **poisoned)
    return prompts, params


def neighbours(done: list[Completion]) -> list[dict[str, Any]]:
    return [vars(one) for n, one in enumerate(done) if n != POISON]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One for all faults: each must leave nothing behind."""
    return Engine(
        build(), max_num_seqs=5, max_model_len=64, passes_per_step=3, max_in_flight=3, tokenizer=tokenizer(),
        max_num_batched_tokens=40,
    )  # fmt: skip


@pytest.fixture(scope="module")
def clean(engine) -> list[dict[str, Any]]:
    """The neighbours' completions before any fault."""
    return neighbours(engine.generate(*requests({})))


def test_there_are_twelve():
    assert len(FAULTS) == 12


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_its_request_alone(name, engine, clean, monkeypatch):
    change, poisoned = FAULTS[name]
    prompts, params = requests(poisoned)
    want = engine.generate(prompts, params)
    assert neighbours(want) == clean
    assert want[POISON].error is None
    with monkeypatch.context() as patch:
        change(patch, engine, want[POISON])
        got = engine.generate(prompts, params)
    kind = "OutOfMemoryError" if "memory" in name else "Poison"
    assert (got[POISON].finish_reason, got[POISON].error) == ("error", f"{kind}: of this request")
    assert got[POISON].tokens == want[POISON].tokens[: len(got[POISON].tokens)]
    assert neighbours(got) == clean
    assert not engine.loop.work.in_use


def test_a_lost_device_ends_the_call(engine, monkeypatch):
    monkeypatch.setattr(sampling, "waiting_times", before(sampling.waiting_times, of_noise, torch.AcceleratorError))
    with pytest.raises(torch.AcceleratorError):
        engine.generate(*requests({"temperature": 1.0, "seed": SEED}))
    assert not engine.loop.work.in_use


def test_the_command_names_a_prompt_that_failed(tmp_path, capsys, monkeypatch):
    """Its line holds what there is of the text; the others are whole, and the command returns 1."""
    build().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\nx + 1\n"))
    monkeypatch.setattr(Draws, "admit", before(Draws.admit, lambda self, row, *_: row == 0))
    assert main([str(tmp_path), "max_tokens=2", "max_num_seqs=2"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2
    assert "a prompt ended by an error" in err
    assert "Poison: of this request" in err

"""The recurrent-depth model: state, cache, gradients, and loading without loopwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import loopwise.model
from loopwise.model import RecurrentDepthConfig
from loopwise.model.initial_state import counter_normal
from loopwise.model.source_layers import GROWING
from tests.helpers.blocked import without
from tests.helpers.model import GREEDY, build, embedded, ids
from tests.helpers.tiny import VOCAB, source_config
from tests.helpers.tiny_configs import ARCHITECTURES


def by_hand(model: Any, tokens: torch.Tensor, recurrences: int) -> torch.Tensor:
    """The model's formula for a Llama, spelled out with its modules and a plain causal mask."""
    llama = model.source.model
    x, run = embedded(model, tokens)
    e = run(model.prelude, x)
    s = {"input": e, "zeros": torch.zeros_like(e)}[model.config.state_init]
    for _ in range(recurrences):
        s = run(model.core, injected(model, s, e))
        if model.config.recurrence_norm == "each":
            s = (
                s
                * (s.pow(2).mean(-1, keepdim=True) + llama.norm.variance_epsilon).rsqrt()
                * model.recurrence_norm.weight
            )
    return model.source.lm_head(llama.norm(run(model.coda, s)))


def injected(model: Any, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """inject(s, e) of the model's injection, from its parameters."""
    kind, own = model.config.injection, dict(model.injection.named_parameters())
    if kind in ("none", "add"):
        return s + e if kind == "add" else s
    if kind == "decayed":
        a = 1 / (1 + (-own["decay"]).exp())
        return a * s + (1 - a) * (e @ own["weight"].T)
    mixed = torch.cat([s, e], -1) @ own["weight"].T
    gate = torch.sigmoid(mixed + own.get("bias", 0))
    return mixed if kind == "linear" else gate * s + (1 - gate) * e


@pytest.mark.parametrize(
    ("injection", "state_init"),
    [
        ("none", "input"),
        ("add", "zeros"),
        ("add", "input"),
        ("linear", "zeros"),
        ("linear", "input"),
        ("gated", "input"),
        ("decayed", "input"),
        ("decayed", "zeros"),
    ],
)
@pytest.mark.parametrize("recurrence_norm", ["none", "each"])
def test_the_formula(injection, state_init, recurrence_norm):
    model = build(injection=injection, state_init=state_init, recurrence_norm=recurrence_norm)
    with torch.no_grad():
        for recurrences in (1, 2, 5):
            want = by_hand(model, ids(), recurrences)
            torch.testing.assert_close(model(ids(), num_recurrences=recurrences).logits, want, rtol=0, atol=1e-5)


def test_states_and_depth_logits_are_those_of_each_depth():
    model = build()
    with torch.no_grad():
        out = model(ids(), num_recurrences=4, output_states=True, output_depth_logits=True)
        for r in range(1, 5):
            alone = model(ids(), num_recurrences=r)
            assert torch.equal(out.states[r - 1], alone.state)
            assert torch.equal(out.depth_logits[r - 1], alone.logits)
    assert torch.equal(out.logits, out.depth_logits[-1])
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids(), output_depth_logits=True, use_cache=True)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "opt", "biogpt", "cohere", "gemma2", "mpt"])
def test_logits_at_a_mask_are_those_of_all_positions(model_type):
    model = build(model_type)
    positions = torch.rand(2, 14, generator=torch.Generator().manual_seed(0)) < 0.3
    positions[1] = False
    ran: list[torch.Size] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: ran.append(out.shape))
    with torch.no_grad():
        every, some = (model(ids(), use_cache=False, logits_to_keep=keep).logits for keep in (0, positions))
        at_depths = {"depth_loss": lambda r, logits: logits, "depth_loss_at": [1, 3], "num_recurrences": 3}
        out = model(ids(), use_cache=False, logits_to_keep=positions, **at_depths)
        alone = [model(ids(), use_cache=False, num_recurrences=r).logits for r in (1, 3)]
    hook.remove()
    assert ran[1] == some.shape == (1, int(positions.sum()), VOCAB)
    torch.testing.assert_close(some[0], every[positions], rtol=0, atol=1e-5)
    for found, wanted in zip(out.depth_losses, alone, strict=True):
        torch.testing.assert_close(found[0], wanted[positions], rtol=0, atol=1e-5)


def test_masks_of_logits_that_fit_no_call_are_refused():
    model, positions = build(), torch.ones(2, 14, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a mask of shape \[2, 13\], of tokens \[2, 14\]"):
        model(ids(), logits_to_keep=positions[:, 1:])
    for options in ({"labels": ids()}, {"output_depth_logits": True, "use_cache": False}):
        with pytest.raises(ValueError, match="neither with labels nor with output_depth_logits"):
            model(ids(), logits_to_keep=positions, **options)
    assert torch.equal(model(ids(), logits_to_keep=torch.tensor([3, 5])).logits, model(ids()).logits[:, [3, 5]])


ROWS = {
    "linear": {},
    "between": {"recurrence_norm": "between", "injection": "none"},
    "each, counted": {"recurrence_norm": "each", "recurrence_encoding": "sinusoidal"},
    "last, first keys": {"recurrence_norm": "last", "kv_policy": "first"},
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("grad", [None, 1, 2])
def test_rows_of_different_recurrences_are_calls_of_their_own(case, grad):
    """Logits, states and gradients of a batch with R = 1, 3, 2, of which one row is padded."""
    model = build(**ROWS[case]).train()
    if model.config.kv_policy == "first" and grad:
        with pytest.raises(ValueError, match="kv_policy='first' keeps the first recurrence's keys"):
            model(ids(), num_recurrences=torch.tensor([1, 2]), grad_recurrences=grad)
        return
    tokens, mask = ids(3), torch.ones(3, 14, dtype=torch.long)
    mask[2, :4] = 0
    weight = torch.randn(3, 14, VOCAB, generator=torch.Generator().manual_seed(1)) * mask[..., None]

    def gradients(calls: list[tuple[slice, Any]]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        model.zero_grad(set_to_none=True)
        outs = []
        for rows, recurrences in calls:
            options = {"attention_mask": mask[rows], "grad_recurrences": grad, "use_cache": False}
            outs.append(model(tokens[rows], num_recurrences=recurrences, **options))
            (outs[-1].logits * weight[rows]).sum().backward()
        logits, states = (torch.cat([out[key] for out in outs]) for key in ("logits", "last_state"))
        return logits, states, [p.grad for p in model.parameters()]

    together = gradients([(slice(None), torch.tensor([1, 3, 2]))])
    alone = gradients([(slice(i, i + 1), r) for i, r in enumerate((1, 3, 2))])
    real = mask.bool()
    for one, other in zip(together[:2], alone[:2], strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=1e-5)
    assert any(g is not None and g.abs().max() > 0 for g in together[2])
    for one, other in zip(together[2], alone[2], strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=3e-5 * float(other.abs().max()) + 1e-9)


def test_wrong_recurrences_of_rows_are_refused():
    model = build()
    for rows in ([1, 2, 3], [0, 2], [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"an integer, at least 1, for each of 2 rows"):
            model(ids(), num_recurrences=torch.tensor(rows))
    rows = torch.tensor([1, 2])
    for options in ({"use_cache": True}, {"output_depth_logits": True, "use_cache": False}):
        with pytest.raises(ValueError, match="goes neither with a cache"):
            model(ids(), num_recurrences=rows, **options)
    with pytest.raises(ValueError, match="goes neither"):
        build(injection="none", halting="act")(ids(), num_recurrences=rows, use_cache=False)


def test_detached_states_end_the_gradient():
    model = build()
    state = torch.randn(2, 14, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for after, reaches in (((), True), ((2,), False)):
        out = model(ids(), num_recurrences=3, initial_state=state, detach_after=after, use_cache=False)
        (gradient,) = torch.autograd.grad(out.logits.sum(), state, allow_unused=True)
        assert (gradient is not None) == reaches
    for after in ((3,), (0,)):
        with pytest.raises(ValueError, match="detach_after="):
            model(ids(), num_recurrences=3, detach_after=after)


def test_hidden_states_are_the_input_of_every_layer_that_ran():
    model = build()
    with torch.no_grad():
        out = model(ids(), num_recurrences=2, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + 2 * 2 + 1 + 1
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids()))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    model.config.output_hidden_states = True
    assert len(model(ids()).hidden_states) == 1 + 3 * 2 + 1 + 1


def test_a_tuple_on_request():
    model = build()
    with torch.no_grad():
        out = model(ids(), return_dict=False, use_cache=False)
        assert isinstance(out, tuple)
        assert torch.equal(out[0], model(ids()).logits)


def test_arguments_that_do_not_exist_are_refused():
    model = build()
    with pytest.raises(TypeError, match="did you mean 'num_recurrences'"):
        model(ids(), num_recurrence=3)
    with pytest.raises(ValueError, match="num_recurrences='3'"):
        model(ids(), num_recurrences="3")


@pytest.mark.parametrize("state_init", ["input", "zeros", "normal"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "olmo2", "gpt_neox", "mistral"])
def test_padding_and_cache_change_nothing(model_type, state_init):
    model = build(model_type, core=[1, 2], state_init=state_init, state_std=0.5)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        whole = model(ids(), attention_mask=mask).logits
        torch.testing.assert_close(whole[:1, 5:], model(ids()[:1, 5:]).logits, rtol=0, atol=2e-5)
        for recurrences in (2, 12):  # 12 is deeper than the cache that config.max_recurrences asks for
            options = {"attention_mask": mask, "num_recurrences": recurrences, **GREEDY}
            cached = model.generate(ids(), **options)
            assert torch.equal(cached, model.generate(ids(), use_cache=False, **options))
            assert torch.equal(
                cached[:1, 14:], model.generate(ids()[:1, 5:], num_recurrences=recurrences, **GREEDY)[:, 9:]
            )


def test_cache_options_may_be_one_set_for_all_layers(monkeypatch):
    """As transformers gives them below 5.19."""
    from loopwise.model import source_layers

    model = build("gemma2", core=[1, 2])  # a window, and full attention
    wanted = model.generate(ids(), **GREEDY)
    assert torch.equal(wanted, model.generate(ids(), use_cache=False, **GREEDY))
    types = source_layers.get_layer_types_and_kwargs(model.config.source_config)[0]
    monkeypatch.setattr(source_layers, "get_layer_types_and_kwargs", lambda _: (types, {"sliding_window": 8}))
    assert torch.equal(model.generate(ids(), **GREEDY), wanted)


def test_static_cache_equals_dynamic():
    model = build()
    assert torch.equal(model.generate(ids(), cache_implementation="static", **GREEDY), model.generate(ids(), **GREEDY))
    with pytest.raises(ValueError, match="max_recurrences=8"):
        model.generate(ids(), cache_implementation="static", num_recurrences=9, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", [name if name in GROWING else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_cache_of_fixed_size_gives_the_logits_of_a_full_pass_or_is_refused(model_type):
    model = build(model_type, prelude=[0], core=[1, 2], coda=[3, 5])
    cache = StaticCache(config=model.config, max_cache_len=16)
    if model_type in GROWING:
        with pytest.raises(ValueError, match=f"{model_type} counts the keys .*cache_implementation='dynamic'"):
            model(ids(), past_key_values=cache, num_recurrences=2)
        with pytest.raises(ValueError, match=f"{model_type} counts the keys"):
            model.generate(ids(), cache_implementation="static", **GREEDY)
        return
    parts = list[torch.Tensor]()
    for at in torch.arange(14).split([6, *[1] * 8]):  # Bamba counts no positions of its own behind a cache
        step = {"position_ids": at.expand(2, -1), "past_key_values": cache, "num_recurrences": 2}
        parts.append(model(ids()[:, at], **step).logits)
    want = model(ids(), use_cache=False, num_recurrences=2).logits
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=5e-4 * want.abs().max().item())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"max_new_tokens": 20}])
def test_ways_of_generating_do_not_depend_on_the_cache(model_type, options):
    model = build(model_type)
    options = {**GREEDY, "num_recurrences": 2, **options}
    prompt = ids(1, 6).repeat(1, 2)  # so that looking up the prompt proposes tokens
    cached = model.generate(prompt, **options)
    if "prompt_lookup_num_tokens" in options:
        options.pop("prompt_lookup_num_tokens")
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_a_cache_of_other_attention_types_is_refused():
    model = build("gemma3_text")
    with pytest.raises(ValueError, match="make it with config=model"):
        model(ids(), past_key_values=DynamicCache(config=model.config.source_config))


def test_a_static_cache_is_not_read_deeper_than_it_was_filled():
    model = build()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids(), past_key_values=cache, num_recurrences=2)
        with pytest.raises(ValueError, match="only up to depth 2"):
            model(ids()[:, :1], past_key_values=cache, num_recurrences=3)


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_given_state_goes_on_where_the_cache_ends(kind):
    model, tokens, state = build(), ids(), torch.randn(2, 14, 64)
    with torch.no_grad():
        cache = kind(config=model.config, **({"max_cache_len": 16} if kind is StaticCache else {}))
        got = [model(part, initial_state=state, past_key_values=cache).logits for part in tokens.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(got, 1), model(tokens, initial_state=state).logits, rtol=0, atol=1e-5)


def test_special_tokens_are_those_of_the_source(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = loaded.generation_config
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 1, 2)


def test_decoding_shallower_is_allowed_and_deeper_than_the_cache_is_an_error():
    model = build()
    with torch.no_grad():
        cache = model(ids(), num_recurrences=3, use_cache=True).past_key_values
        model(ids()[:, :1], past_key_values=cache, num_recurrences=2)
        with pytest.raises(ValueError, match="only up to depth 2"):
            model(ids()[:, :1], past_key_values=cache, num_recurrences=3)


def test_a_given_initial_state_covers_its_positions():
    model = build(state_init="zeros")
    given = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids(), initial_state=given).logits
        first = model(ids()[:, :8], initial_state=given, use_cache=True)
        second = model(ids()[:, 8:], initial_state=given, past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-5)
        assert not torch.equal(whole, model(ids()).logits)


def test_noise_is_a_function_of_seed_sequence_position_and_channel():
    positions = torch.arange(50)[None].expand(3, -1)
    noise = counter_normal(7, torch.tensor([0, 1, 5]), positions, 64)
    assert torch.equal(noise[2:, 9:20], counter_normal(7, torch.tensor([5]), torch.arange(9, 20)[None], 64))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 0.9866) < 0.03  # of a standard normal cut at 3
    assert noise.abs().max() <= 3
    flat = [noise[0].flatten(), noise[1].flatten(), counter_normal(8, torch.tensor([0]), positions[:1], 64).flatten()]
    flat += [noise[0, 1:].flatten()[:3000], noise[0].flatten()[1:3001]]
    size = 3000
    correlation = torch.corrcoef(torch.stack([f[:size] for f in flat]))
    assert (correlation - torch.eye(5)).abs().max() < 0.08


def test_sequence_ids_tell_sequences_apart():
    model = build(state_init="normal", state_std=1.0)
    same = ids(1).expand(2, -1)
    with torch.no_grad():
        a, b = model(same).logits, model(same, sequence_ids=torch.tensor([0, 1])).logits
    assert torch.equal(a[0], a[1])
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(b[0], b[1])


def test_truncated_backpropagation_is_that_of_a_detached_state():
    model = build()
    model(ids(), labels=ids(), num_recurrences=5, grad_recurrences=2).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        state = model(ids(), num_recurrences=3).state
    model(ids(), labels=ids(), num_recurrences=2, initial_state=state).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="grad_recurrences=0"):
        model(ids(), grad_recurrences=0)


def test_gradient_checkpointing_changes_no_gradient():
    model = build().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(layer.gradient_checkpointing for layer in model.core)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_the_loss_is_the_mean_over_the_tokens_of_the_batch():
    model = build()
    with torch.no_grad():
        logits = model(ids()).logits
        want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        torch.testing.assert_close(model(ids(), labels=ids()).loss, want)
        torch.testing.assert_close(model(ids(), labels=ids(), num_items_in_batch=52).loss, want * 26 / 52)


STRANGER = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokens = torch.load(sys.argv[2])
out = model.generate(tokens, num_recurrences=3, max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=None)
torch.save(out, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_checkpoint_loads_where_loopwise_cannot_be_imported(model_type, tmp_path):
    model = build(model_type, core=[1, 2])
    model.save_pretrained(tmp_path / "model")
    travels = {file.name for file in Path(loopwise.model.__path__[0]).glob("*.py")} - {"__init__.py"}
    assert {file.name for file in (tmp_path / "model").glob("*.py")} == travels
    torch.save(ids(), tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("model", "ids.pt", "out.pt", "again")]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", without("loopwise", STRANGER), *paths], env=env, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model.generate(ids(), num_recurrences=3, **GREEDY))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()  # saved there, it loads here
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_a_compiled_call_reads_a_static_cache_no_deeper_than_it_was_prefilled():
    model, tokens = build(), ids(1)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens[:, :5], num_recurrences=3, past_key_values=cache)
        model(tokens[:, 5:-1], num_recurrences=1, past_key_values=cache)
        compiled = torch.compile(model.forward, backend="eager", dynamic=False)
        with pytest.raises(RuntimeError, match="smaller depth than is read now"):
            compiled(tokens[:, -1:], num_recurrences=3, past_key_values=cache)


def test_resized_embeddings_survive_saving(tmp_path):
    model = build()
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids()).logits.shape[-1] == VOCAB + 8


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"core": []}, "core is empty"),
        ({"core": [6]}, "source layer 6"),
        ({"coda": [-1]}, "source layer -1"),
        ({"num_recurrences": 0}, "num_recurrences=0"),
        ({"num_recurrences": 4, "max_recurrences": 3}, "max_recurrences=3"),
        ({"injection": "gate"}, "none, add, linear, gated, decayed"),
        ({"state_init": "ones"}, "input, zeros, normal"),
        ({"injection": "none", "state_init": "zeros"}, "never shows the input"),
        ({"sharing": "sequence", "injection": "linear"}, "nothing can stand between"),
        ({"exit": {"rule": "gate"}}, "no exit gate"),
        ({"router": {"kind": "token"}, "recurrence_norm": "between"}, "goes with no router"),
        ({"exit": {"rule": "kl", "min_recurrences": 9}}, "1 to max_recurrences=8"),
        ({"trained_recurrences": {"mean": 4, "max": 8}}, "1 <= min <= mean <= max"),
        ({"trained_recurrences": {"mean": 9.0, "min": 1, "max": 8}}, "'mean': 9.0"),
        ({"trained_recurrences": {"mean": 4, "min": 1.0, "max": 8}}, "min and max whole"),
        ({"trained_recurrences": {"mean": True, "min": 1, "max": 8}}, "'mean': True"),
        ({"trained_recurrences": 8}, "trained_recurrences=8"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields, said):
    defaults = {"prelude": [0], "core": [1], "coda": [2]}
    with pytest.raises(ValueError, match=said):
        RecurrentDepthConfig(source_config=source_config("llama"), **{**defaults, **fields})


def test_a_layer_at_two_places_has_two_sets_of_weights():
    model = build(prelude=[2], core=[2])
    assert model.prelude[0].mlp.up_proj.weight is not model.core[0].mlp.up_proj.weight

"""Converted checkpoints compute what their source computes, for every supported architecture."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loopwise.cli import main
from loopwise.convert import convert
from loopwise.convert.architectures import SUPPORTED
from loopwise.convert.recipe import ConvertRecipe
from loopwise.errors import UserError
from loopwise.recipe import RECIPES, validate
from tests.helpers.convert import EVERY_LAYER, run, tokens
from tests.helpers.tiny import ARCHITECTURES, load_source, named, save_source, source_model

ROLLED = [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5]  # the layers of EVERY_LAYER at three recurrences
# Fields of a plain model of those layers, for architectures that describe their layers otherwise than by a list.
UNROLLED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5, 8, 11]},
    "llama4_text": {"moe_layers": [1, 3, 4, 6, 7, 9, 11]},
    "minicpm3": {"scale_depth": 1.4 * 2**0.5},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention"] * 4},
}
SHIFTED = {"minimax_m3_vl_text"}  # choose blocks of slots, which padding shifts: their generate depends on the cache


def written_out(model_type: str, layers: list[int]) -> Any:
    """The tiny source with its layers rearranged by hand: a plain transformers model of len(layers) layers."""
    source = source_model(model_type)
    fields: dict[str, Any] = {}
    assert layers == ROLLED or model_type not in UNROLLED
    for name, value in vars(source.config).items():
        if isinstance(value, list) and len(value) == 6:
            fields[name] = [value[i] for i in layers]
    count = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer", "mpt": "n_layers", "gpt_neo": "num_layers"}
    count["ctrl"] = "n_layer"
    fields[count.get(model_type, "num_hidden_layers")] = len(layers)
    if model_type == "gpt_neo":
        fields["attention_types"] = [[[source.config.attention_layers[i] for i in layers], 1]]
        fields.pop("attention_layers")
    plain = source_model(model_type, **{**fields, **UNROLLED.get(model_type, {})})
    weights = {}
    for name, tensor in source.state_dict().items():
        parts = name.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        if at is None:
            weights[name] = tensor
            continue
        for new, old in enumerate(layers):
            if old == int(parts[at]):
                weights[".".join([*parts[:at], str(new), *parts[at + 1 :]])] = tensor
    plain.load_state_dict(weights)
    return plain


def test_the_supported_list_is_the_tested_list():
    assert sorted(SUPPORTED) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("model_type", named())
def test_identity_and_three_recurrences(model_type, tmp_path):
    source = load_source(save_source(tmp_path / "source", model_type))
    model = run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER)
    with torch.no_grad():
        for batch in (tokens(padded=False), tokens()):
            seen = batch["attention_mask"].bool()
            want, got = source(**batch).logits, model(**batch, num_recurrences=1).logits
            assert torch.equal(want[seen], got[seen])
            want = written_out(model_type, ROLLED)(**batch).logits
            got = model(**batch, num_recurrences=3).logits
            assert torch.equal(want[seen], got[seen])
        assert not torch.equal(got, model(**batch, num_recurrences=2).logits)
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
        start = tokens(padded=model_type not in SHIFTED)
        cached = model.generate(**start, num_recurrences=3, **greedy)
        assert torch.equal(cached, model.generate(**start, num_recurrences=3, use_cache=False, **greedy))
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(model(**batch).logits, again(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "olmo2", "gpt_neox", "mistral"])
def test_linear_injection_preserves_the_model_and_uses_the_state(model_type, tmp_path):
    save_source(tmp_path / "source", model_type)
    for state_init in ("input", "zeros"):
        model = run(tmp_path / "source", tmp_path / state_init, sizes="1,3,2", state_init=state_init)
        source = load_source(tmp_path / "source")
        with torch.no_grad():
            once, twice = (model(**tokens(), num_recurrences=r).logits for r in (1, 2))
            seen = tokens()["attention_mask"].bool()
            torch.testing.assert_close(once[seen], source(**tokens()).logits[seen], rtol=0, atol=1e-5)
            assert (twice - once)[seen].abs().max() > 1e-2


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
def test_recursive(init, tmp_path):
    save_source(tmp_path / "source")
    model = run(tmp_path / "source", tmp_path / "out", method="recursive", loops=2, init=init)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    key = "self_attn.q_proj.weight"
    layers = [source[f"model.layers.{i}.{key}"] for i in range(6)]
    want = {
        "stepwise": [layers[0], layers[2], layers[5]],
        "average": [(layers[j] + layers[j + 3]) / 2 for j in range(3)],
        "lower": layers[:3],
    }[init]
    for j in range(3):
        torch.testing.assert_close(model.state_dict()[f"core.{j}.{key}"], want[j], rtol=0, atol=1e-7)
    assert (model.config.num_recurrences, model.config.prelude, model.config.coda) == (2, [], [])


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
@pytest.mark.parametrize(
    ("sharing", "groups"),
    [
        ("cycle", [[0, 3], [1, 4], [2, 5]]),
        ("sequence", [[0, 1], [2, 3], [4, 5]]),
        ("middle-cycle", [[1, 3], [2, 4]]),
        ("middle-sequence", [[1, 2], [3, 4]]),
    ],
)
def test_sharing_and_init(sharing, groups, init, tmp_path):
    """Each way to share layers equals the source written out with the layers that each init chooses."""
    source = load_source(save_source(tmp_path / "source"))
    model = run(tmp_path / "source", tmp_path / "out", method="recursive", loops=2, sharing=sharing, init=init)
    tied = sorted(layer for group in groups for layer in group)
    width = len(groups)
    even = {3: [0, 2, 5], 2: [1, 4]}[width]
    start = {"stepwise": even, "lower": tied[:width], "upper": tied[-width:]}
    state = source.state_dict()

    def weight(layer: int, key: str) -> torch.Tensor:
        which = next((n for n, group in enumerate(groups) if layer in group), None)
        if which is None:
            return state[f"model.layers.{layer}.{key}"]
        parents = groups[which] if init == "average" else [start[init][which]]
        return torch.stack([state[f"model.layers.{parent}.{key}"] for parent in parents]).mean(0)

    plain = source_model("llama")
    for layer in range(6):
        keys = plain.model.layers[layer].state_dict()
        plain.model.layers[layer].load_state_dict({key: weight(layer, key) for key in keys})
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens()).logits[1], plain(**tokens()).logits[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"recurrence_norm": "between"}, {"recurrence_damping": 0.5}])
@pytest.mark.parametrize("kv_policy", ["first", "single", "modulo-2"])
def test_a_kv_policy_of_few_slots(kv_policy, more, tmp_path):
    """Under `first`, recurrences are not the source's layers, each with its own keys: that is no fault to be found."""
    save_source(tmp_path / "source")
    keys = {"method": "recursive", "loops": 3, "kv_policy": kv_policy, **more}
    model = run(tmp_path / "source", tmp_path / "out", **keys)
    assert model.config.kv_policy == kv_policy
    own = run(tmp_path / "source", tmp_path / "own", **{**keys, "kv_policy": "per-depth"})
    with torch.no_grad():
        found, expected = (each(**tokens(), use_cache=False).logits[1] for each in (model, own))
    assert torch.equal(found, expected) == (kv_policy != "first")


def test_random_layers_depend_on_the_seed_alone(tmp_path):
    save_source(tmp_path / "source")
    keys = {"method": "recursive", "loops": 2, "init": "random", "sharing": "middle-cycle"}
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = run(tmp_path / "source", tmp_path / name, **keys, seed=seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    weights = model.core[0].self_attn.q_proj.weight, model.core[1].self_attn.q_proj.weight
    assert 0.015 < weights[0].std() < 0.025  # Llama's initializer_range is 0.02
    assert not torch.equal(*weights)
    assert torch.equal(model.core[0].input_layernorm.weight, torch.ones(64))


def full_rank_cases() -> list[Any]:
    """Every type with every start and order; fast is each type with one of them."""
    ways = [(init, sharing) for init in ("stepwise", "average") for sharing in ("cycle", "middle-sequence")]
    types = ("llama", "qwen3", "olmo2", "gpt_neox", "gpt2", "phi3", "starcoder2")
    return [
        pytest.param(name, *way, marks=[] if number % 4 == place else pytest.mark.slow)
        for number, name in enumerate(types)
        for place, way in enumerate(ways)
    ]


@pytest.mark.parametrize(("model_type", "init", "sharing"), full_rank_cases())
def test_full_rank_lora_is_the_source(model_type, init, sharing, tmp_path):
    source = load_source(save_source(tmp_path / "source", model_type))
    ranks = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 64, "up": 64, "down": 64}
    if model_type == "starcoder2":
        del ranks["gate"]
    elif model_type not in ("llama", "qwen3", "olmo2"):
        ranks = dict.fromkeys(("q", "o", "up", "down"), 64)
    keys = {"method": "recursive", "loops": 2, "sharing": sharing, "init": init, "lora": {"rank": ranks}}
    model = run(tmp_path / "source", tmp_path / "out", **keys)
    seen = tokens()["attention_mask"].bool()
    with torch.no_grad():
        want, got = source(**tokens()).logits[seen], model(**tokens()).logits[seen]
        assert (want - got).abs().max() < 1e-4
        shallow = model(**tokens(), num_recurrences=1).logits[seen]
        assert (want - shallow).abs().max() > 1e-2
    assert max(json.loads((tmp_path / "out" / "loopwise.json").read_text())["lora_error"].values()) < 1e-4


def test_low_rank_lora_is_the_best_of_its_rank(tmp_path):
    """The factors are those of the singular values, and the stated error is what they leave out."""
    source = AutoModelForCausalLM.from_pretrained(save_source(tmp_path / "source")).state_dict()
    lora = {"rank": 4, "targets": "q,down"}
    model = run(tmp_path / "source", tmp_path / "out", method="recursive", loops=2, init="lower", lora=lora)
    key = "self_attn.q_proj"
    errors = []
    for n in range(3):
        factors = model.relaxation[n].get_submodule(key)
        assert factors.lora_A.shape == (2, 4, 64)
        lost = source[f"model.layers.{n + 3}.{key}.weight"] - source[f"model.layers.{n}.{key}.weight"]
        u, s, v = torch.linalg.svd(lost)
        torch.testing.assert_close(factors.lora_B[1] @ factors.lora_A[1], u[:, :4] * s[:4] @ v[:4], rtol=0, atol=1e-5)
        assert factors.lora_B[0].abs().max() < 1e-6
        errors.append((s[4:].square().sum() / s.square().sum()).sqrt().item())
    assert model.relaxation[0].input_layernorm.weight.shape == (2, 64)
    stated = json.loads((tmp_path / "out" / "loopwise.json").read_text())["lora_error"]
    assert stated.keys() == {key, "mlp.down_proj"}
    assert stated[key] == pytest.approx(max(errors), rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "init"),
    [
        ({}, "stepwise"),
        ({"lora": {"rank": 15}}, "stepwise"),
        ({"lora": {"rank": 16}}, "average"),  # a quarter of 64
        ({"lora": {"rank": {"q": 4, "down": 16}}}, "average"),
        ({"lora": {"rank": 16, "init": "zero"}}, "stepwise"),
        ({"lora": {"rank": 4}, "init": "upper"}, "upper"),
        ({"init": "average"}, "average"),
    ],
)
def test_where_tied_layers_start_by_default(keys, init, tmp_path):
    source = save_source(tmp_path / "source")
    recipe = validate(ConvertRecipe, {"method": "recursive", "loops": 2, **keys})
    facts = convert(source, tmp_path / "out", recipe, dry_run=True)
    parents = {"stepwise": [[0], [2], [5]], "average": [[0, 3], [1, 4], [2, 5]], "upper": [[3], [4], [5]]}
    assert facts["recipe"]["init"] == init
    assert recipe.init == keys.get("init")  # the caller's stays: another source may get another
    assert facts["plan"]["parents"]["core"] == parents[init]


def test_small_matrices_are_decomposed_in_one_thread(monkeypatch):
    """And the number of threads is what it was before."""
    from loopwise.convert import relax

    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (seen.append(torch.get_num_threads()), svd(*a, **k))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tied, source = torch.randn(8, 6), torch.randn(8, 6)
        relax.LowRank(2, 1, "svd", False, 0, lambda: tied, lambda depth: source).take("lora_A")
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_randomised_svd_is_near_the_exact_one(monkeypatch):
    from loopwise.convert import relax

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 40, generator=generator) @ torch.randn(40, 200, generator=generator)
    matrix += 0.3 * torch.randn(300, 200, generator=generator)
    exact = relax.truncated_svd(matrix, 32, 0)
    monkeypatch.setattr(relax, "EXACT_UP_TO", 100)
    random = relax.truncated_svd(matrix, 32, 0)
    left = [(matrix - b @ a).norm().item() for b, a in (exact, random)]
    assert left[1] == pytest.approx(left[0], rel=0.01)


@pytest.mark.parametrize(
    ("model_type", "fields", "dtype"),
    [
        ("qwen2", {}, "bfloat16"),
        ("qwen2", {}, "float16"),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, "float32"),  # only some of the core's layers have mlp.gate_proj
    ],
)
def test_a_lora_is_verified_as_it_was_written(model_type, fields, dtype, tmp_path):
    """Computation in float32 uses the rounded weights, and the rounded norms and biases of every depth."""
    source = save_source(tmp_path / "source", model_type, **fields)
    keys: dict[str, Any] = {"method": "recursive", "loops": 2, "init": "average", "lora": {"rank": 8}, "dtype": dtype}
    assert convert(source, tmp_path / "out", validate(ConvertRecipe, keys))["max_dlogit"] < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_zero_lora_changes_nothing(dora, tmp_path):
    save_source(tmp_path / "source")
    keys = {"sizes": "1,2,1", "injection": "none", "num_recurrences": 3}
    plain = run(tmp_path / "source", tmp_path / "plain", **keys)
    relaxed = run(tmp_path / "source", tmp_path / "relaxed", **keys, lora={"rank": 2, "dora": dora})
    assert relaxed.relaxation[0].mlp.up_proj.lora_B.abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(relaxed(**tokens()).logits, plain(**tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("injection", ["gated", "decayed"])
def test_one_recurrence_of_a_gated_state_is_the_source(injection, tmp_path):
    source = load_source(save_source(tmp_path / "source"))
    gated = run(tmp_path / "source", tmp_path / "gated", sizes="1,3,2", injection=injection)
    with torch.no_grad():
        want = source(**tokens(False)).logits
        assert torch.equal(gated(**tokens(False), num_recurrences=1).logits, want)
        assert not torch.equal(gated(**tokens(False), num_recurrences=2).logits, want)


def test_one_recurrence_of_a_decayed_state_from_zeros_is_the_source(tmp_path):
    source = load_source(save_source(tmp_path / "source"))
    made = run(tmp_path / "source", tmp_path / "out", sizes="1,3,2", injection="decayed", state_init="zeros")
    with torch.no_grad():
        assert torch.equal(made(**tokens(False), num_recurrences=1).logits, source(**tokens(False)).logits)


def test_a_recurrence_norm_bounds_the_state(tmp_path):
    save_source(tmp_path / "source")
    normed = run(tmp_path / "source", tmp_path / "normed", sizes="1,3,2", injection="none", recurrence_norm=True)
    with torch.no_grad():
        state = normed(**tokens(False), num_recurrences=2).state
        torch.testing.assert_close(state.pow(2).mean(-1), torch.ones(2, 20), rtol=0, atol=1e-3)


def test_the_core_is_chosen_by_influence(tmp_path, capsys):
    """Influence is 1 - the mean cosine of the hidden states before and after a layer, as transformers returns them."""
    source = save_source(tmp_path / "source")
    text = "def f(x):\n    return x + 1\n" * 300
    (tmp_path / "text.txt").write_text(text)
    keys = ["sizes=1,2,1", f"influence={tmp_path / 'text.txt'}", "injection=none"]
    assert main(["convert", str(source), str(tmp_path / "out"), *keys]) == 0
    shown = capsys.readouterr().out
    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text).input_ids[:8192])
    states = []
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: states.append((args[0], out)))
    with torch.no_grad():
        model(ids[: len(ids) // 128 * 128].view(-1, 128))
    want = [1 - torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in states]
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["influence"] == pytest.approx(want, abs=1e-5)
    core = sorted(sorted(range(1, 5), key=lambda layer: -want[layer])[:2])
    assert facts["plan"]["core"] == core
    assert facts["plan"]["dropped"] == [layer for layer in range(1, 5) if layer not in core]
    assert f"{core[0]:>5}  {want[core[0]]:>9.4f}  core" in shown
    assert (tmp_path / "out" / "influence.png").read_bytes().startswith(b"\x89PNG")


RECIPES_AND_PLANS = {
    "tinyllama": (22, [0, 1, 2, 3], list(range(10, 18)), [18, 19, 20, 21]),
    "olmo2-1b": (16, [0, 1, 2, 3], list(range(6, 12)), [12, 13, 14, 15]),
    "llama3.2-1b": (16, [0, 1], [10, 11, 12, 13], [14, 15]),
    "recursive": (6, [], [0, 2, 5], []),
    "relaxed": (6, [], [0, 1, 2], []),
    "mor": (8, [0], [1, 6], [7]),
    "universal": (6, [], [0], []),
    "abbie": (24, [0, 1, 2, 3], list(range(4, 20)), [20, 21, 22, 23]),
}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (RECIPES / "convert").glob("*.yaml")))
def test_every_recipe(recipe, tmp_path):
    count, *parts = RECIPES_AND_PLANS[recipe]
    source = save_source(tmp_path / "source", num_hidden_layers=count)
    lora = ["lora.rank=32"] if recipe == "relaxed" else []
    assert main(["convert", str(source), str(tmp_path / "out"), "--recipe", recipe, *lora]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert [config.prelude, config.core, config.coda] == parts


def test_a_universal_transformer_is_one_layer(tmp_path):
    source = load_source(save_source(tmp_path / "source")).state_dict()
    model = run(tmp_path / "source", tmp_path / "out", method="universal", init="average", halting="act")
    config, state = model.config, model.state_dict()
    assert (len(config.core), config.num_recurrences, config.recurrence_encoding) == (1, 6, "sinusoidal")
    name = "mlp.up_proj.weight"
    mean = torch.stack([source[f"model.layers.{i}.{name}"] for i in range(6)]).mean(0)
    torch.testing.assert_close(state[f"core.0.{name}"], mean, rtol=0, atol=1e-6)
    assert not any(state[name].any() for name in state if "recurrence_encoding" in name or "halting" in name)
    with torch.no_grad():
        assert model(**tokens()).ponder.unique().tolist() == [2.5]  # gates of one half: two recurrences, half of each


def test_abbie_is_the_source_at_one_recurrence(tmp_path):
    source = load_source(save_source(tmp_path / "source"))
    keys: dict[str, Any] = {"sizes": "1,3,2", "injection": "none", "recurrence_residual": True, "num_recurrences": 2}
    model = run(tmp_path / "source", tmp_path / "out", **keys)
    with torch.no_grad():
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, source(**tokens(False)).logits)
        assert not torch.equal(model(**tokens(False)).logits, source(**tokens(False)).logits)


def test_add_injection_starts_from_zeros_and_preserves_the_model(tmp_path):
    source = load_source(save_source(tmp_path / "source"))
    model = run(tmp_path / "source", tmp_path / "out", sizes="2,2,2", injection="add")
    with torch.no_grad():
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, source(**tokens(False)).logits)


def test_explicit_layers_are_the_sizes_they_spell_out(tmp_path):
    save_source(tmp_path / "source")
    a = run(tmp_path / "source", tmp_path / "a", sizes="1,2,1")
    b = run(tmp_path / "source", tmp_path / "b", layers={"prelude": 0, "core": "3,4", "coda": [5]})
    assert a.config.core == [3, 4]
    with torch.no_grad():
        assert torch.equal(a(**tokens()).logits, b(**tokens()).logits)


def test_what_travels_along(tmp_path):
    source = save_source(tmp_path / "source", shard="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    run(source, tmp_path / "out", sizes="1,2,1")
    out = tmp_path / "out"
    old, new = (AutoTokenizer.from_pretrained(d) for d in (source, out))
    assert old("def f(x):")["input_ids"] == new("def f(x):")["input_ids"]
    assert old.chat_template == new.chat_template
    assert GenerationConfig.from_pretrained(out).temperature == 0.7
    assert AutoTokenizer.from_pretrained(out).chat_template["tools"] == "{{ tools }}"
    facts = json.loads((out / "loopwise.json").read_text())
    assert facts["recipe"]["sizes"] == [1, 2, 1]
    assert facts["max_dlogit"] == 0
    assert facts["plan"]["dropped"] == [1, 2]
    assert set(facts["source"]["sha256"]) == {p.name for p in source.glob("*.safetensors")}
    assert "max |dlogit| 0" in (out / "README.md").read_text()


def test_tied_embeddings_are_stored_once(tmp_path):
    from safetensors import safe_open

    save_source(tmp_path / "source", tie_word_embeddings=True)
    model = run(tmp_path / "source", tmp_path / "out", sizes="1,2,1")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "source.lm_head.weight" not in file.keys()  # noqa: SIM118
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("both", [True, False])
def test_a_head_that_the_config_ties_and_the_files_do_not(both, tmp_path):
    """As in transformers: two different tensors stay two; where only the head is stored, it is both."""
    from safetensors.torch import load_file, save_file

    source = save_source(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    if not both:
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = run(source, tmp_path / "out", **EVERY_LAYER)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (not both)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(source).eval()(**tokens(False)).logits
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, want)


def test_dtype(tmp_path):
    save_source(tmp_path / "source")
    model = run(tmp_path / "source", tmp_path / "out", sizes="1,2,1", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_checkpoints_without_the_base_prefix(tmp_path):
    """Old GPT-2 checkpoints store `h.0...`, not `transformer.h.0...`, and a mask that is no parameter."""
    from safetensors.torch import load_file, save_file

    source = save_source(tmp_path / "source", "gpt2")
    file = source / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 128, 128)}, file, metadata={"format": "pt"})
    model = run(source, tmp_path / "out", **EVERY_LAYER)
    with torch.no_grad():
        assert torch.equal(model(**tokens(), num_recurrences=1).logits, source_model("gpt2")(**tokens()).logits)


def test_a_hub_source_at_a_revision(tmp_path, monkeypatch):
    """A hub id resolves through the hub client: here its cache, offline, holds two revisions of one repository."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--tiny"
    for seed, (name, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        save_source(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    for seed, keys in enumerate(({}, {"revision": "v2"})):
        recipe = validate(ConvertRecipe, {**EVERY_LAYER, **keys})
        facts = convert("me/tiny", tmp_path / "out", recipe, force=True)
        assert facts["source"] == {**facts["source"], "id": "me/tiny", "revision": "ab"[seed] * 40}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            want = source_model("llama", seed)(**tokens()).logits
            assert torch.equal(model(**tokens(), num_recurrences=1).logits, want)
    with pytest.raises(UserError, match="v3"):
        convert("me/tiny", tmp_path / "other", validate(ConvertRecipe, {**EVERY_LAYER, "revision": "v3"}))


@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_a_cap_on_attention_scores_is_kept(model_type, tmp_path):
    """transformers' sdpa, its default, leaves it out."""
    fields: dict[str, Any] = {"attn_logit_softcapping": 0.5}
    source = load_source(save_source(tmp_path / "source", model_type, **fields))
    model = run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER)
    with torch.no_grad():
        want = source(**tokens(False)).logits
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, want)
        model.set_attn_implementation("sdpa")
        assert (model(**tokens(False), num_recurrences=1).logits - want).abs().max() > 1e-3

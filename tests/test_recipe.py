"""Recipes of all commands: lists by commas, settings without effect, values that are no YAML, names that are near."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml

from loopwise.errors import UserError
from loopwise.recipe import RECIPES, list_items, read_recipe, settled
from loopwise.unused import unused
from tests.helpers.recipes import MODELS, NEEDED, keys, load

# (command, key): (text, value), beside the settings that the key needs.
LISTS: dict[tuple[str, str], tuple[str, list[Any], list[str]]] = {
    ("train", "data.train"): ("a.txt,b.txt", ["a.txt", "b.txt"], []),
    ("train", "data.eval"): ("a.txt, b.txt", ["a.txt", "b.txt"], []),
    ("train", "data.streaming"): ("a.txt,b.txt", ["a.txt", "b.txt"], ["data.train=a.txt,b.txt", "steps=1"]),
    ("train", "recurrence.eval_at"): ("1,4", [1, 4], ["data.eval=b.txt"]),
    ("train", "adapters.targets"): ("q_proj,v_proj", ["q_proj", "v_proj"], []),
    ("train", "optimiser.train"): ("core,norms", ["core", "norms"], []),
    ("train", "optimiser.betas"): ("0.8,0.9", [0.8, 0.9], []),
    ("train", "report_to"): ("tensorboard,wandb", ["tensorboard", "wandb"], []),
    ("eval", "data"): ("a.txt,b.txt", ["a.txt", "b.txt"], []),
    ("eval", "tasks"): ("a,b.jsonl", ["a", "b.jsonl"], ["data=[]"]),
    ("eval", "num_recurrences"): ("1,4", [1, 4], []),
    ("eval", "exit_sweep"): ("kl,cosine", ["kl", "cosine"], []),
    ("calibrate", "data"): ("a.txt,b.txt", ["a.txt", "b.txt"], []),
    ("search", "data"): ("a.txt,b.txt", ["a.txt", "b.txt"], []),
    ("search", "tasks"): ("a,b.jsonl", ["a", "b.jsonl"], ["data=[]"]),
    ("search", "check"): ("a.txt,b.txt", ["a.txt", "b.txt"], []),
    ("search", "sizes"): ("1,4", [1, 4], []),
    ("search", "ways"): ("skip,repeat", ["skip", "repeat"], []),
    ("convert", "sizes"): ("1,4,1", [1, 4, 1], ["method=retrofit", "loops=null"]),
    ("convert", "layers.prelude"): ("0,1", [0, 1], ["method=retrofit", "loops=null"]),
    ("convert", "layers.core"): ("2,3", [2, 3], ["method=retrofit", "loops=null"]),
    ("convert", "layers.coda"): ("4,5", [4, 5], ["method=retrofit", "loops=null"]),
    ("convert", "lora.targets"): ("q,down", ["q", "down"], ["lora.rank=2"]),
    ("convert", "router.capacity"): ("1,0.5", [1.0, 0.5], []),
    ("convert", "router.thresholds"): ("0.5,0.25", [0.5, 0.25], []),
    ("generate", "draft_depths"): ("1,2", [1, 2], ["decoder=wave"]),
    ("serve", "draft_depths"): ("1,2", [1, 2], []),
}
# Lists of pairs or of sections, which are written as mappings.
MAPPINGS = {("train", "data.phases"), ("train", "recurrence.levels"), ("train", "recurrence.backprop_levels")}


def test_every_list_is_tested():
    found = {(command, key) for command, model in MODELS.items() for key, kind in keys(model) if list_items(kind)}
    assert found | {("train", "data.phases")} == {*LISTS} | MAPPINGS


@pytest.mark.parametrize(("command", "key"), LISTS)
def test_lists_are_written_with_commas(command, key):
    text, value, beside = LISTS[command, key]
    recipe = load(command, *NEEDED[command], *beside, f"{key}={text}")
    for part in key.split("."):
        recipe = getattr(recipe, part)
    assert list(recipe) == value
    with pytest.raises(UserError, match="nothing stands between two commas"):
        load(command, *NEEDED[command], *beside, f"{key}={text},")


def test_a_path_may_hold_a_comma(tmp_path):
    (tmp_path / "a,b.txt").write_text("text")
    assert load("train", f"data.train={tmp_path}/a,b.txt").data.train == [f"{tmp_path}/a,b.txt"]
    assert load("eval", "data=2020-01-01").data == ["2020-01-01"]
    many = [f"task_{n}" for n in range(99)]  # longer than the name of a file may be
    assert load("eval", f"tasks={','.join(many)}").tasks == many


def test_an_unknown_recipe_is_named_with_all_there_are():
    with pytest.raises(
        UserError, match=r"unknown train recipe 'retro': did you mean 'retrofit'\? choose from base, demo, "
    ):
        read_recipe("train", "retro")
    for kind, name in (("train", "my.yaml"), ("eval", "typo")):
        with pytest.raises(UserError, match=f"^{name}: no such recipe file$"):
            read_recipe(kind, name)


EXITS = ["objectives.exits.target=labels"]
GATE = ["objectives.exit_gate.stage=gate"]
TASKS = ["data=[]", "tasks=arc_easy"]
STREAMED = ["data.streaming=true", "steps=1"]
STEPS = ["recurrence.schedule=steps", "recurrence.levels={0: 2}"]
# (command, key): settings beside which the key has no effect, a value, and the key that gives it one.
WITHOUT_EFFECT: list[tuple[str, str, list[str], str, list[str]]] = [
    ("train", "data.window", [], "10", STREAMED),
    ("train", "data.group", [], "hops", ["data.eval=task:hops"]),
    ("train", "data.long_documents", [], "skip", ["data.packing_strategy=bfd"]),
    ("train", "data.text_field", ["data.chat_field=messages"], "text", ["data.chat_field=null"]),
    ("train", "data.cache", STREAMED, "kept", ["data.streaming=false"]),
    ("train", "recurrence.min", [], "2", ["recurrence.sampler=uniform"]),
    ("train", "recurrence.max", [], "9", ["recurrence.sampler=uniform"]),
    ("train", "recurrence.ramp", [], "0.5", ["recurrence.schedule=linear"]),
    ("train", "recurrence.levels", [], "{0: 2}", ["recurrence.schedule=steps"]),
    ("train", "recurrence.mean", STEPS, "4", ["recurrence.schedule=linear", "recurrence.levels=null"]),
    ("train", "recurrence.backprop_schedule", [], "constant", ["recurrence.backprop=4"]),
    (
        "train",
        "recurrence.backprop_ramp",
        ["recurrence.backprop=4"],
        "0.5",
        ["recurrence.backprop_schedule=1-sqrt"],
    ),
    ("train", "recurrence.backprop_levels", [], "{0: 2}", ["recurrence.backprop_schedule=steps"]),
    (
        "train",
        "recurrence.backprop",
        ["recurrence.backprop_schedule=steps", "recurrence.backprop_levels={0: 2}"],
        "4",
        ["recurrence.backprop_schedule=constant", "recurrence.backprop_levels=null"],
    ),
    ("train", "recurrence.eval_at", [], "1,2", ["data.eval=held.txt"]),
    ("train", "eval_every", [], "5", ["data.eval_fraction=0.1"]),
    (
        "train",
        "objectives.exits.scale",
        ["objectives.exits.target=labels"],
        "0.3",
        ["objectives.exits.weights=layerskip"],
    ),
    (
        "train",
        "objectives.exits.intermediate",
        ["objectives.exits.weights=layerskip"],
        "0.3",
        ["objectives.exits.weights=constant"],
    ),
    ("train", "objectives.exit_gate.entropy", GATE, "0.2", ["objectives.exit_gate.stage=joint"]),
    ("train", "objectives.exit_gate.entropy_end", GATE, "0.2", ["objectives.exit_gate.stage=joint"]),
    ("train", "objectives.exit_gate.slope", ["objectives.exit_gate.stage=joint"], "9", GATE),
    ("train", "objectives.exit_gate.threshold", ["objectives.exit_gate.stage=joint"], "0.1", GATE),
    ("train", "optimiser.train", GATE, "core", ["objectives.exit_gate.stage=joint"]),
    ("train", "optimiser.cooldown", [], "0.2", ["optimiser.schedule=wsd"]),
    ("train", "optimiser.muon_learning_rate", [], "1e-3", ["optimiser.kind=muon"]),
    ("train", "optimiser.muon_momentum", [], "0.9", ["optimiser.kind=muon"]),
    ("train", "optimiser.muon_adjust", [], "match_rms_adamw", ["optimiser.kind=muon"]),
    ("eval", "engine", ["data=task:hops", "exit_sweep=cosine"], "lanes", ["exit_sweep=null"]),
    ("eval", "router_inference", TASKS, "topk", ["data=text.txt", "tasks=[]"]),
    ("eval", "router_inference", ["data=task:hops", "endpoint=http://a/v1"], "topk", ["endpoint=null"]),
    ("eval", "baseline", [], "plain", TASKS),
    ("eval", "num_fewshot", [], "2", TASKS),
    ("eval", "apply_chat_template", [], "true", TASKS),
    ("eval", "system_instruction", [], "Answer.", TASKS),
    ("eval", "gen_kwargs", [], "{max_gen_toks: 9}", TASKS),
    ("eval", "log_samples", [], "true", TASKS),
    ("eval", "chat_field", TASKS, "messages", ["data=text.txt", "tasks=[]"]),
    ("eval", "precision", ["endpoint=http://a/v1", "chat_field=messages"], "bfloat16", ["endpoint=null"]),
    ("eval", "exit_sweep", TASKS, "kl", ["data=text.txt", "tasks=[]"]),
    ("eval", "engine", [*TASKS, "endpoint=http://a/v1"], "lanes", ["endpoint=null"]),
    ("eval", "request", [], "{exit_rule: kl}", [*TASKS, "engine=lanes"]),
    ("convert", "state_std", [], "0.1", ["state_init=normal"]),
    ("convert", "router.thresholds", ["router.inference=topk"], "0.5,0.5", ["router.inference=threshold"]),
    ("convert", "exit.threshold", ["exit.rule=fixed", "method=recursive"], "0.1", ["exit.rule=cosine"]),
    ("convert", "exit.min_recurrences", ["exit.rule=fixed", "method=recursive"], "2", ["exit.rule=cosine"]),
    ("convert", "exit.rule", [], "cosine", ["method=recursive"]),
    ("convert", "exit.rule", ["method=recursive", "sharing=sequence"], "cosine", ["sharing=cycle"]),
    ("eval", "thresholds", [], "4", ["exit_sweep=cosine"]),
    ("eval", "kv_policy", [], "first", ["exit_sweep=cosine"]),
    ("eval", "min_recurrences", [], "2", ["exit_sweep=cosine"]),
    ("eval", "prompt_exit", [], "true", ["exit_sweep=cosine"]),
    ("generate", "max_in_flight", [], "8", ["decoder=wave"]),
    ("generate", "draft_every", [], "2", ["decoder=wave"]),
    ("generate", "draft_depths", [], "1,2", ["decoder=wave"]),
    ("generate", "logprobs", [], "2", ["details=true"]),
    ("generate", "top_p", ["temperature=0"], "0.9", ["temperature=1"]),
    ("generate", "top_k", ["temperature=0"], "5", ["temperature=1"]),
    ("generate", "min_p", ["temperature=0"], "0.1", ["temperature=1"]),
    ("generate", "seed", ["temperature=0"], "1", ["temperature=1"]),
    ("generate", "exit_threshold", ["exit_rule=fixed"], "0.1", ["exit_rule=cosine"]),
    ("generate", "min_recurrences", ["exit_rule=fixed"], "2", ["exit_rule=cosine"]),
    ("generate", "prompt_exit", ["exit_rule=fixed"], "true", ["exit_rule=cosine"]),
    ("generate", "kv_policy", ["exit_rule=fixed"], "last-exited", ["exit_rule=cosine"]),
]
# Keys that have an effect beside every other, or are refused where they meet what they contradict, the model or the
# text; their tests are those of what they do.
WITH_EFFECT = {
    "train": """data.train data.phases data.eval data.eval_fraction data.streaming data.chat_field data.split
        data.subset data.sequence_length data.packing_strategy data.separate_documents data.bad_records
        data.recurrences.field data.recurrences.table objectives.progressive.alpha objectives.deep_supervision.segments
        recurrence.schedule recurrence.sampler recurrence.capacity_warmup
        objectives.cross_entropy objectives.average objectives.nested objectives.distillation.weight
        objectives.distillation.teacher objectives.distillation.revision objectives.distillation.num_recurrences
        objectives.distillation.divergence objectives.distillation.temperature objectives.distillation.top_k
        objectives.exits.weights objectives.exits.target objectives.exit_gate.stage objectives.router.auxiliary
        objectives.router.balancing objectives.router.z_loss objectives.router.bias_step objectives.ponder.weight
        objectives.experts
        adapters.rank adapters.alpha adapters.dropout adapters.targets optimiser.kind optimiser.multipliers
        optimiser.learning_rate optimiser.schedule optimiser.warmup optimiser.weight_decay optimiser.betas
        optimiser.clip revision steps epochs batch_size gradient_accumulation precision gradient_checkpointing compile
        dtype seed log_every save_every keep_checkpoints report_to""",
    "convert": """method loops sharing init sizes layers.prelude layers.core layers.coda influence lora.rank
        lora.targets lora.init lora.dora router.kind router.capacity router.alpha router.temperature
        router.gate router.network router.update router.auxiliary router.kv router.inference injection recurrence_norm
        recurrence_damping
        recurrence_residual recurrence_encoding halting state_init num_recurrences max_recurrences
        kv_policy dtype dequantize device workers revision seed""",
    "generate": """prompt max_tokens num_recurrences max_recurrences exit_rule decoder temperature
        max_num_seqs max_model_len dtype
        repetition_penalty presence_penalty frequency_penalty
        details revision""",
}


@pytest.mark.parametrize("command", WITH_EFFECT)
def test_every_key_has_an_effect_or_is_tested_here(command):
    tested = {key for of, key, *_ in WITHOUT_EFFECT if of == command}
    assert {key for key, _ in keys(MODELS[command])} == tested | {*WITH_EFFECT[command].split()}


@pytest.mark.parametrize(("command", "key", "off", "value", "on"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(command, key, off, value, on, tmp_path):
    needed = [*NEEDED[command], *off, f"{key}={value}"]
    with pytest.raises(UserError, match=f"^{key}=.* has no effect: "):
        load(command, *needed)
    assert not [one for one in unused(load(command, *needed, *on)) if one.key == key]
    # A file of the user's is held to the same, unless the command line turned off what the key belongs to.

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settled(MODELS[command], {}, [*needed, *on])))
    load(command, recipe=str(file))


@pytest.mark.parametrize("path", sorted((RECIPES).glob("*/*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_set_nothing_in_vain(path):
    command = path.parent.name
    if command in MODELS:
        text = [] if "phases" in yaml.safe_load(path.read_text()).get("data", {}) else NEEDED["train"]
        needed = [*text, *(["objectives.distillation.teacher=t"] if path.stem == "distill" else [])]
        load(command, *(needed if command == "train" else []), recipe=path.stem)


@pytest.mark.parametrize(
    "value", ["2020-99-99", "!!int abc", "0b_", "!!timestamp abc", "!!float x", "[" * 3000, "9" * 5000, "{a: 1, a: 2}"]
)
def test_values_that_are_no_yaml_are_one_line(value, tmp_path, monkeypatch):
    as_text = {**yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str}
    monkeypatch.setattr(yaml.SafeLoader, "yaml_constructors", as_text)  # as lm-format-enforcer sets it
    with pytest.raises(UserError) as caught:
        load("train", "data.train=text.txt", f"seed={value}")
    assert str(caught.value).startswith("'seed=")
    assert len(str(caught.value)) < 400
    (tmp_path / "recipe.yaml").write_text(f"seed: {value}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: "):
        read_recipe("train", str(tmp_path / "recipe.yaml"))


def test_recipes_in_other_encodings_are_named(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes("data: {train: café.txt}\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"recipe\.yaml: not a YAML file in UTF-8 \(.* at byte 17\)"):
        read_recipe("train", str(file))
    file.write_bytes("data: {train: café.txt}\r\n".encode("utf-8-sig"))
    assert read_recipe("train", str(file)) == {"data": {"train": "café.txt"}}


BOMB = ["seed: [&a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
BOMB += [f"&{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (", ".join(BOMB) + "]", "its aliases add more than 1,048,576 characters"),
        ("a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 20) + "]", "its aliases add more than"),
        ("a: &a {b: *a}", "an alias stands inside of its own value"),
        ("\n".join(f"k{number}: 1" for number in range(60_000)), "588,889 bytes; a recipe has at most 262,144"),
        ("\n".join(f"k{number}: 1" for number in range(5_000)) + "\nk7: 1", "the key 'k7' stands twice"),
    ],
    ids=["lists", "a text", "itself", "a large file", "many keys"],
)
def test_a_recipe_takes_little_time_and_memory(text, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as error:
        read_recipe("train", str(tmp_path / "recipe.yaml"))
    assert time.monotonic() - start < 5
    assert len(str(error.value)) < 600


def test_aliases_of_a_recipe_mean_their_values(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]")
    assert read_recipe("train", str(tmp_path / "recipe.yaml")) == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}] * 2,
    }

"""Code in a checkpoint: no command runs it, and no output carries it on."""

from __future__ import annotations

import ast
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.load import code_of, read_model, read_tokenizer
from tests.helpers import canaries
from tests.helpers.repository import ROOT
from tests.helpers.serve_tiny import tokenizer
from tests.helpers.serving import Server, free_port
from tests.helpers.train_tiny import save_for_all_commands, save_recurrent

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
PACKAGES = ("loopwise", "convert", "train", "serve", "evaluation")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """A plain model, a recurrent one that can be exported and served, and a text."""
    plain, recurrent, text = save_for_all_commands(tmp_path_factory.mktemp("trust"), tokenizer())
    return SimpleNamespace(plain=plain, recurrent=recurrent, text=text)


TRAINING = ["data.sequence_length=32", "batch_size=2", "steps=1", "log_every=1"]
COMMANDS = {  # verb: does it read the plain model, arguments (M the model, R a sound one, T the text, O the output)
    "convert": (True, "convert M O sizes=1,2,1 num_recurrences=2"),
    "train": (False, f"train M O data.train=T {' '.join(TRAINING)}"),
    "eval": (False, "eval M data=T sequence_length=32 limit=2 num_recurrences=1"),
    "search": (True, "search M data=T sequence_length=32 limit=2 sizes=1 stride=3 ways=skip"),
    "calibrate": (False, "calibrate M O data=T rule=latent-diff sequence_length=32 limit=4 budget=9"),
    "plot": (False, "plot text M text=again --out O.html"),
    "generate": (False, "generate M prompt=again max_tokens=2"),
    "inspect": (False, "inspect M"),
    "export": (False, "export M O --unroll 2"),
    "teacher": (False, f"train R O data.train=T objectives.distillation.teacher=M {' '.join(TRAINING)}"),
}
SOME = [
    ("eval", "a kernel of the hub"),
    ("convert", "auto_map of config.json"),
    ("calibrate", "files with Loopwise's names"),
    ("teacher", "an adapter"),
]
EVERY = [(verb, place) for verb in COMMANDS for place in canaries.PLACES]


def arguments(verb: str, model: Path, models: SimpleNamespace, folder: Path) -> list[str]:
    """The command line of `verb` for `model`."""
    names = {"M": str(model), "R": str(models.recurrent), "T": str(models.text), "O": str(folder / "out")}
    found = []
    for word in COMMANDS[verb][1].split():
        key, eq, value = word.rpartition("=")
        stem, dot, suffix = value.partition(".")
        found.append(key + eq + names.get(stem, stem) + dot + suffix)
    return found


def check_quiet(verb: str, place: str, models: SimpleNamespace, folder: Path, capsys, monkeypatch) -> None:
    """Run `verb` on a model with code in `place`: refused in one line, or done without it; outputs have none of it."""
    plain = COMMANDS[verb][0]
    model, canary = canaries.poisoned(models.plain if plain else models.recurrent, folder, place)
    canaries.fake_kernels(monkeypatch, canary)
    capsys.readouterr()
    status = main(arguments(verb, model, models, folder))
    errors = capsys.readouterr().err
    assert not canary.exists(), (verb, place)
    assert status in (0, 2), errors
    unread = {"inspect": ("auto_map of the tokenizer", "pickled weights"), "teacher": ("auto_map of the tokenizer",)}
    if place in canaries.REFUSED and place not in unread.get(verb, ()):
        assert status == 2, (verb, place)
    if status == 2:
        assert errors.count("loopwise: error: ") == 1
        assert not (folder / "out").exists()
    for file in (folder / "out").rglob("*"):
        assert file.suffix != ".py" or canary.name not in file.read_text(encoding="utf-8"), file
        assert not file.name.startswith(("foreign", "tokenization_foreign")), file
        assert file.suffix != ".json" or "foreign." not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize(("verb", "place"), SOME)
def test_code_of_a_checkpoint_stays_quiet(verb, place, models, tmp_path, capsys, monkeypatch):
    check_quiet(verb, place, models, tmp_path, capsys, monkeypatch)


def test_a_calibrated_copy_has_files_of_a_model_alone(models, tmp_path):
    """Weights, config, tokenizer, card and licences come along; pickles, programs, notes and secrets do not."""
    model, found = shutil.copytree(models.recurrent, tmp_path / "model"), []
    (model / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "README.md", "additional_chat_templates/tool.jinja"):
        (model / name).write_text("of the model")
    for out in (tmp_path / "clean", tmp_path / "out"):
        told = arguments("calibrate", model, models, tmp_path)
        assert main([str(out) if word == str(tmp_path / "out") else word for word in told]) == 0
        found.append({str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()})
        for name in ("optimizer.pt", "training_args.bin", "kernel.so", "x.pyc", ".env", "notes.txt", "run.json"):
            (model / name).write_text("not of the model")
    assert found[0] == found[1] == {*json.loads((tmp_path / "out" / "loopwise.json").read_text())["files"]}
    kept = {
        str(file.relative_to(model))
        for file in model.rglob("*")
        if file.is_file() and file.suffix != ".py" and "not of" not in file.read_text("latin-1")
    }
    assert {name for name in found[1] - kept if not name.endswith(".py")} == {"loopwise.json", "calibration.json"}
    assert not kept - found[1]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "place"), EVERY)
def test_every_place_stays_quiet_for_every_verb(verb, place, models, tmp_path, capsys, monkeypatch):
    check_quiet(verb, place, models, tmp_path, capsys, monkeypatch)


def test_the_canaries_can_fire(tmp_path):
    canary = tmp_path / "canary"
    exec(canaries.code(canary), {})
    assert canary.exists()
    canary.unlink()
    pickle.loads(pickle.dumps(canaries.Fires(canary)))
    assert canary.exists()


def test_the_canary_of_a_kernel_can_fire(models, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model, canary = canaries.poisoned(models.plain, tmp_path, "a kernel of the hub")
    canaries.fake_kernels(monkeypatch, canary)
    with suppress(Exception):  # the kernel has no functions
        AutoModelForCausalLM.from_pretrained(model)
    assert canary.exists()


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_no_kernel_is_fetched_for_quantized_weights(verb, models, tmp_path, monkeypatch, capsys):
    model = canaries.shutil.copytree(models.recurrent, tmp_path / "m")
    canaries.change(model / "config.json", quantization_config={"quant_method": "mxfp4"})
    canaries.fake_kernels(monkeypatch, tmp_path / "canary")
    assert main(arguments(verb, model, models, tmp_path)) == 2
    assert "weights are quantized" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def eval_task(models: SimpleNamespace, *given: str) -> int:
    return main(["eval", str(models.recurrent), "num_recurrences=1", *given])


@pytest.mark.parametrize("kind", canaries.TASKS)
def test_code_of_a_task_file_stays_quiet(kind, models, tmp_path, capsys):
    file, canary = canaries.write_task(tmp_path, kind)
    assert eval_task(models, f"tasks={file}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "loopwise: error: " in line]
    assert len(errors) == 1
    assert "template" in errors[0] or "which is not run" in errors[0]
    if "function" in kind:
        assert f"{file.parent}/theirs.py" in errors[0]
    assert not canary.exists()


def test_a_recipe_of_others_names_a_task_file_that_stays_quiet(models, tmp_path, capsys):
    file, canary = canaries.write_task(tmp_path, "a function")
    (tmp_path / "recipe.yaml").write_text(f"tasks: [{file}]\n")
    assert eval_task(models, "--recipe", str(tmp_path / "recipe.yaml")) == 2
    search = ["search", str(models.plain), f"tasks={file}", "sizes=1", "stride=3", "ways=skip"]
    assert main(search) == 2
    assert not canary.exists()


EVAL_OF_RECORDS = """
group: all
dataset_path: json
dataset_kwargs: {data_files: {test: CODE}}
test_split: test
"""


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("unsafe_code: false\ntask: [cruxeval_input]", "unsafe_code=false: tasks of lm-eval"),
        ("task: [{task: cruxeval_input, unsafe_code: false}]", "unsafe_code=false: tasks of lm-eval"),
        ("task: [{group: inner, unsafe_code: false, task: [cruxeval_input]}]", "unsafe_code=false: tasks of lm-eval"),
        ("task: [cruxeval_input]", "task cruxeval_input runs code that the model writes"),
        ("process_docs: null\ntask: [non_greedy_robustness_math_algebra]", "runs code that the model writes"),
    ],
)
def test_no_file_takes_the_mark_of_a_task_that_runs_code_away(lines, said, tmp_path, monkeypatch):
    import lm_eval.tasks

    from loopwise.evaluation.harness import catalogue

    # These two folders alone: an index of all tasks takes ten seconds.
    folders: list[str | Path] = [Path(lm_eval.tasks.__file__).parent / name for name in ("cruxeval", "score/math")]
    manager = partial(catalogue.TaskManager, include_path=folders)
    monkeypatch.setattr(catalogue, "TaskManager", lambda **_: manager(include_defaults=False))
    canary, data, file = tmp_path / "canary", tmp_path / "code.jsonl", tmp_path / "t.yaml"
    fields = ("question", "answer", "prompt", "problem", "solution")
    record = {"code": canaries.code(canary), "input": "1", "output": "1", **dict.fromkeys(fields, "1")}
    data.write_text(json.dumps(record) + "\n")
    file.write_text(EVAL_OF_RECORDS.replace("CODE", str(data)) + lines + "\n")
    with pytest.raises(UserError, match=said):
        catalogue.load_tasks([str(file)])
    assert not canary.exists()


def test_every_task_of_lm_eval_that_evaluates_text_is_known():
    """Those of cruxeval and longproc have the mark; that of score/math has none, and is named in the catalogue."""
    import lm_eval.tasks

    from loopwise.evaluation.harness.catalogue import EVALUATING

    root = Path(lm_eval.tasks.__file__).parent
    evaluates = re.compile(r"(?<![\w.])(?:eval|exec|parse_expr|sympify|os\.system)\(")
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if evaluates.search(file.read_text("utf-8"))}
    assert found == {"cruxeval/utils.py", "longproc/metrics.py", "score/math/math_grader.py"}
    assert EVALUATING == ("lm_eval.tasks.score.math.utils_math",)


@pytest.mark.parametrize("kind", ["a function", "a metric of the short form"])
def test_the_flag_names_code_of_a_task_file_before_it_runs(kind, tmp_path, capsys):
    """Code that ends the process keeps no line back."""
    from loopwise.evaluation.harness.catalogue import load_tasks

    file, _ = canaries.write_task(tmp_path, kind)
    (file.parent / "theirs.py").write_text("raise SystemExit(7)\n")
    with pytest.raises(SystemExit, match="7"):
        load_tasks([str(file)], trust=True)
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("--trust-remote-code: ")
    assert f"{file.parent}/theirs.py" in told
    assert told.endswith(" will run")


@pytest.mark.parametrize("kind", ["a function", "a file of elsewhere"])
def test_the_flag_names_and_runs_functions_of_a_task_file(kind, models, tmp_path, capsys):
    file, canary = canaries.write_task(tmp_path, kind)
    assert eval_task(models, f"tasks={file}", "--trust-remote-code") == 0
    assert canary.exists()
    elsewhere = f"{tmp_path}/outer.txt, which it includes, " * (kind != "a function")
    told = capsys.readouterr().err
    assert f"--trust-remote-code: {elsewhere}{file.parent if not elsewhere else tmp_path}/" in told
    assert "theirs.py will run\n" in told
    assert eval_task(models, f"data={models.text}", "--trust-remote-code") == 2
    assert "--trust-remote-code has no effect" in capsys.readouterr().err


@needs_vllm
@pytest.mark.parametrize("place", canaries.REFUSED)
def test_serve_refuses(place, models, tmp_path, capsys):
    model, canary = canaries.poisoned(models.recurrent, tmp_path, place)
    assert main(["serve", str(model), f"port={free_port()}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not canary.exists()


@needs_vllm
@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_a_server_runs_nothing_of_its_model(tmp_path, monkeypatch):
    """The places that `serve` does not refuse, all in one checkpoint, which is also SageMaker's model directory."""
    left = [place for place in canaries.PLACES if place not in canaries.REFUSED]
    sizes = {"eos_token_id": 257, "head_dim": 32}  # vLLM's attention on CPUs takes no heads of 16
    served = save_recurrent(tmp_path / "served", tokenizer(), sizes, injection="none")
    model, canary = canaries.poisoned(served, tmp_path, left[0])
    for place in left[1:]:
        canaries.PLACES[place](model, canary)
    monkeypatch.setenv("SAGEMAKER_MODEL_PATH", str(model))
    server = Server(model, "--", "--enforce-eager", "--max-model-len", "64")
    try:
        server.wait_until(server.healthy, 240)
    finally:
        server.kill()
    assert not canary.exists()


@needs_vllm
def test_the_model_script_of_sagemaker_is_not_run(tmp_path, monkeypatch):
    from fastapi import FastAPI
    from model_hosting_container_standards.sagemaker import bootstrap
    from model_hosting_container_standards.sagemaker.sagemaker_loader import SageMakerFunctionLoader

    from loopwise.serve.vllm.trusted import without_model_script

    (tmp_path / "model.py").write_text(canaries.code(tmp_path / "canary"))
    monkeypatch.setenv("SAGEMAKER_MODEL_PATH", str(tmp_path))
    monkeypatch.setattr(SageMakerFunctionLoader, "_default_function_loader", None)
    without_model_script()
    bootstrap(FastAPI())
    assert not (tmp_path / "canary").exists()
    assert SageMakerFunctionLoader.load_function_from_spec("os:getpid") is not None  # what the operator names


def test_trusted_code_is_named(models, tmp_path, capsys):
    model, canary = canaries.poisoned(models.recurrent, tmp_path, "auto_map of the tokenizer")
    assert code_of(model) == [str(model / "tokenization_foreign.py")]
    assert code_of(models.recurrent) == []  # its config's code is Loopwise's own
    canaries.change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": "their/repo--tokens.Theirs"})
    assert code_of(model) == ["tokens.py of the hub's their/repo"]
    with pytest.raises(UserError, match="which is not run"):
        read_tokenizer(model)
    assert not canary.exists()
    for file in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):  # whatever they say
        foreign = tmp_path / file
        foreign.mkdir()
        canaries.change(foreign / file, model_type="recurrent_depth", auto_map={"AutoTokenizer": [None, "tok.Tok"]})
        assert code_of(foreign) == [str(foreign / "tok.py")]


@needs_vllm
def test_the_flag_prints_what_it_runs(models, tmp_path):
    from loopwise.serve.vllm.trusted import trusted_code

    model, _ = canaries.poisoned(models.recurrent, tmp_path, "auto_map of the tokenizer")
    args = SimpleNamespace(trust_remote_code=True, tokenizer=None)
    assert trusted_code(args, str(model)) == [f"--trust-remote-code: {model}/tokenization_foreign.py will run"]
    assert trusted_code(args, str(models.recurrent)) == ["--trust-remote-code: no file to run"]
    args.trust_remote_code = False
    assert trusted_code(args, str(model)) == []


@needs_vllm
def test_serve_names_code_of_a_tokenizer_before_it_runs(models, tmp_path):
    """Code that ends the process keeps no line back."""
    model, _ = canaries.poisoned(models.recurrent, tmp_path, "auto_map of the tokenizer")
    (model / "tokenization_foreign.py").write_text("raise SystemExit(7)\n")
    command = ["serve", str(model), f"port={free_port()}", "--", "--trust-remote-code", "--enforce-eager"]
    done = subprocess.run([sys.executable, "-m", "loopwise", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 7
    named = f"loopwise: --trust-remote-code: {model}/tokenization_foreign.py will run"
    assert done.stderr.splitlines().count(named) == 1, done.stderr


def test_the_flag_runs_no_code_of_the_hub(models, tmp_path):
    """Nobody could read it before; the line said that no file would run."""
    from loopwise.serve.vllm.trusted import trusted_code

    args = SimpleNamespace(trust_remote_code=True, tokenizer="their/repo")
    with pytest.raises(UserError, match="--tokenizer their/repo is none: download it by `hf download their/repo"):
        trusted_code(args, str(models.recurrent))
    args.tokenizer = str(canaries.poisoned(models.recurrent, tmp_path, "auto_map of the tokenizer")[0])
    assert trusted_code(args, str(models.recurrent))[0].endswith("tokenization_foreign.py will run")
    args.trust_remote_code, args.tokenizer = False, "their/repo"
    assert trusted_code(args, str(models.recurrent)) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attn_implementation": "org/kernel"}, "choose from eager, sdpa, flash_attention_2, flash_attention_3"),
        ({"_attn_implementation": {"": "sdpa", "text_config": "org/kernel"}}, "choose from"),
        ({"_attn_implementation_internal": "org/kernel"}, "choose from"),
        ({"text_config": {"attn_implementation": "paged|org/kernel"}}, "choose from"),
        ({"layers": [{"attn_implementation": "org/kernel"}]}, "choose from"),
        ({"attn_implementation": 7}, "choose from"),
        ({"attn_implementation": "flash_attention_2"}, "needs the package flash_attn"),
        ({"experts_implementation": "sonicmoe"}, "choose from eager, grouped_mm, batched_mm"),
        ({"attn_implementation": "sdpa", "experts_implementation": None}, None),
    ],
)
def test_kernels_of_the_hub_are_refused(fields, said, models, tmp_path, capsys):
    model = tmp_path / "m"
    canaries.shutil.copytree(models.recurrent, model)
    canaries.change(model / "config.json", **fields)
    status = main(["inspect", str(model)])
    assert (status == 2) == (said is not None)
    assert said is None or said in capsys.readouterr().err


def test_a_model_is_loaded_without_the_names_of_its_code(models, tmp_path):
    model, _ = canaries.poisoned(models.plain, tmp_path, "auto_map of config.json")
    read_model(model).save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_one_file_loads_what_others_made():
    """`from_pretrained` stands in loopwise/load.py alone, but for a GGUF file's tokenizer and weights."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            if package == "loopwise" and any((ROOT / "loopwise" / p) in file.parents for p in PACKAGES[1:]):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "get_config_dict"):
                    found.setdefault(str(file.relative_to(ROOT)), []).append(ast.unparse(node))
    load = found.pop("loopwise/load.py")
    assert len(load) >= 5
    assert found == {
        "loopwise/gguf_source.py": ["PreTrainedTokenizerFast.from_pretrained"],
        "train/pretrained.py": ["type(empty).from_pretrained"],  # with weights in memory
    }

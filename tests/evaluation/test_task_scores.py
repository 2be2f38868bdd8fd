"""`loopwise eval tasks=...`: scores by depth, their file, its resumption, and errors of one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from loopwise.bounded import bounded
from loopwise.cli import main
from loopwise.evaluation.harness import pairs
from loopwise.evaluation.harness.local import read_short
from loopwise.train.tasks import tokenizer
from tests.helpers.blocked import without
from tests.helpers.questions import CHOSEN
from tests.helpers.train_tiny import run


@pytest.fixture(scope="module")
def source(asked, tmp_path_factory) -> Path:
    """A plain model."""
    folder = tmp_path_factory.mktemp("source") / "plain"
    run(["export", str(asked / "model"), str(folder), "--unroll", "2"])
    return folder


def tasks_of(asked: Path) -> str:
    return f"tasks={asked}/generated.yaml,{asked}/chosen.yaml"


def rows(out: Path) -> dict[tuple[str, Any], dict[str, Any]]:
    """The results in a file, by task and depth; "baseline" for the baseline's."""
    found = json.loads(out.read_text())["results"]
    return {(row["task"], "baseline" if row["baseline"] else row["num_recurrences"]): row for row in found}


def test_scores_of_two_tasks_at_three_depths_and_of_the_source(asked, source, tmp_path, capsys):
    out = tmp_path / "scores.json"
    given = ["eval", str(asked / "model"), tasks_of(asked), "num_recurrences=1,2,4", f"baseline={source}"]
    run([*given, "--out", str(out), "log_samples=true"])
    shown, told = capsys.readouterr()
    found = rows(out)
    assert list(found) == [(task, depth) for task in ("generated", "chosen") for depth in ("baseline", 1, 2, 4)]
    for (task, depth), row in found.items():
        right = [one["score"] for one in row["logged"]]
        assert row["samples"] == len(right) == 24
        assert row["score"] == pytest.approx(sum(right) / 24)
        assert row["metric"] == {"generated": "exact_match,none", "chosen": "acc,none"}[task]
        assert row["score_error"] == pytest.approx((row["score"] * (1 - row["score"]) / 23) ** 0.5)
        assert 0.1 < row["score"] < 0.9
        assert row["mean_recurrences"] == (None if depth == "baseline" else depth)
        assert row["beyond_trained"] == (depth == 4)
        assert row["seconds_per_token"] == row["seconds"] / row["tokens"]
    assert len({tuple(one["score"] for one in found["generated", depth]["logged"]) for depth in (1, 2, 4)}) == 3
    for task in ("generated", "chosen"):  # the source is the model at R=2
        assert found[task, "baseline"]["logged"] == found[task, 2]["logged"]
        assert found[task, "baseline"]["flops_per_token"] == found[task, 2]["flops_per_token"]
        steps = [found[task, depth]["flops_per_token"] for depth in (1, 2, 4)]
        assert steps[2] - steps[1] == 2 * (steps[1] - steps[0]) > 0
    assert told.count("num_recurrences=4: this model was trained at 1 to 2 recurrences (mean 1.5), and not beyond") == 1
    assert out.with_suffix(".md").read_text() == shown
    lines = shown.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")][3:-1] == ["questions", "baseline", "R=1", "R=2", "R=4 †"]
    assert f"{found['chosen', 4]['score']:.3f} ± {found['chosen', 4]['score_error']:.3f}" in lines[5]
    assert lines[-1] == "† beyond the 1 to 2 recurrences (mean 1.5) that the model was trained at"


def test_tokens_are_those_of_prompts_and_answers(asked, tmp_path):
    model: Any = AutoModelForCausalLM.from_pretrained(asked / "model")
    known = tokenizer("hops")
    (tmp_path / "few.jsonl").write_text('{"question": "abc", "answer": "x"}\n{"question": "abcdefgh", "answer": "y"}\n')
    task = "data: few.jsonl\ngeneration_kwargs: {max_gen_toks: 7, until: [zzzz]}\n"
    (tmp_path / "few.yaml").write_text(task)
    out = tmp_path / "few.json"
    run(["eval", str(asked / "model"), f"tasks={tmp_path}/few.yaml", "--out", str(out), "num_recurrences=2"])
    [row] = rows(out).values()
    prompts = [known(text).input_ids for text in ("abc", "abcdefgh")]
    import torch

    made = [
        model.generate(torch.tensor([ids]), num_recurrences=2, max_new_tokens=7, do_sample=False).shape[1]
        for ids in prompts
    ]
    assert row["tokens"] == sum(made)


def test_finished_pairs_are_not_measured_again(asked, tmp_path, monkeypatch, capsys):
    """After an interruption the rest is measured; another depth or task adds to the file."""
    measured = []
    measure = pairs.scores

    def counted(lm, task, name, recipe):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((name, lm.depth))
        return measure(lm, task, name, recipe)

    monkeypatch.setattr(pairs, "scores", counted)
    out = tmp_path / "scores.json"
    given = ["eval", str(asked / "model"), tasks_of(asked), "limit=4", "--out", str(out)]
    assert main([*given, "num_recurrences=1,2"]) == 130
    assert list(rows(out)) == measured == [("generated", 1), ("generated", 2), ("chosen", 1)]
    before = rows(out)
    measured.clear()
    run([*given, "num_recurrences=1,2"])
    assert measured == [("chosen", 2)]
    assert "3 of 4 pairs of task and depth are there" in capsys.readouterr().err
    measured.clear()
    run([*given, "num_recurrences=1,2,3"])
    assert measured == [("generated", 3), ("chosen", 3)]
    assert {pair: rows(out)[pair] for pair in before} == before
    measured.clear()
    run([*given, "num_recurrences=1", "--force"])
    assert measured == [*rows(out)] == [("generated", 1), ("chosen", 1)]


def test_a_file_of_other_settings_models_or_tasks_is_refused(asked, tmp_path, capsys):
    out, data = tmp_path / "scores.json", tmp_path / "few.jsonl"
    data.write_text('{"question": "abc", "answer": "x"}\n')
    given = ["eval", str(asked / "model"), f"tasks={data}", "--out", str(out)]
    run(given)
    for change, line in (
        (
            ["limit=1"],
            "it was measured with limit=null, and now limit=1; name another file, or start anew with --force",
        ),
        (["gen_kwargs.max_gen_toks=3"], 'it was measured with gen_kwargs={}, and now gen_kwargs={"max_gen_toks": 3}'),
    ):
        capsys.readouterr()
        assert main([*given, *change]) == 2
        assert f"--out {out}: {line}" in capsys.readouterr().err
    data.write_text('{"question": "abc", "answer": "y"}\n')
    assert main(given) == 2
    assert f"--out {out}: task few has changed since" in capsys.readouterr().err
    run([*given, "--force"])
    (tmp_path / "other.json").write_text('{"results": []}')
    assert main([*given[:-1], str(tmp_path / "other.json")]) == 2
    assert "is not a result of loopwise eval tasks" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("my page")
    assert main([*given[:-1], str(tmp_path / "page.json")]) == 2
    assert "page.md, which is of something else" in capsys.readouterr().err


def test_the_short_form_is_the_same_task(asked, tmp_path):
    """A .jsonl, a short .yaml beside it, and lm-eval's own task file give the same outcomes."""
    for name, more in (("generated", 'generation_kwargs: {until: ["\\n", "c"], max_gen_toks: 5}'), ("chosen", "")):
        (tmp_path / f"{name}.jsonl").write_bytes((asked / f"{name}.jsonl").read_bytes())
        (tmp_path / f"{name}.yaml").write_text(f'data: {name}.jsonl\ntarget_delimiter: ""\n{more}\n')
    found = []
    for folder in (asked, tmp_path):
        out = tmp_path / f"{folder.name}.json"
        given = ["eval", str(asked / "model"), tasks_of(folder), "num_recurrences=2", "log_samples=true"]
        run([*given, "--out", str(out)])
        found.append({pair: row["logged"] for pair, row in rows(out).items()})
    assert found[0] == found[1]


def test_solved_examples_come_from_a_file_of_their_own_or_leave_out_the_question(asked, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(3)))
    (tmp_path / "solved.jsonl").write_text('{"question": "s", "answer": "t"}\n')
    (tmp_path / "own.yaml").write_text("data: few.jsonl\nfewshot: solved.jsonl\n")
    for name, shots in (("few.jsonl", 2), ("own.yaml", 1)):
        out = tmp_path / f"{name}.json"
        given = ["eval", str(asked / "model"), f"tasks={tmp_path}/{name}", f"num_fewshot={shots}", "log_samples=true"]
        run([*given, "--out", str(out)])
        [row] = rows(out).values()
        for number, one in enumerate(row["logged"]):
            examples = [other for other in range(3) if other != number]
            orders = [examples, examples[::-1]]
            wanted = {"".join(f"q{n} a{n}\n\n" for n in order) for order in orders} if shots == 2 else {"s t\n\n"}
            assert one["prompt"] in {text + f"q{number}" for text in wanted}


LINE = '{"question": "a", "answer": "b"}\n'
CHOICE = '{"question": "a", "answer": "b", "choices": ["b", "c"]}\n'


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        (LINE + "{no\n", "data: d.jsonl", "d.jsonl:2: not JSON ("),
        (LINE + "[1]\n", "data: d.jsonl", "d.jsonl:2: a list, where an object with question and answer is due"),
        (LINE + '{"question": "a"}\n', "data: d.jsonl", "d.jsonl:2: no field 'answer' among 'question'"),
        (LINE + '{"question": "a", "answer": [1]}\n', "data: d.jsonl", "d.jsonl:2: answer=[1]: a text or a number"),
        (CHOICE + LINE, "data: d.jsonl", "d.jsonl:2: metric acc needs choices, a list of two or more"),
        (CHOICE.replace('"b",', '"d",', 1), "data: d.jsonl", "answer=\"d\": none of the choices 'b', 'c'"),
        ("\n", "data: d.jsonl", "d.jsonl: no questions in it"),
        (LINE, "data: e.jsonl", "t.yaml: data=e.jsonl: no such file"),
        (LINE, "data: d.csv", "t.yaml: data='d.csv': the path of a .jsonl file, relative to this one"),
        (LINE, "data: d.jsonl\nmetrc: acc", "t.yaml: unknown key 'metrc': did you mean 'metric'?"),
        (LINE, "data: d.jsonl\nmetric: f1", "t.yaml: metric=f1: choose from exact_match, acc"),
        (LINE, "data: d.jsonl\nchoices: [b]", "t.yaml: choices=['b']: a list of two or more answers"),
        (LINE, "data: d.jsonl\nchoices: [yes, no]", "choices=[True, False]: YAML reads yes and no as true and false"),
        (LINE, "data: d.jsonl\nchoices: [b, c]\nmetric: exact_match", "choices have no effect on metric=exact_match"),
        (LINE, "data: [", "t.yaml: not a task file ("),
        (LINE, "group: g\ntask: d", "t.yaml: task='d': the list of a group's tasks, by name or with their config"),
        (LINE, "output_type: generate_until", "t.yaml: no key 'data' (short form) or 'task' (lm-eval's) in it"),
    ],
)
def test_wrong_files_are_one_line(data, task, message, asked, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(data)
    (tmp_path / "t.yaml").write_text(task)
    assert main(["eval", str(asked / "model"), f"tasks={tmp_path}/t.yaml"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


FULL = """
task: t
dataset_path: json
dataset_kwargs: {data_files: {test: d.jsonl}}
test_split: test
doc_to_text: question
"""
SHORT = "doc_to_target: answer\ngeneration_kwargs: {until: [c], max_gen_toks: 2}\n"


@pytest.mark.parametrize("verb", ["eval", "search"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"{SHORT}process_results: x\nmetric_list: [{{metric: exact_match}}]", "TypeError: 'NoneType' object is not"),
        (f"{SHORT}metric_list: []", "StopIteration"),
        ("output_type: multiple_choice\ndoc_to_choice: [a, b]\ndoc_to_target: texts", "TypeError: '<' not supported"),
        ("doc_to_target: answer\ngeneration_kwargs: {until: [c], max_gen_toks: x}", "ValueError: invalid literal for"),
    ],
)
def test_a_wrong_key_that_lm_eval_meets_late_is_one_line(verb, lines, message, asked, source, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"question": "abc", "answer": "x", "texts": ["x"]}\n')
    (tmp_path / "t.yaml").write_text(FULL + lines + "\n")
    capsys.readouterr()
    given = ["num_recurrences=1"] if verb == "eval" else ["sizes=1", "stride=3", "ways=skip"]
    model = asked / "model" if verb == "eval" else source
    assert main([verb, str(model), f"tasks={tmp_path}/t.yaml", *given]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loopwise: error: ")]
    assert len(told) == 1
    assert f"task t: {message}" in told[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tasks=none.yaml"], "tasks=none.yaml: no such file"),
        (["TASK", "data=a.txt"], "give data=..., to measure a loss, or tasks=..., for scores; not both"),
        ([], "give data=..., to measure a loss, or tasks=..., for scores"),
        (["TASK", "chat_field=messages"], "chat_field=messages has no effect: tasks have their own data"),
        (["data=a.txt", "engine=lanes"], "engine=lanes generates answers, and text has none"),
        (["TASK", "request.exit_rule=kl"], "endpoint names none; engine=lanes takes them, too"),
        (["TASK", "engine=lanes", "request.exit_rule=kl"], "request.exit_rule has no effect on task chosen"),
        (["TASK", "baseline=MODEL"], "is a recurrent-depth model; give a plain one, as the source"),
        (["GENERATED", "gen_kwargs.max_gen_toks=256"], "answers of up to 256 tokens leave no place for a prompt"),
        (
            ["GENERATED", "engine=lanes", "gen_kwargs.num_beams=2"],
            "generation_kwargs.num_beams: engine=lanes samples by",
        ),
        (["TASK", "gen_kwargs.max_gen_toks=9"], "has no effect: all tasks compare log-likelihoods"),
        (["TASK", "--force"], "--force has no effect"),
        (["TASK,TASK"], "stands twice"),
    ],
)
def test_wrong_settings_are_one_line(settings, message, asked, capsys):
    names = {"TASK": f"tasks={asked}/chosen.yaml", "GENERATED": f"tasks={asked}/generated.yaml"}
    names |= {"baseline=MODEL": f"baseline={asked}/model", "TASK,TASK": f"tasks={asked}/a.yaml,{asked}/a.yaml"}
    assert main(["eval", str(asked / "model"), *[names.get(one) or one for one in settings]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


def test_choices_are_named_or_counted_and_may_stand_in_the_task(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": 1, "answer": 1}\n{"question": "b", "answer": "no"}\n')
    (tmp_path / "t.yaml").write_text("data: d.jsonl\nchoices: [yes it is, 'no']\ntask: named\n")
    config = read_short(tmp_path / "t.yaml")
    assert config["task"] == "named"
    documents = config["custom_dataset"]()["test"].to_list()
    assert [(one["question"], one["answer"]) for one in documents] == [("1", 1), ("b", 1)]
    assert documents[0]["choices"] == ["yes it is", "no"]


def test_the_lane_engine_generates_the_same(asked, tmp_path):
    found = []
    for engine in ("transformers", "lanes"):
        out = tmp_path / f"{engine}.json"
        given = ["eval", str(asked / "model"), tasks_of(asked), "num_recurrences=1,4", f"engine={engine}"]
        run([*given, "log_samples=true", "batch_size=5", "--out", str(out)])
        found.append({pair: (row["logged"], row["tokens"]) for pair, row in rows(out).items()})
    assert {pair: logged for pair, (logged, _) in found[0].items()} == {
        p: logged for p, (logged, _) in found[1].items()
    }


def test_an_exit_rule_in_the_lane_engine_saves_recurrences(asked, tmp_path):
    out = tmp_path / "exits.json"
    given = ["eval", str(asked / "model"), f"tasks={asked}/generated.yaml", "num_recurrences=4", "engine=lanes"]
    run([*given, "request.exit_rule=cosine", "request.exit_threshold=0.9", "--out", str(out)])
    [row] = rows(out).values()
    assert 1 <= row["mean_recurrences"] < 4
    run([*given, "--out", str(tmp_path / "fixed.json")])
    [fixed] = rows(tmp_path / "fixed.json").values()
    assert fixed["mean_recurrences"] == 4
    assert fixed["flops_per_token"] >= row["flops_per_token"]


def test_a_group_of_tasks_has_a_row_of_its_own(asked, tmp_path, capsys):
    """At every depth, the mean over all questions of its tasks; it stands below them in the table."""
    questions = (asked / "chosen.jsonl").read_text().splitlines(keepends=True)
    part, members = yaml.safe_load(CHOSEN), []
    for name, own in (("few", questions[:6]), ("many", questions[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(own))
        files = {"data_files": {"test": f"{name}.jsonl"}}
        members.append({**part, "task": name, "dataset_kwargs": files})
    mean = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": members, "aggregate_metric_list": mean})
    )
    out = tmp_path / "both.json"
    given = ["eval", str(asked / "model"), f"tasks={tmp_path}/both.yaml", "num_recurrences=1,4", "--out", str(out)]
    run([*given, "log_samples=true"])
    shown = capsys.readouterr().out
    found = rows(out)
    assert list(found) == [(task, depth) for task in ("both::few", "both::many", "both") for depth in (1, 4)]
    for depth in (1, 4):
        row = found["both", depth]
        right = [one["score"] for task in ("both::few", "both::many") for one in found[task, depth]["logged"]]
        assert row["samples"] == len(right) == 24
        assert row["score"] == pytest.approx(sum(right) / 24)
        assert row["score_error"] is not None
        assert row["beyond_trained"] == (depth == 4)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[4:7]]
    assert [line[:3] for line in lines] == [
        ["both::few", "acc", "6"],
        ["both::many", "acc", "18"],
        ["both", "acc", "24"],
    ]
    for cell, depth in zip(lines[2][3:], (1, 4), strict=True):
        assert cell == f"{found['both', depth]['score']:.3f} ± {found['both', depth]['score_error']:.3f}"
    run([*given, "log_samples=true"])  # nothing is measured again
    assert rows(out) == found


def test_questions_in_the_chat_template(asked, tmp_path):
    """With a system message, and solved examples as turns: the prompt is the tokenizer's own."""
    from transformers import AutoTokenizer

    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"
    model = shutil.copytree(asked / "model", tmp_path / "model")
    known = AutoTokenizer.from_pretrained(model)
    known.chat_template = template
    known.save_pretrained(model)
    (tmp_path / "few.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(2)))
    out = tmp_path / "few.json"
    given = ["eval", str(model), f"tasks={tmp_path}/few.jsonl", "apply_chat_template=true", "log_samples=true"]
    run([*given, "system_instruction=be brief", "num_fewshot=1", "--out", str(out)])
    [row] = rows(out).values()
    assert [one["prompt"] for one in row["logged"]] == [
        f"[s]be brief;[u]q{other};[a]a{other};[u]q{own};[a]" for own, other in ((0, 1), (1, 0))
    ]


def test_a_tokenizer_without_a_chat_template_is_one_line(asked, tmp_path, capsys):
    model = shutil.copytree(asked / "model", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (tmp_path / "few.jsonl").write_text('{"question": "abc", "answer": "x"}\n')
    assert main(["eval", str(model), f"tasks={tmp_path}/few.jsonl", "apply_chat_template=true"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "chat template" in told[-1]
    assert len(told) == 1


def beyond_limits(monkeypatch, capsys, *arguments: str) -> list[str]:
    """Errors of `loopwise eval` with templates that may take 1 s and 0.25 GiB."""
    from loopwise.evaluation.harness import templates

    monkeypatch.setattr(templates, "bounded", lambda name: bounded(name, seconds=1, size=2**28))
    assert main(["eval", *arguments]) == 2
    return [told for told in capsys.readouterr().err.splitlines() if "error" in told]


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1 s"),
        ("{{ messages[0].content * 40000000000 }}", "needs more than 0.25 GiB of memory"),
        ("{{ raise_exception('not like this') }}", "refuses a question (not like this)"),
    ],
)
def test_a_chat_template_is_bounded(template, line, asked, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(asked / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "few.jsonl").write_text('{"question": "abc", "answer": "x"}\n')
    keys = [str(model), f"tasks={tmp_path}/few.jsonl", "apply_chat_template=true"]
    assert beyond_limits(monkeypatch, capsys, *keys) == [f"loopwise: error: the chat template {line}"]


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1 s"),
        ("{{ question * 40000000000 }}", "needs more than 0.25 GiB of memory"),
        ("{{ question * 9000000 }}", "makes more than 16,777,216 characters of text"),
        ("{{ answers }}", "refuses a question ('answers' is undefined)"),
    ],
)
def test_a_template_of_a_task_is_bounded(template, line, asked, tmp_path, capsys, monkeypatch):
    (tmp_path / "few.jsonl").write_text('{"question": "abc", "answer": "x"}\n')
    (tmp_path / "few.yaml").write_text(f"data: few.jsonl\ndoc_to_text: '{template}'\n")
    assert beyond_limits(monkeypatch, capsys, str(asked / "model"), f"tasks={tmp_path}/few.yaml") == [
        f"loopwise: error: a template of the task {line}"
    ]


@pytest.mark.slow
def test_lm_eval_s_own_tasks_have_their_functions_and_texts(monkeypatch):
    """hellaswag prepares its records by a function of its own, and asks by a template."""
    import datasets
    from lm_eval import utils

    from loopwise.evaluation.harness.catalogue import load_tasks

    record = {"ind": 1, "activity_label": "Roof", "ctx_a": "A man [x]sits.", "ctx_b": "he", "label": "1"}
    data = datasets.Dataset.from_list([record | {"endings": ["runs", "eats[y]", "sings", "sleeps"]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"train": data, "validation": data})
    task = load_tasks(["hellaswag"]).tasks["hellaswag"]
    document = task.eval_docs[0]
    assert (task.doc_to_text(document), task.doc_to_choice(document)[1]) == ("Roof: A man sits. He", "eats")
    text = (
        "{{a|regex_replace('b+', '<')}} {{c.strip().upper()}}{% if d is defined %}{% endif %}{{ c.split(' ')|join }}\n"
    )
    assert utils.apply_template(text, {"a": "abba", "c": " x y "}) == "a<a X Yxy\n"


def test_the_package_that_tasks_need_is_named():
    program = "from loopwise.cli import main\nraise SystemExit(main(['eval', 'model', 'tasks=few.jsonl']))"
    done = subprocess.run([sys.executable, "-c", without("lm_eval", program)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "loopwise: error: tasks needs lm-eval: in a clone of Loopwise, run pip install -e '.[eval]'"
    ]

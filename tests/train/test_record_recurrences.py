"""R by record: from a field of the record to the rows of a batch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loopwise.cli import main
from loopwise.train.curriculum import Curriculum
from loopwise.train.data import Mixture, build
from loopwise.train.data.stream import Stream
from loopwise.train.pretrained import load_model
from loopwise.train.recipe import Data
from loopwise.train.schedule import Schedule
from tests.helpers.train_tiny import history, run, same, save_recurrent

TABLE = {"easy": 1, "2": 2, "hard": 5}
DEPTHS = [("easy", 1), (2, 2), ("hard", 5), (None, 0), (["easy", 2], 2)]  # value of the field, R


@pytest.fixture(scope="module")
def leveled(tmp_path_factory) -> Path:
    """Texts that fill a block of 16 tokens each, with EOS; their level follows from their number."""
    path = tmp_path_factory.mktemp("data") / "leveled.jsonl"
    records = [{"text": f"{i:02d} " * 5, "level": DEPTHS[i % 5][0]} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(file: Path, streaming: bool = False) -> dict[str, Any]:
    keys = {"train": [str(file)], "sequence_length": 16, "recurrences": {"field": "level", "table": TABLE}}
    return {**keys, "streaming": True, "window": 60} if streaming else keys


def test_blocks_have_the_recurrences_of_their_records(leveled, tokenizer, tmp_path):
    blocks = build(Data.model_validate(settings(leveled)), tokenizer, tmp_path / "tokens").train
    assert len(blocks) == 60
    assert [int(blocks.row(i)["num_recurrences"]) for i in range(60)] == [DEPTHS[i % 5][1] for i in range(60)]
    stream = Stream([str(leveled)], Data.model_validate(settings(leveled, True)), tokenizer, seed=0, mark=None)
    seen = {bytes(row["input_ids"]): int(row["num_recurrences"]) for row in map(stream.row, range(60))}
    assert seen == {bytes(row["input_ids"]): int(row["num_recurrences"]) for row in map(blocks.row, range(60))}


def test_conversations_of_a_generated_task(tokenizer, tmp_path):
    from loopwise.train import tasks

    source = "task:hops?hops=1..3&questions=1&lookups=0&records=30"
    keys = {"field": "hops", "table": {1: 2, 2: 3, 3: 7}}
    data = Data.model_validate({"train": [source], "sequence_length": 64, "recurrences": keys})
    records = list(tasks.parse(data.train[0]).records())
    from loopwise.train.tasks.vocabulary import tokenizer as of_task

    blocks = build(data, of_task("hops"), tmp_path / "tokens").train
    found = [int(blocks.row(i)["num_recurrences"]) for i in range(len(blocks))]
    wanted = Counter({1: 2, 2: 3, 3: 7}[max(record["hops"])] for record in records)
    assert len(wanted) == 3
    # A block has the greatest R of its records, of which it holds one and the beginning of another.
    assert len(blocks) >= 25
    assert min(found) >= 2
    assert Counter(found)[7] >= wanted[7] - 1


@pytest.mark.parametrize("sampler", ["fixed", "truncated-poisson", "uniform"])
def test_recurrences_of_a_sample_are_a_function_of_its_number(sampler):
    most = {"fixed": 12, "truncated-poisson": 12, "uniform": None}[sampler]
    curriculum = Curriculum(Schedule(4, 10), sampler, 2, most, seed=3, records=(3, 9))
    drawn = [curriculum.of_sample(0, sample, 9) for sample in range(400)]
    assert drawn == [curriculum.of_sample(7, sample, 9) for sample in range(400)]
    assert curriculum.of_sample(5, 1, 0) == curriculum.at(5).num_recurrences
    if sampler == "fixed":
        assert {*drawn} == {9}
        assert curriculum.trained() == {"mean": 4, "min": 3, "max": 9}
    else:
        assert len({*drawn}) > 5
        assert 2 <= min(drawn) <= max(drawn) <= (most or 2 * 9 - 2)
        shallow = [curriculum.of_sample(0, sample, 3) for sample in range(400)]
        assert sum(shallow) / 400 < sum(drawn) / 400 - 3


def test_a_run_has_the_loss_of_calls_of_their_own(recurrent, leveled, tokenizer, tmp_path):
    """R in the log is that of the blocks, and the first loss is that of the source model, row by row."""
    file = tmp_path / "recipe.yaml"
    recipe = {"data": settings(leveled), "batch_size": 3, "gradient_accumulation": 2, "steps": 6, "log_every": 1}
    file.write_text(json.dumps({**recipe, "optimiser": {"learning_rate": 1e-3}, "recurrence": {"mean": 4}}))
    out = tmp_path / "out"
    run(["train", str(recurrent), str(out), "--recipe", str(file), "save_every=3"])
    blocks = build(Data.model_validate(settings(leveled)), tokenizer, tmp_path / "tokens")
    order = Mixture(blocks.parts, [(1.0, [1.0])], 36, 0)
    depths = [int(blocks.train.row(order[i])["num_recurrences"]) or 4 for i in range(36)]
    means = [sum(depths[6 * step : 6 * step + 6]) / 6 for step in range(6)]
    assert history(out, "num_recurrences") == pytest.approx(means)
    model: Any = load_model(str(recurrent)).eval()
    total, count = 0.0, 0
    for i in range(6):
        ids = torch.from_numpy(blocks.train.row(order[i])["input_ids"])[None]
        logits = model(ids, num_recurrences=depths[i], use_cache=False).logits
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").detach())
        count += 15
    assert history(out)[0] == pytest.approx(total / count, abs=1e-4)
    assert json.loads((out / "config.json").read_text())["trained_recurrences"] == {"mean": 4, "min": 1, "max": 5}
    cut = Path(shutil.copytree(out, tmp_path / "cut"))
    shutil.rmtree(cut / "checkpoint-6")
    (cut / "config.json").unlink()
    run(["train", str(recurrent), str(cut), "--recipe", str(file), "save_every=3", "--resume"])
    assert same(out, cut)


REFUSED = {
    "data.recurrences.field=level": "data.recurrences.table: Field required",
    "data.recurrences={field: level, table: {easy: 1}}": ":2: field 'level' is '2'; data.recurrences.table has easy",
    "data.recurrences={field: grade, table: {easy: 1}}": "data.recurrences.field=grade has no effect: no record",
    "data.recurrences={field: level, table: {easy: 32}}": "data.recurrences.table.easy=32: Input should be less than",
    "objectives.nested=2": "data.recurrences and objectives.nested both choose the depths of a block: give one",
    "recurrence={sampler: truncated-poisson, max: 4}": "recurrence.max=4 is below 5 of data.recurrences.table; raise",
    "recurrence={sampler: uniform, max: 9}": "sampler=uniform draws from min to max, whatever the mean, and data.rec",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_bad_recurrences_of_records(setting, recurrent, leveled, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    keys = settings(leveled)
    if setting.startswith("data"):
        del keys["recurrences"]
    file.write_text(json.dumps({"data": keys, "steps": 1}))
    assert main(["train", str(recurrent), str(tmp_path / "out"), "--recipe", str(file), setting]) == 2
    error = capsys.readouterr().err
    assert REFUSED[setting] in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_models_without_recurrences_by_row(plain, leveled, tokenizer, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"data": settings(leveled), "steps": 1}))
    routed = {"injection": "none", "num_recurrences": 2, "router": {"kind": "expert", "depths": 5}}
    for model, message in (
        (plain, "data.recurrences belongs to recurrent-depth models, and this is a plain llama"),
        (save_recurrent(tmp_path / "mor", tokenizer, **routed), "data.recurrences: this model has a router"),
        (save_recurrent(tmp_path / "first", tokenizer, kv_policy="first"), "kv_policy=first it does not go with"),
    ):
        more = ["recurrence.backprop=1"] if model.name == "first" else []
        assert main(["train", str(model), str(tmp_path / "out"), "--recipe", str(file), *more]) == 2
        assert message in capsys.readouterr().err

"""Training against a plain torch loop; the files, output and errors of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loopwise.cli import main
from loopwise.train.curriculum import Curriculum, Schedule
from loopwise.train.data import Order, build
from loopwise.train.pretrained import load_model
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import RECURRENCE, history, run, same, save_recurrent, weights


def test_equals_a_plain_torch_loop(recurrent, corpus, tokenizer, command, tmp_path):
    """Data order, R, truncation, loss, warm-up, cosine, clipping, weight decay: the same losses, the same weights."""
    steps, rate = 12, 3e-3
    run(command(recurrent, tmp_path / "out", f"steps={steps}", "log_every=1", "optimiser.warmup=0.25", *RECURRENCE))

    blocks = build(Data(train=[str(corpus)], sequence_length=32), tokenizer, tmp_path / "tokens").train.tokens
    order = Order(len(blocks), 0)
    curriculum = Curriculum(Schedule(3, steps, "1-sqrt"), "poisson-lognormal", backprop=Schedule(2, steps))
    model = load_model(str(recurrent)).train()
    matrices = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses, depths = [], []
    for step in range(steps):
        batch = torch.stack([torch.tensor(blocks[order[4 * step + i]]).long() for i in range(4)])
        depth, graded = curriculum.at(step)
        assert graded is not None
        state = None
        if depth > graded:  # the first recurrences without gradient, and then a model that starts from their state
            with torch.no_grad():
                state = model(input_ids=batch, num_recurrences=depth - graded, use_cache=False).state
        out = model(input_ids=batch, num_recurrences=graded, initial_state=state, use_cache=False)
        loss = F.cross_entropy(out.logits[:, :-1].reshape(-1, out.logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * learning_rate(step, steps, warmup=3)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        depths.append(depth)
    assert max(depths) > 3
    assert history(tmp_path / "out") == pytest.approx(losses, abs=1e-5)
    assert history(tmp_path / "out", "num_recurrences") == depths
    trained = load_model(str(tmp_path / "out"))
    for (name, expected), (_, actual) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=2e-5), name


def learning_rate(step: int, steps: int, warmup: int) -> float:
    import math

    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_accumulation_and_checkpointing_change_nothing(recurrent, command, tmp_path):
    settings = ["steps=10", "log_every=1", *RECURRENCE]
    run(command(recurrent, tmp_path / "one", *settings))
    run(command(recurrent, tmp_path / "two", *settings, "batch_size=2", "gradient_accumulation=2"))
    run(command(recurrent, tmp_path / "three", *settings, "gradient_checkpointing=layer"))
    for other in ("two", "three"):
        assert history(tmp_path / other) == pytest.approx(history(tmp_path / "one"), abs=1e-5)
        assert history(tmp_path / other, "num_recurrences") == history(tmp_path / "one", "num_recurrences")


def test_bfloat16_stays_near(recurrent, command, tmp_path):
    settings = ["steps=8", "log_every=1", *RECURRENCE]
    run(command(recurrent, tmp_path / "one", *settings))
    run(command(recurrent, tmp_path / "two", *settings, "precision=bfloat16"))
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=0.03)
    assert history(tmp_path / "two") != history(tmp_path / "one")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["optimiser.schedule=constant", "optimiser.warmup=0.2"], [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        (["optimiser.schedule=linear", "optimiser.warmup=0"], [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (
            ["optimiser.schedule=wsd", "optimiser.warmup=0.2", "optimiser.cooldown=0.4"],
            [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        ),
    ],
)
def test_learning_rates(plain, command, tmp_path, settings, expected):
    run(command(plain, tmp_path / "out", "steps=10", "log_every=1", *settings))
    assert history(tmp_path / "out", "learning_rate") == pytest.approx([3e-3 * share for share in expected])


def test_the_model_that_a_run_leaves(recurrent, command, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "out"
    run(command(recurrent, out, "steps=20", "data.eval_fraction=0.1", "eval_every=10", *RECURRENCE, "dtype=bfloat16"))
    shown = capsys.readouterr().out
    assert "train 20 steps from the beginning" in shown
    assert "step 20/20  loss" in shown
    assert "held-out loss  R=1 " in shown
    assert f"model written to {out}" in shown
    sources = {path.name for path in recurrent.iterdir()}
    assert {path.name for path in out.iterdir()} == sources | OWN
    config, before = (json.loads((path / "config.json").read_text()) for path in (out, recurrent))
    for read, dtype in ((config, "bfloat16"), (before, "float32")):
        assert read.pop("dtype") == dtype
        read["source_config"].pop("dtype")
    trained = {"trained_recurrences": {"mean": 3, "min": 1, "max": 12}}
    assert config == {**before, **trained}
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(recurrent).chat_template
    facts = json.loads((out / "loopwise.json").read_text())
    assert facts["held_out_loss"].keys() == {"eval_loss_r1", "eval_loss_r3"}
    assert (facts["steps"], facts["tokens"]) == (20, 20 * 4 * 32)
    assert "| 3 | " in (out / "README.md").read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    prompt = AutoTokenizer.from_pretrained(out)("the core", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, prompt.shape[1] + 3)


OWN = {"run.json", "train_recipe.yaml", "trainer_state.json", "loopwise.json", "README.md"}


def test_the_written_recipe_repeats_the_run(recurrent, command, tmp_path):
    run(command(recurrent, tmp_path / "one", "steps=4", *RECURRENCE))
    recipe = str(tmp_path / "one" / "train_recipe.yaml")
    run(["train", str(recurrent), str(tmp_path / "two"), "--recipe", recipe])
    assert same(tmp_path / "one", tmp_path / "two")


def test_training_lowers_the_held_out_loss_that_eval_measures(recurrent, corpus, command, tmp_path, capsys):
    settings = ["data.eval_fraction=0.1", "recurrence.eval_at=2,5", "steps=40"]
    run(command(recurrent, tmp_path / "out", *settings))
    capsys.readouterr()
    measured = []
    for model in (recurrent, tmp_path / "out"):
        depths = "num_recurrences=2,5"
        argv = ["eval", str(model), f"data={corpus}", "eval_fraction=0.1", "sequence_length=32", depths, "--json"]
        run(argv)
        measured.append(json.loads(capsys.readouterr().out))
    before, after = measured
    assert [row["num_recurrences"] for row in after["results"]] == [2, 5]
    assert all(a["loss"] < b["loss"] - 1 for a, b in zip(after["results"], before["results"], strict=True))
    for row in after["results"]:
        assert history(tmp_path / "out", f"eval_loss_r{row['num_recurrences']}") == pytest.approx(
            [row["loss"]], abs=1e-6
        )
    assert after["parameters"] == sum(p.numel() for p in load_model(str(recurrent)).parameters())


def test_eval_is_the_mean_loss_per_token(recurrent, corpus, tokenizer, capsys):
    run(["eval", str(recurrent), f"data={corpus}", "sequence_length=16", "num_recurrences=[3]", "batch_size=7"])
    table = capsys.readouterr().out
    blocks = build(Data(train=[str(corpus)], sequence_length=16), tokenizer, corpus.parent / "tokens").train.tokens
    batch = torch.tensor(blocks).long()
    model = load_model(str(recurrent)).eval()
    with torch.no_grad():
        logits = model(input_ids=batch, num_recurrences=3, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert ["3", f"{expected:.4f}"] in [line.split()[:2] for line in table.splitlines()]


def test_eval_warns_once_beyond_the_trained_depths(tokenizer, corpus, tmp_path, capsys):
    trained = {"mean": 3, "min": 1, "max": 4}
    model = save_recurrent(tmp_path / "model", tokenizer, trained_recurrences=trained)
    for depths, said in (
        ("3,4", ""),
        ("4,5,9", "warning: num_recurrences=5, 9: this model was trained at 1 to 4 recurrences (mean 3)"),
    ):
        run(["eval", str(model), f"data={corpus}", "sequence_length=32", f"num_recurrences={depths}"])
        warnings = [line for line in capsys.readouterr().err.splitlines() if "trained at" in line]
        assert len(warnings) == bool(said)
        assert all(line.startswith(said) for line in warnings)


def test_a_plain_model_trains_too(plain, command, tmp_path, capsys):
    run(command(plain, tmp_path / "out", "steps=20", "log_every=20", "data.eval_fraction=0.1"))
    first, last = history(tmp_path / "out")
    assert last < first - 0.5
    assert len(history(tmp_path / "out", "eval_loss")) == 1
    assert main(["eval", str(tmp_path / "out"), "data=x", "num_recurrences=[2]"]) == 2
    assert "is a plain llama, without recurrence" in capsys.readouterr().err


def test_epochs_are_passes_over_the_blocks(plain, command, tmp_path, capsys):
    run(command(plain, tmp_path / "out", "epochs=0.06", "gradient_accumulation=2"))
    tokens = int(capsys.readouterr().out.split(" tokens")[0].rsplit(" ", 1)[1].replace(",", ""))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == -(-0.06 * (tokens // 32) // 8)
    assert state["log_history"][-1]["epoch"] == pytest.approx(0.06, abs=8 / (tokens // 32))


def test_a_loss_that_is_not_finite_stops_the_run(recurrent, command, tmp_path, capsys):
    settings = ["optimiser.learning_rate=1e30", "optimiser.warmup=0.2", "optimiser.clip=0", "steps=10", "save_every=1"]
    assert main(command(recurrent, tmp_path / "out", *settings)) == 2
    error = capsys.readouterr().err.strip()
    assert "step 3 (num_recurrences=3): the loss or its gradient is not finite" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_truncation_without_injection_is_refused(tokenizer, command, tmp_path, capsys):
    model = save_recurrent(tmp_path / "model", tokenizer, injection="none")
    assert main(command(model, tmp_path / "out", "steps=2", *RECURRENCE)) == 2
    assert "recurrence.backprop=2: with injection='none'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run(command(model, tmp_path / "out", "steps=2", "recurrence.mean=2", "recurrence.backprop=2"))


REFUSED = {
    "recurrence.meen=3": "unknown recipe key 'recurrence.meen': did you mean 'recurrence.mean'?",
    "stepz=3": "unknown recipe key 'stepz': did you mean 'steps'?",
    "steps": "'steps' is not a setting: write key=value",
    "steps=0": "steps=0: Input should be greater than 0",
    "steps=5 epochs=1": "steps and epochs both set the length",
    "recurrence.mean=0": "recurrence.mean=0",
    "recurrence.schedule=quadratic": "recurrence.schedule='quadratic'",
    "recurrence.sampler=poisson-lognormal recurrence.max=2": "recurrence.max=2 is below the mean of 3",
    "recurrence.max=2": "recurrence.max=2 has no effect: it bounds a sampled R",
    "recurrence.ramp=0.5": "recurrence.ramp=0.5 has no effect: it belongs to recurrence.schedule=linear or 1-sqrt",
    "recurrence.schedule=steps": "schedule=steps needs levels",
    "data.train=[] data.phases=[{'share':1,'sources':{'a':1},'recurrence':{'mean':2}}] recurrence.schedule=linear": (
        "recurrence.schedule=linear and the recurrence of data.phases both set mean by step: give one"
    ),
    "recurrence.backprop_schedule=linear": "backprop_schedule=linear needs backprop",
    "recurrence.sampler=uniform recurrence.min=5 recurrence.max=4": "max=4 is below min=5",
    "optimiser.cooldown=0.5": "optimiser.cooldown=0.5 has no effect: it belongs to optimiser.schedule=wsd",
    "optimiser.schedule=wsd optimiser.warmup=0.9": "warmup=0.9 and cooldown=0.2 together exceed the run",
    "eval_every=5": "eval_every=5 has no effect: there is no held-out text",
    "data.eval=x data.eval_fraction=0.1": "eval and eval_fraction both name held-out text",
    "data.sequence_length=512": "data.sequence_length=512 is above the 128 positions",
    "data.train=nowhere.jsonl": "nowhere.jsonl: no such file or directory",
    "data.eval=[nowhere.txt]": "nowhere.txt: no such file or directory",
    "report_to=[tensorbord]": "unknown tracker in report_to 'tensorbord': did you mean 'tensorboard'?",
    "optimiser.betas=0.9,1": "betas=0.9,1.0: each at least 0 and below 1",
    "steps=2.0": "steps=2.0",
    "batch_size=true": "batch_size=True",
    "optimiser.clip=true": "a number, not true or false",
    "--processes 2": "--processes 2 needs --launcher",
    "--launcher fsdp9": "argument --launcher: invalid choice",
    "--recipe nowhere": "unknown train recipe 'nowhere'",
    "--resume --force": "give one",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_bad_settings(settings, recurrent, command, tmp_path, capsys):
    assert main(command(recurrent, tmp_path / "out", *settings.split())) == 2
    error = capsys.readouterr().err
    assert REFUSED[settings] in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed(recurrent, command, tmp_path, capsys, monkeypatch):
    from transformers.integrations import integration_utils

    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
        assert main(command(recurrent, tmp_path / "out", "steps=2", f"report_to={name}")) == 2
        error = capsys.readouterr().err
        assert f"report_to={name}: " in error
        assert "requires" in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_bad_models(recurrent, plain, command, tmp_path, capsys):
    import shutil

    def refused(model: Path, *settings: str) -> str:
        before = sorted(tmp_path.iterdir())
        assert main(command(model, tmp_path / "out", "steps=2", *settings)) == 2
        assert sorted(tmp_path.iterdir()) == before
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    assert "no such model directory" in refused(tmp_path / "nowhere")
    assert "is a plain llama" not in refused(recurrent, "data.train=/nowhere")
    assert "this is a plain llama" in refused(plain, "recurrence.mean=2")
    phases = '[{"share":1,"sources":{"a.txt":1},"recurrence":{"mean":2}}]'
    error = refused(plain, "data.train=[]", f"data.phases={phases}")
    assert "data.phases[].recurrence belongs to recurrent-depth models, and this is a plain llama" in error
    shutil.copytree(recurrent, tmp_path / "cut")
    whole = (recurrent / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: truncated" in refused(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").rename(tmp_path / "cut" / "pytorch_model.bin")
    assert "pytorch_model.bin: pickled weights" in refused(tmp_path / "cut")
    (tmp_path / "cut" / "pytorch_model.bin").unlink()
    assert "no weights" in refused(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").unlink()
    assert "no config.json" in refused(tmp_path / "cut")


def test_force_keeps_the_old_run_until_the_new_one_has_begun(recurrent, plain, command, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    run(command(recurrent, out, "steps=2"))
    bad = Path(shutil.copytree(plain, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    before = weights(out)
    assert main(command(bad, out, "steps=2", "--force")) == 2
    assert "no weights for model.norm.weight" in capsys.readouterr().err
    assert weights(out).keys() == before.keys()
    out.rename(tmp_path / ".out.old-999999999")  # killed before the new run had begun
    (out / "tokens").mkdir(parents=True)
    (out / "train_recipe.yaml").write_text("# loopwise 0: loopwise train\n")
    assert main(command(recurrent, out, "steps=2")) == 2
    assert weights(out).keys() == before.keys()
    run(command(plain, out, "steps=2", "--force"))
    assert weights(out).keys() != before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "out"]


def test_text_inside_out_is_refused(recurrent, command, tmp_path, capsys):
    out = tmp_path / "out"
    run(command(recurrent, out, "steps=2"))
    (out / "text.txt").write_text("the core runs again " * 100)
    for source in (out / "text.txt", out, f"{out}/*.txt"):
        assert main(command(recurrent, out, "steps=2", f"data.train={source}", "--force")) == 2
        assert "--force replaces only what Loopwise wrote, and not text.txt" in capsys.readouterr().err
    (out / "text.txt").rename(tmp_path / "text.txt")
    assert main(command(recurrent, out, "steps=2", f"data.train={out}/README.md", "--force")) == 2
    assert "lies in OUT" in capsys.readouterr().err
    assert (out / "README.md").is_file()


def test_paths_of_the_home_directory_and_of_nothing(recurrent, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(recurrent)
    run(command(Path("~/model"), Path("~/out"), "steps=2"))
    assert (tmp_path / "out" / "config.json").is_file()
    arguments = command(recurrent, tmp_path / "other", "steps=2")
    for place in (1, 2):
        assert main([*arguments[:place], "", *arguments[place + 1 :]]) == 2
        assert "may not be empty" in capsys.readouterr().err


def test_missing_tensors_are_not_left_random(plain, command, tmp_path, capsys):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(plain, tmp_path / "model")
    tensors = weights(plain)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(command(tmp_path / "model", tmp_path / "out", "steps=2")) == 2
    assert "no weights for model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_directory_is_left_alone(recurrent, command, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for options in ([], ["--force"], ["--resume"]):
        assert main(command(recurrent, out, "steps=2", *options)) == 2
        assert (out / "precious").read_text() == "mine"
    assert "--force replaces an earlier run or a model that Loopwise wrote, and this holds" in capsys.readouterr().err
    (out / "precious").unlink()
    run(command(recurrent, out, "steps=2"))
    assert main(command(recurrent, out, "steps=2")) == 2
    assert "not empty; --resume continues the run in it, --force replaces it" in capsys.readouterr().err
    assert main(command(out, out, "steps=2", "--force")) == 2
    run(command(recurrent, out, "steps=3", "--force"))
    assert "steps: 3" in (out / "train_recipe.yaml").read_text()

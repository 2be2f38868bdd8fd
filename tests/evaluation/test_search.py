"""`loopwise search`: programs beside models built by hand, the tree search on a made-up reward, the command."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from loopwise.cli import main
from loopwise.evaluation.search.bench import TextBench
from loopwise.evaluation.search.chains import summary
from loopwise.evaluation.search.model import ProgramModel
from loopwise.evaluation.search.program import Program
from loopwise.evaluation.search.tree import Settings, moves, search
from tests.helpers.tiny import VOCAB, source_model
from tests.helpers.train_tiny import run

IDS = torch.arange(2 * 12).view(2, 12) * 7 % VOCAB
CHAINS = [(0, 1, 2, 3, 4, 5), (0, 2, 2, 5), (1,), (5, 4, 4, 3, 3, 3, 0), (2, 1, 0, 2, 1, 0, 5)]


def rebuilt(source, layers: list[int]):
    """`source`, a plain model, with copies of these layers of its own, in this order."""
    made = copy.deepcopy(source)
    made.model.layers = torch.nn.ModuleList(copy.deepcopy(source.model.layers[layer]) for layer in layers)
    made.config.num_hidden_layers = len(layers)
    return made


@pytest.mark.parametrize("layers", CHAINS)
def test_a_chain_is_the_plain_model_of_its_layers(layers):
    source = source_model("llama").eval()
    want = rebuilt(source, [*layers])(IDS, use_cache=False).logits
    model = ProgramModel(source).eval()
    model.run_program(Program.chain((0, 1, 2, 4, 3)))
    with torch.no_grad():
        model(IDS, use_cache=False)  # other states are kept
        for program in (Program.chain(layers), Program.chain(layers).looped()):
            model.run_program(program)
            assert program.layers == layers
            for _ in range(2):
                assert torch.equal(model(IDS, use_cache=False).logits, want)


def test_half_steps_are_a_naive_loop():
    source = source_model("llama").eval()
    before = source.model.embed_tokens(IDS)
    rotary = source.model.rotary_emb(before, torch.arange(12)[None])

    def through(x, *layers):
        for layer in layers:
            x = source.model.layers[layer](x, position_embeddings=rotary, attention_mask=None)
        return x

    with torch.no_grad():
        s = through(before, 0, 1)
        for _ in range(3):
            s = s + (through(s, 2, 3) - s) / 3
        want = source.lm_head(source.model.norm(through(s, 4, 5)))
        model = ProgramModel(source).eval()
        model.run_program(Program.block(6, 2, 2, 3, "1/R"))
        assert torch.allclose(model(IDS, use_cache=False).logits, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "bloom", "qwen3_moe"])
def test_programs_of_other_architectures(kind):
    """Kept states change nothing, and the program of all layers is the source."""
    source = source_model(kind).eval()
    with torch.no_grad():
        want = source(IDS, use_cache=False).logits
        model = ProgramModel(source).eval()
        assert torch.allclose(model(IDS, use_cache=False).logits, want, atol=1e-5)
        program = Program.chain((0, 1, 1, 2, 5))
        model.run_program(program)
        first = model(IDS, use_cache=False).logits
        model.forget()
        assert torch.equal(model(IDS, use_cache=False).logits, first)


def test_states_are_kept_within_their_room():
    model = ProgramModel(source_model("llama")).eval()
    with torch.no_grad():
        model(IDS, use_cache=False)
        assert model.layers_run == 6
        model(IDS, use_cache=False)
        assert model.layers_run == 7  # the last layer is the core, whose states are not kept
        model.forget()
        model._room = 3 * IDS.numel() * 64 * 4  # bytes of three states
        model(IDS, use_cache=False)
        assert len(model._kept) <= 3
        model(IDS + 1, use_cache=False)
        assert model.layers_run > 13


def test_a_chain_s_longest_repetition_becomes_its_core():
    chain = Program.chain((0, 1, 2, 1, 2, 1, 2, 4, 4))
    assert chain.looped() == Program((0,), (1, 2), (4, 4), 3)
    assert chain.text() == "0-2 1-2 1-2 4 4"
    assert chain.looped().text() == "0 (1-2) x3 4 4"
    assert Program.block(30, 12, 4, 2, "1/R").text() == "0-11 (12-15) x2 by 1/R 16-29"
    plain = Program.chain((0, 2, 3)).looped()
    assert plain == Program((0,), (2,), (3,), 1)


def test_moves_skip_and_repeat_each_once():
    found = moves((0, 1, 2), 3, 2)
    assert sorted(found) == sorted(
        {(1, 2), (0, 2), (0, 1), (2,), (0,), (0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 0, 1, 2), (0, 1, 2, 1, 2)}
    )
    assert moves((7,), 1, 2) == [(7, 7)]  # no chain is empty, and none longer than twice the source


def test_the_tree_finds_what_is_rewarded():
    """Right is every chain without layer 4 that runs layer 2 twice in a row: two moves away."""
    asked = []

    def reward(chain):
        asked.append(chain)
        return float(4 not in chain and (2, 2) in pairwise(chain))

    settings = Settings(200, 2, 1.8, 3.0, 0.1)
    found = search(8, reward, settings, Random(3), {})
    assert len(asked) == len(set(asked)) == len(found)
    assert next(iter(found)) == tuple(range(8))
    assert max(found.values()) == 1
    assert max(len(chain) for chain in found) <= 16
    again = search(8, reward, settings, Random(3), found)
    assert [*again] == [*found]
    assert len(asked) == len(found)  # all of them were known


def test_shares_of_questions():
    rows = [
        {"right": True, "shortest": [0, 1], "tried": 5},
        {"right": True, "shortest": [0, 1, 2], "tried": 5},
        {"right": False, "shortest": [0, 0, 1], "tried": 4},
        {"right": False, "shortest": None, "tried": 6},
    ]
    found = summary(rows, 3)
    assert (found["accuracy"]["share"], found["shorter"]["share"], found["mended"]["share"]) == (0.5, 0.5, 0.5)
    assert found["reachable"]["share"] == 0.75
    assert found["mean_layers"] == (2 + 3 + 3 + 3) / 4
    assert found["shorter"]["of"] == found["mended"]["of"] == 2
    assert found["tried"] == 20


def test_a_scan_measures_what_eval_measures_of_the_saved_program(plain, corpus, tmp_path, capsys):
    out, saved = tmp_path / "scan.json", tmp_path / "saved"
    keys = [f"data={corpus}", "sequence_length=32", "limit=6", "sizes=1,2"]
    other = tmp_path / "other.txt"
    other.write_text(Path(corpus).read_text()[300:])
    run(["search", str(plain), *keys, f"check={other}", "--out", str(out), "--save", str(saved)])
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert len(found["programs"]) == 4 * (4 + 3)
    best = min(found["programs"], key=lambda row: row["value"])
    assert found["best"]["value"] == pytest.approx(min(best["value"], found["source"]["value"]))
    assert f"best: {found['best']['text']}" in told
    depth = found["best"]["parts"]["recurrences"]
    for text, row in ((keys[0], found["best"]), (f"data={other}", found["check"][0]["best"])):
        run(["eval", str(saved), f"num_recurrences={depth}", text, *keys[1:3], "--json"])
        measured = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert measured["results"][0]["loss"] == pytest.approx(row["value"], abs=1e-5)
    run(["eval", str(plain), *keys[:3], "--json"])
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plain["results"][0]["loss"] == pytest.approx(found["source"]["value"], abs=1e-6)
    run(["plot", "search", str(out)])
    assert (tmp_path / "scan.search.png").stat().st_size > 5000


def test_a_killed_search_goes_on(plain, corpus, tmp_path, capsys):
    out = tmp_path / "scan.json"
    keys = ["search", str(plain), f"data={corpus}", "sequence_length=32", "limit=4", "sizes=1", "ways=skip,repeat"]
    run([*keys, "--out", str(out)])
    whole = json.loads(out.read_text())
    part = {**whole, "programs": whole["programs"][:3]}
    part["programs"][0]["value"] = 0.25  # a mark: it is not measured again
    out.write_text(json.dumps(part))
    run([*keys, "--out", str(out)])
    again = json.loads(out.read_text())
    assert again["programs"][0]["value"] == 0.25
    assert again["programs"][3:] == whole["programs"][3:]
    for name in ("seconds", "layers_run"):  # of both calls
        assert again[name] > whole[name] > 0
    text = Path(corpus).read_text()
    (tmp_path / "text.txt").write_text(text)
    others, again = [key.replace(str(corpus), str(tmp_path / "text.txt")) for key in keys], tmp_path / "again.json"
    run([*others, "--out", str(again)])
    (tmp_path / "text.txt").write_text(text[200:])
    assert main([*others, "--out", str(again)]) == 2
    assert "the text of the data has changed; name another file, or start anew with --force" in capsys.readouterr().err
    assert main([*keys, "stride=2", "--out", str(out)]) == 2
    run([*keys, "stride=2", "--out", str(out), "--force"])
    assert len(json.loads(out.read_text())["programs"]) == 4


def test_a_stopped_search_keeps_each_program(plain, corpus, tmp_path, monkeypatch):
    """Ctrl-C comes at the fourth block."""
    out, measured = tmp_path / "scan.json", []
    values = TextBench.values

    def stop(self, program, samples=None):
        measured.append(program)
        if len(measured) > 4:  # the source, and three blocks
            raise KeyboardInterrupt
        return values(self, program, samples)

    monkeypatch.setattr(TextBench, "values", stop)
    keys = [f"data={corpus}", "sequence_length=32", "limit=4", "sizes=1", "ways=skip"]
    assert main(["search", str(plain), *keys, "--out", str(out)]) == 130
    monkeypatch.undo()
    assert len(json.loads(out.read_text())["programs"]) == 3
    run(["search", str(plain), *keys, "--out", str(out)])
    assert [row["first"] for row in json.loads(out.read_text())["programs"]] == [0, 1, 2, 3]


def test_what_is_checked_has_the_metric_of_the_data(corpus, tmp_path, capsys):
    run(["init", "task:hops", str(tmp_path / "m"), "hidden_size=32"])
    keys = ["data=task:hops?hops=1..2&questions=1", "limit=4", f"check={corpus}", "sequence_length=64"]
    assert main(["search", str(tmp_path / "m"), *keys]) == 2
    assert "its metric is loss, that of data accuracy" in capsys.readouterr().err


def test_chains_for_each_question_and_for_all(tmp_path, capsys):
    """On a generated task; the chain for all is a checkpoint with the accuracy that the search names."""
    model = tmp_path / "model"
    run(["init", "task:hops", str(model), "hidden_size=32", "num_hidden_layers=3", "seed=3"])
    keys = ["data=task:hops?hops=1..2&questions=1", "limit=5", "kind=chains", "simulations=12"]
    out, saved = tmp_path / "chains.json", tmp_path / "saved"
    run(["search", str(model), *keys, "--out", str(out), "--save", str(saved)])
    found = json.loads(out.read_text())
    assert found["each"]["questions"] == len(found["questions"]) == 5
    assert 0 < len(found["tried"]) <= 12
    best = max(found["tried"], key=lambda row: (row["value"], -len(row["chain"])))
    assert found["best"]["layers"] == best["chain"]
    capsys.readouterr()
    run(["eval", str(saved), *keys[:2], "--json"])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["results"][0]["accuracy"] == pytest.approx(found["best"]["value"])
    run(["plot", "search", str(out)])


def test_tasks_have_the_scores_that_eval_gives_them(asked, tmp_path, capsys):
    """Two tasks, generated and chosen answers; the best chain scores as its checkpoint does."""
    source, out, saved = tmp_path / "source", tmp_path / "tasks.json", tmp_path / "saved"
    run(["export", str(asked / "model"), str(source), "--unroll", "2"])
    keys = [f"tasks={asked}/generated.yaml,{asked}/chosen.yaml", "limit=6"]
    kind = ["kind=chains", "search_for=all", "simulations=4"]
    run(["search", str(source), *keys, *kind, "--out", str(out), "--save", str(saved)])
    found = json.loads(out.read_text())
    for model, value in ((source, found["source"]["value"]), (saved, found["best"]["value"])):
        capsys.readouterr()
        run(["eval", str(model), *keys, "--json"])
        measured = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert sum(row["score"] for row in measured["results"]) / 2 == pytest.approx(value)
    assert 0 < found["source"]["value"] <= found["best"]["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=TEXT", "tasks=arc_easy"], "give data=... or tasks=..., to choose on; not both"),
        (["data=TEXT", "kind=chains"], "text has none: give chat_field, or kind=scan"),
        (["data=TEXT", "simulations=5"], "it belongs to kind=chains"),
        (["data=TEXT", "sizes=9", "sequence_length=32"], "sizes=[9]: 4 layers hold no block of 9"),
        (["data=TEXT", "sizes=1,9", "sequence_length=32"], "sizes=[1, 9]: 4 layers hold no block of 9"),
        (["data=TEXT", "check=TEXT", "sequence_length=32"], "these are the samples of data"),
        (["data=TEXT", "check=nowhere.jsonl", "sequence_length=32"], "nowhere.jsonl"),
        (["data=TEXT", "ways=twice"], "ways"),
        (["data=TEXT", "--force"], "--force has no effect"),
        (["data=task:hops", "kind=chains", "search_for=each", "--save", "x"], "which --save takes: search_for=all, or"),
        (["data=task:hops", "kind=chains", "search_for=each", "check=task:hops"], "which check takes: search_for=all"),
    ],
)
def test_bad_input(plain, corpus, arguments, message, capsys):
    given = [argument.replace("TEXT", str(corpus)) for argument in arguments]
    assert main(["search", str(plain), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_samples_of_data_in_a_check_are_named(plain, corpus, tmp_path, capsys):
    from loopwise.evaluation.search.recipe import Search
    from loopwise.evaluation.search.search import Searching

    more = tmp_path / "more.jsonl"
    more.write_text(corpus.read_text() + json.dumps({"text": "and one document more " * 9}) + "\n")
    Searching(str(plain), str(plain), Search(data=[str(corpus)], check=[str(more)], sequence_length=32), None, False)
    found = re.search(r"more.jsonl: (\d+) of its (\d+) samples are samples of data", capsys.readouterr().err)
    assert found
    assert int(found[2]) - 8 < int(found[1]) < int(found[2])


def test_a_recurrent_model_is_refused(recurrent, corpus, capsys):
    assert main(["search", str(recurrent), f"data={corpus}"]) == 2
    assert "starts from a plain one" in capsys.readouterr().err


def test_values_add_up_over_samples(plain, corpus):
    """A subset of the samples has the values that it has among all."""
    from loopwise.evaluation.search.recipe import Search
    from loopwise.evaluation.search.search import Searching

    recipe = Search(data=[str(corpus)], sequence_length=32, limit=5)
    searching = Searching(str(plain), str(plain), recipe, None, False)
    whole = searching.bench.values(searching.source)
    some = searching.bench.values(searching.source, [1, 3])
    assert np.allclose(whole[[1, 3]], some, atol=1e-4)

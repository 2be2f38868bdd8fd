"""Pictures of a model on a text, of measurements, and of a running server."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwise.cli import main
from loopwise.evaluation.exits.forced import ForcedEngine
from loopwise.evaluation.plot import command
from loopwise.evaluation.plot.evaluation import eval_figure
from loopwise.evaluation.plot.observe import Depths, Tokens, depths, states, tokens_of
from loopwise.evaluation.plot.recipe import Picture
from loopwise.evaluation.plot.states import components, states_figure
from loopwise.evaluation.plot.text import shade, text_figure, text_page
from loopwise.serve import Engine, Params
from tests.helpers.engines import build, build_routed
from tests.helpers.train_tiny import save_recurrent

TEXT = 'the core <runs> again & "depth"\ngrows – with every pass'  # with characters that HTML escapes, and a long one


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("last-exited", "latent-diff"), ("single", "latent-diff"), ("first", "entropy-diff"), ("per-depth", "kl")],
)
def test_depths_of_a_text_are_those_of_its_generation(policy, rule):
    """A text that the engine has generated gets the depths that its tokens had then."""
    threshold = {"latent-diff": 1.0, "entropy-diff": 0.03, "kl": 0.6}[rule]
    engine = Engine(build(), kv_policy=policy, max_num_seqs=2, max_model_len=40)
    params = Params(exit_rule=rule, exit_threshold=threshold, max_tokens=24, ignore_eos=True, temperature=0.0)
    prompts = [[5], [9]]
    done = engine.generate(prompts, params)
    texts = [prompt + completion.tokens[:-1] for prompt, completion in zip(prompts, done, strict=True)]
    forced = ForcedEngine(build(), kv_policy=policy, max_num_seqs=2, max_model_len=40)
    found = forced.depths_of(texts, params)
    assert found == [completion.depths for completion in done]
    assert len({depth for of in found for depth in of}) > 1


def test_the_page_holds_the_text_and_its_depths(recurrent):
    picture = Picture(text=TEXT, exit_rule="latent-diff", exit_threshold=0.4, kv_policy="last-exited")
    found = depths(str(recurrent), picture)
    page = text_page(found, "m")
    body = page.partition('<div class="text">')[2]
    spans = re.findall(r'title="(\d+) of (\d+)">(.*?)</span>', body, re.DOTALL)
    assert "".join(unescape(piece) for *_, piece in spans) == TEXT
    shown = [depth for piece, depth in zip(found.tokens.pieces, found.depths, strict=True) if piece]
    assert [int(depth) for depth, *_ in spans] == shown
    assert len({*shown}) > 1
    assert not re.search(r"(src|href)=|https?:|@import", page), "the page stands alone"


def test_pieces_of_the_tokens_are_the_text(tokenizer):
    """Characters that take several tokens stand with the first of them."""
    tokens = tokens_of(TEXT, tokenizer)
    assert "".join(tokens.pieces) == TEXT
    assert len(tokens.ids) > len(TEXT)
    assert tokens.pieces.count("") == len(tokens.ids) - len(TEXT)


def test_a_picture_shows_what_no_token_stands_for():
    """A tokenizer may drop characters: they stand in the text without a colour."""
    text = "a=7;?a="
    kept = [(place, letter) for place, letter in enumerate(text) if letter != "="]

    class Tokenizer:
        is_fast = True

        def __call__(self, text: str, **options: bool) -> dict[str, list]:
            return {"input_ids": [7] * len(kept), "offset_mapping": [(place, place + 1) for place, _ in kept]}

    tokens = tokens_of(text, Tokenizer())
    assert (tokens.pieces, tokens.gaps) == ([letter for _, letter in kept], ["", "=", "", "", "", "="])
    found = Depths(tokens, [4, 1, 2, 1, 3], 4, "cosine at 0.1", False)
    body = text_page(found, "m").partition('<div class="text">')[2].partition("</div>")[0]
    assert unescape(re.sub("<[^>]*>", "", body)) == text
    shown = [("4", "a"), ("1", "7"), ("2", ";"), ("1", "?"), ("3", "a")]
    assert re.findall(r'title="(\d) of 4">(.)</span>', body) == shown
    (axes,) = text_figure(found, "m").axes
    lines = [line.get_text() for line in axes.texts]
    assert "".join(lines).endswith(text)
    assert any(line.startswith("Colour: recurrences that a token ran to predict the next one.") for line in lines)
    (equals, *_), (seven, *_) = ([one for one in axes.texts if one.get_text() == letter] for letter in "=7")
    assert equals.get_color() != seven.get_color()


def test_the_legend_of_a_picture_has_every_depth_and_its_share():
    found = Depths(Tokens([1] * 4, [*"abcd"], [""] * 5), [3, 1, 1, 3], 3, "cosine at 0.1", False)
    page = text_page(found, "m")
    (axes,) = text_figure(found, "m").axes
    drawn = "".join(line.get_text() for line in axes.texts)
    for entry in ("1: 50%", "2: 0%", "3: 50%"):
        assert entry in page
        assert entry in drawn
    assert "The first token, a prompt, ran all 3." in page
    assert "prompt" not in text_page(replace(found, routed=True), "m")


@pytest.mark.parametrize("most", [1, 2, 4, 16, 64])
def test_tokens_can_be_read_on_their_colours(most):
    """The contrast of WCAG 2.2 for text, 4.5."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for depth in range(1, most + 1):
        low, high = sorted(luminance(colour) for colour in shade(depth, most))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_states_are_those_of_models_of_fewer_recurrences(recurrent):
    from loopwise.train.pretrained import load_model

    tokens, found, trained = states(str(recurrent), Picture(text=TEXT, num_recurrences=4))
    assert trained is None
    model = load_model(str(recurrent)).eval()
    with torch.no_grad():
        lasts = [
            model(torch.tensor([tokens.ids]), num_recurrences=r, use_cache=False).last_state[0] for r in (1, 2, 3, 4)
        ]
    moves = [(after - before).norm(dim=-1) / after.norm(dim=-1) for before, after in pairwise(lasts)]
    figure = states_figure(tokens, found, [2, 5], "m")
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    for place in (2, 5):
        label = f"{place}: {tokens.pieces[place]!r}"
        assert np.allclose(lines[label], [move[place] for move in moves], rtol=1e-4)
    assert np.allclose(lines["median of all tokens"], [move.median() for move in moves], rtol=0.05)
    paths, shares = components(found[:, [2, 5]])
    relative = (found - found[-1])[:, [2, 5]]
    assert torch.allclose(paths[-1], torch.zeros(2, 2), atol=1e-5)
    assert paths.square().sum() <= relative.square().sum() * (1 + 1e-5)
    assert sum(shares) == pytest.approx(float(paths.square().sum() / relative.square().sum()), rel=1e-4)


def test_states_beyond_the_training_are_dotted_and_on_grey(recurrent, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(recurrent, tmp_path / "m")
    fields = json.loads((model / "config.json").read_text())
    fields["trained_recurrences"] = {"min": 1, "max": 2, "mean": 1.5}
    (model / "config.json").write_text(json.dumps(fields))
    given = ["text=the core runs", "num_recurrences=4", "--out", str(tmp_path / "s.png")]
    figures: list[Any] = []
    monkeypatch.setattr(command, "_save", lambda figure, _: figures.append(figure))
    assert main(["plot", "states", str(model), *given]) == 0
    warning = "warning: num_recurrences=4: this model was trained at 1 to 2 recurrences (mean 1.5), and not beyond"
    assert capsys.readouterr().err.count(warning) == 1
    (figure,) = figures
    paths, moves = figure.axes
    solid, dotted, *_ = [line for line in paths.lines if len(line.get_xdata()) > 1]
    assert [(len(line.get_xdata()), line.get_linestyle()) for line in (solid, dotted)] == [(2, "-"), (3, ":")]
    assert "deeper than trained (up to R=2)" in [text.get_text() for text in paths.get_legend().get_texts()]
    (span,) = moves.patches
    assert span.get_extents().transformed(moves.transData.inverted()).intervalx == pytest.approx((2.5, 4.5))
    tokens, found, trained = states(str(model), Picture(text="the core runs", num_recurrences=2))
    figure = states_figure(tokens, found, None, "m", trained)
    assert not figure.axes[1].patches  # as deep as trained


def test_a_router_takes_the_tokens_that_its_picture_shows(tmp_path, tokenizer, capsys):
    from loopwise.evaluation.plot.router import router_figure

    model = build_routed("token")
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    found = depths(str(tmp_path / "m"), Picture(text="the core runs"))
    assert found.routed
    squares = sum(len(axes.patches) for axes in router_figure(found, "m").axes)
    assert squares == sum(found.depths)
    assert main(["plot", "router", str(tmp_path / "m"), "text=the core", "--out", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").stat().st_size > 1000
    capsys.readouterr()


def test_exits_are_counted_from_metrics():
    """From the text that prometheus_client makes of the engine's counters."""
    from prometheus_client import generate_latest
    from prometheus_client.registry import REGISTRY

    from loopwise.evaluation.plot.exits import counted
    from loopwise.serve.vllm.metrics import DepthMetrics

    metrics = DepthMetrics('a "model"')
    try:
        metrics.counts = {"exits": [0, 3, 0, 5], "lanes": [0, 1], "codas": [0, 1], "decoders": {}, "budget": 0}
        text = generate_latest(REGISTRY).decode()
    finally:
        REGISTRY.unregister(metrics)
    assert counted(text, "here") == {1: 3, 2: 0, 3: 5}


def test_right_answers_without_groups_are_a_curve(tmp_path):
    """Those of a server or of lanes have no loss."""
    rows = [{"num_recurrences": n, "accuracy": n / 10, "accuracy_error": 0.01, "answers": 9} for n in (1, 2, 4)]
    (tmp_path / "r.json").write_text(json.dumps({"model": "m", "results": rows}))
    axes = eval_figure(tmp_path / "r.json").axes[0]
    assert axes.get_ylabel() == "right answers"
    assert np.array(axes.lines[0].get_ydata()).tolist() == [0.1, 0.2, 0.4]


def test_a_token_that_looks_like_a_formula_is_followed(tmp_path):
    tokens = Tokens([1, 2], ["$$", "x"], ["", "", ""])
    figure = states_figure(tokens, torch.randn(3, 2, 4), [0], "m", None)
    figure.savefig(tmp_path / "states.png")


def test_scores_by_recurrences_and_flops(tmp_path):
    from loopwise.evaluation.plot.evaluation import eval_figure

    def row(task: str, depth: int | None, score: float, flops: float) -> dict:
        facts = {"task": task, "metric": "exact_match,none", "score": score, "score_error": 0.01}
        return {**facts, "num_recurrences": depth, "flops_per_token": flops}

    rows = [row("sums", 4, 0.6, 5e9), row("sums", 1, 0.2, 2e9), row("sums", None, 0.3, 1e9), row("copy", 1, 0.9, 2e9)]
    (tmp_path / "r.json").write_text(json.dumps({"model": "m", "results": rows}))
    by_depth, by_flops = eval_figure(tmp_path / "r.json").axes
    lines, others = ([np.asarray(line.get_xydata()) for line in axes.lines] for axes in (by_depth, by_flops))
    assert next(line[:, 0].tolist() for line in lines if line[0, 0] >= 1) == [1, 4]
    drawn = {(float(x), float(y)) for line in others for x, y in line}
    assert {(2.0, 0.2), (5.0, 0.6), (1.0, 0.3), (2.0, 0.9)} <= drawn
    assert by_depth.get_ylabel() == "exact_match"


def test_tasks_of_several_metrics_have_them_in_the_legend(tmp_path):
    from loopwise.evaluation.plot.evaluation import eval_figure

    facts = {"score_error": 0.01, "num_recurrences": 2, "flops_per_token": None}
    rows = [{"task": "sums", "metric": "exact_match,none", "score": 0.6, **facts}]
    rows.append({"task": "kinds", "metric": "acc,none", "score": 0.7, **facts})
    (tmp_path / "r.json").write_text(json.dumps({"model": "m", "results": rows}))
    axes: Any = eval_figure(tmp_path / "r.json").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sums, exact_match", "kinds, acc"]
    assert axes.get_ylabel() == "score"


def test_right_answers_stand_with_their_number_and_error(tmp_path):
    from loopwise.evaluation.plot.evaluation import eval_figure

    def cell(answers: int, error: float | None) -> dict:
        return {"answers": answers, "accuracy": 0.5, "accuracy_error": error}

    groups = {"1": cell(50, 0.02), "2": cell(40, 0.07), "3": cell(40, None)}
    result = {"model": "m", "group": "hops", "results": [{"num_recurrences": 1, "groups": groups}]}
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert eval_figure(tmp_path / "r.json").get_suptitle() == "m\n40 to 50 answers a cell, standard error up to 7 %"


def test_depths_beyond_the_training_stand_on_grey(tmp_path):
    from loopwise.evaluation.plot.evaluation import eval_figure

    facts = {"task": "sums", "metric": "acc,none", "score": 0.5, "score_error": 0.1, "flops_per_token": 1e9}
    rows = [{**facts, "num_recurrences": depth, "beyond_trained": depth > 4} for depth in (4, 8)]
    (tmp_path / "r.json").write_text(json.dumps({"model": "m", "results": rows}))
    axes: Any = eval_figure(tmp_path / "r.json").axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"sums", "deeper than trained"}
    (span,) = axes.patches
    left, right = span.get_extents().transformed(axes.transData.inverted()).intervalx
    assert 4 < left < 8 < right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "MODEL"], "give the text by text=... or by file=..., one of the two"),
        (["text", "MODEL", "file=nowhere.txt"], "file=nowhere.txt: No such file or directory"),
        (["text", "MODEL", "text=the", "exit_rule=late"], "exit_rule 'late'"),
        (["text", "MODEL", "text=the", "tokens=1"], "tokens=1: loopwise plot states follows tokens"),
        (["text", "PLAIN", "text=the"], "a plain llama; its tokens have no depths"),
        (["states", "PLAIN", "text=the"], "a plain llama model has no states"),
        (["states", "MODEL", "text=the", "num_recurrences=1"], "num_recurrences=1: one recurrence has no path"),
        (["states", "MODEL", "text=the", "tokens=3"], "tokens=3: the text has 3 tokens, 0 to 2"),
        (["states", "MODEL", "text=the", "exit_rule=gate"], "draws all recurrences of every token"),
        (["router", "MODEL", "text=the"], "no routed model"),
        (["exits", "http://127.0.0.1:9"], "http://127.0.0.1:9/metrics: no server answers there"),
        (["exits", "http://localhost:PORT"], "http://localhost:PORT/metrics: no server answers there"),
        (["picture", "MODEL"], "invalid choice: 'picture'"),
        (["states", "TIED", "text=the"], "a model with sharing=sequence has no states"),
        (["eval", "."], ".: Is a directory"),
        (["text", "MODEL", "file=/FOLDER/text.html", "--out", "/FOLDER/text.html"], "the picture would replace it"),
    ],
)
def test_mistakes_are_one_line(arguments, message, recurrent, plain, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "text.html").write_text("a text")
    tied = tmp_path / "tied"
    if "TIED" in arguments:
        save_recurrent(tied, tokenizer, prelude=[], core=[0, 1], coda=[], sharing="sequence", injection="none")
    monkeypatch.chdir(tmp_path / "here")
    places = {"MODEL": recurrent, "PLAIN": plain, "TIED": tied, "/FOLDER": tmp_path}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert [*Path().iterdir()] == []

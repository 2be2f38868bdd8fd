"""Every objective against the paper's formula in plain torch, and in short runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loopwise.cli import main
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.train import losses
from loopwise.train.curriculum import Depth
from loopwise.train.objectives import Objective
from loopwise.train.pretrained import load_model
from loopwise.train.recipe import Objectives
from loopwise.train.samplers import nested_depths, progressive_part
from loopwise.train.schedule import segment_ends
from tests.helpers.tiny import source_config
from tests.helpers.train_tiny import history, run, same, save_recurrent

B, T, V, R = 2, 5, 7, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def close(a: Any, b: Any) -> bool:
    return torch.allclose(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32), atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_sum_over_the_vocabulary(reverse, temperature):
    s, t = random(B, T, V), random(B, T, V, seed=1)
    found = losses.divergence(s, t, temperature, reverse)
    for b in range(B):
        for i in range(T):
            p, q = ((x[b, i] / temperature).exp() / (x[b, i] / temperature).exp().sum() for x in (t, s))
            if reverse:
                p, q = q, p
            assert close(found[b, i], temperature**2 * sum(p[v] * math.log(p[v] / q[v]) for v in range(V)))


@pytest.mark.parametrize("reverse", [False, True])
def test_top_k_divergence(reverse):
    s, t = random(B, T, V), random(B, T, V, seed=1)
    log_probs = (t / 2).log_softmax(-1)

    def of(k: int) -> torch.Tensor:
        values, ids = log_probs.topk(k)
        return losses.top_k_divergence(s, ids, values, 2.0, reverse)

    full = losses.divergence(s, t, 2.0, reverse)
    assert torch.allclose(of(V - 1), full, atol=2e-5)
    assert (of(3) <= of(5) + 1e-6).all()  # joining tokens never raises a divergence
    assert (of(5) <= full + 1e-6).all()
    p, q = log_probs[0, 0].exp(), (s / 2).softmax(-1)[0, 0]
    order = p.argsort(descending=True)[:2]
    pairs = [(p[v], q[v]) for v in order] + [(1 - p[order].sum(), 1 - q[order].sum())]
    assert close(of(2)[0, 0], 4 * sum((b * (b / a).log()) if reverse else (a * (a / b).log()) for a, b in pairs))


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 3 * V)
    results = []
    for function in (losses.by_chunks, lambda f, *x: f(*x)):
        s = random(B, T, V).requires_grad_()
        out = function(lambda a, b: losses.divergence(a, b, 1.0, False), s, random(B, T, V, seed=1))
        out.sum().backward()
        results += [out, s.grad]
    assert results[0].shape == (B, T)
    assert close(results[0], results[2])
    assert close(results[1], results[3])


def test_layerskip_weights():
    # L = 4, scale 0.2: e = 0, 0.2, 0.6, and 3 + 0.2 (0 + 1 + 2) = 3.6; their sum is 4.4
    assert losses.layerskip_weights(4, 0.2) == pytest.approx([0, 0.2 / 4.4, 0.6 / 4.4, 3.6 / 4.4])
    assert losses.layerskip_weights(1, 0.2) == [1.0]


def test_expected_loss_and_entropy():
    gate, each = random(R, B, T), random(R, B, T, seed=1).abs()
    found = losses.expected_loss(each, gate, 0.1)
    lam = torch.sigmoid(gate)
    for b in range(B):
        for i in range(T):
            left, p = 1.0, []
            for r in range(R):
                p.append(left * lam[r, b, i] if r + 1 < R else torch.tensor(left))
                left = left * (1 - lam[r, b, i].item())
            assert float(sum(p)) == pytest.approx(1, abs=1e-6)
            entropy = -sum(x * x.log() for x in p)
            assert close(found[b, i], sum(x * each[r, b, i] for r, x in enumerate(p)) - 0.1 * entropy)


def test_gate_loss():
    gate, each = random(R, B, T).requires_grad_(), random(R, B, T, seed=1).requires_grad_()
    found = losses.gate_loss(each, gate, 50.0, 0.005)
    lam = torch.sigmoid(gate)
    expected = torch.zeros(B, T)
    for r in range(1, R):
        w = torch.sigmoid(50 * ((each[r - 1] - each[r]).clamp(min=0) - 0.005)).detach()
        expected = expected - (w * (1 - lam[r]).log() + (1 - w) * lam[r].log()) / R
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    assert each.grad is None
    assert gate.grad is not None
    assert (gate.grad[0] == 0).all()
    assert (gate.grad[1:] != 0).any()


def test_router_losses():
    logits = random(B, T, 3)
    candidates = torch.ones(B, T, 3, dtype=torch.bool)
    candidates[0, 2:, 1:] = False
    selected = candidates & (random(B, T, 3, seed=2) > 0)
    expected = 0.0
    for r in range(3):
        terms = [
            -(F.logsigmoid(logits[b, i, r]) if selected[b, i, r] else F.logsigmoid(-logits[b, i, r]))
            for b in range(B)
            for i in range(T)
            if candidates[b, i, r]
        ]
        expected = expected + sum(terms) / len(terms)
    assert close(losses.router_prediction(logits, selected, candidates), expected)
    probabilities, depths = logits.flatten(0, 1).softmax(-1), random(B * T, 3, seed=3).argmax(-1)
    share = [3 * sum(int(d) == i for d in depths) / (B * T) for i in range(3)]
    mean = [sum(p[i] for p in probabilities) / (B * T) for i in range(3)]
    assert close(losses.balancing_loss(probabilities, depths), sum(f * p for f, p in zip(share, mean, strict=True)))
    even = torch.full((6, 3), 1 / 3)
    assert losses.balancing_loss(even, torch.tensor([0, 1, 2] * 2)).item() == pytest.approx(1)
    assert close(losses.z_loss(logits), sum(x.exp().sum().log() ** 2 for x in logits.flatten(0, 1)) / (B * T))
    bias = losses.balanced_bias(torch.zeros(3), torch.tensor([9, 4, 5]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.001, 0.001])


@pytest.fixture(scope="module")
def gated(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "gated"
    return save_recurrent(path, tokenizer, exit_gate=True, recurrence_norm="between", injection="none")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    ids = torch.randint(0, 272, (2, 12), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, 3:6] = -100
    return {"input_ids": ids, "labels": labels, "sequence_ids": torch.arange(2)}


def loss_and_gradients(
    model, objectives: dict, inputs, depth: Depth | None, step: int = 3, teacher=None, selects: bool = True
):
    model.zero_grad(set_to_none=True)
    objective = Objective(Objectives.model_validate(objectives), model.config, teacher, 11, 0, 0)
    objective.selects = selects
    loss = objective(model, inputs, step, depth, 10)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def depth_losses(model, inputs, depth: Depth, function=None) -> list[torch.Tensor]:
    """Cross-entropy (or `function` of the logits) per predicted token at every depth, with all logits in memory."""
    model.zero_grad(set_to_none=True)
    out = model(
        input_ids=inputs["input_ids"], use_cache=False, output_depth_logits=True, output_states=True, **depth._asdict()
    )
    keep = inputs["labels"][:, 1:].flatten() != -100
    targets = inputs["labels"][:, 1:].flatten()[keep]
    flat = [logits[:, :-1].flatten(0, 1)[keep] for logits in out.depth_logits]
    gates = [x[:, :-1].flatten()[keep] for x in out.exit_logits] if out.exit_logits is not None else []
    if function:
        return function(flat, targets, gates)
    return [F.cross_entropy(x, targets, reduction="none") for x in flat]


def check_same(model, expected: Any, found) -> None:
    loss, gradients = found
    assert close(loss, expected / 10)
    model.zero_grad(set_to_none=True)
    (expected / 10).backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, g in gradients.items() if (g != 0).any()} == {n for n, g in own.items() if (g != 0).any()}
    for name, gradient in own.items():
        assert torch.allclose(gradients[name], gradient, atol=2e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("grad", [None, 2])
def test_exit_losses_of_a_model(recurrent, inputs, grad):
    model = load_model(str(recurrent)).train()
    depth = Depth(4, grad)
    found = loss_and_gradients(model, {"exits": {}}, inputs, depth)
    each = [x.sum() for x in depth_losses(model, inputs, depth)]
    check_same(model, 0.1 * sum(each[:-1]) + each[-1], found)
    found = loss_and_gradients(model, {"exits": {"weights": "layerskip"}}, inputs, depth)
    each = [x.sum() for x in depth_losses(model, inputs, depth)]
    check_same(model, sum(w * x for w, x in zip(losses.layerskip_weights(4, 0.2), each, strict=True)), found)

    def from_final(flat, targets, _):
        p = flat[-1].detach().softmax(-1)
        apart = [(p * (p.log() - x.log_softmax(-1))).sum(-1) for x in flat[:-1]]
        return [*apart, F.cross_entropy(flat[-1], targets, reduction="none")]

    found = loss_and_gradients(model, {"exits": {"target": "final"}}, inputs, depth)
    each = [x.sum() for x in depth_losses(model, inputs, depth, from_final)]
    check_same(model, 0.1 * sum(each[:-1]) + each[-1], found)


def test_nested_depths_of_a_model(recurrent, inputs):
    model = load_model(str(recurrent)).train()
    at = nested_depths(0, 3, 5, 2)
    found = loss_and_gradients(model, {"nested": 2}, inputs, Depth(5, None))
    each = [x.sum() for x in depth_losses(model, inputs, Depth(at[-1], None))]
    check_same(model, sum(each[d - 1] for d in at) / 2, found)


def test_progressive_draws_are_the_authors():
    """n = randrange(0, R), k = randrange(1, R - n + 1): how often each pair comes, against the product of the two."""
    drawn = [progressive_part(3, step, 5) for step in range(30_000)]
    for n in range(5):
        for k in range(1, 6):
            share = drawn.count((n, k)) / len(drawn)
            assert share == pytest.approx(1 / 5 / (5 - n) if k <= 5 - n else 0, abs=0.006), (n, k)
    assert drawn == [progressive_part(3, step, 5) for step in range(30_000)]
    assert (
        drawn[:6]
        == [progressive_part(3, step, 5) for step in range(6)]
        != [progressive_part(4, step, 5) for step in range(6)]
    )


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("backprop", [None, 2])
def test_progressive_loss_is_the_authors_loop(recurrent, inputs, alpha, backprop):
    """Deep Thinking's train_progressive and get_output_for_prog_loss, by calls that go on from a detached state."""
    model: Any = load_model(str(recurrent)).train()
    keep, targets = inputs["labels"][:, 1:] != -100, inputs["labels"][:, 1:]

    def summed(**options) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(input_ids=inputs["input_ids"], use_cache=False, **options)
        return F.cross_entropy(out.logits[:, :-1][keep], targets[keep], reduction="sum"), out.last_state

    seen = set()
    for step in range(8):
        found = loss_and_gradients(model, {"progressive": {"alpha": alpha}}, inputs, Depth(4, backprop), step)
        model.zero_grad(set_to_none=True)
        full, _ = summed(num_recurrences=4, grad_recurrences=backprop)
        n, k = progressive_part(0, step, 4)
        seen.add(n > 0)
        thought = {"initial_state": summed(num_recurrences=n)[1].detach()} if n else {}
        part, _ = summed(num_recurrences=k, grad_recurrences=backprop and min(k, backprop), **thought)
        check_same(model, (1 - alpha) * full + alpha * part if alpha < 1 else part, found)
    assert seen == {True, False}


def test_segments_are_of_equal_length():
    for recurrences in range(1, 20):
        for segments in range(2, 8):
            ends = segment_ends(recurrences, segments)
            lengths = [b - a for a, b in itertools.pairwise([0, *ends])]
            assert len(ends) == min(recurrences, segments)
            assert sum(lengths) == recurrences
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("recurrences", [1, 2, 5])
def test_deep_supervision_is_a_loop_over_segments(recurrent, inputs, recurrences):
    """Each segment is a call that goes on from the detached state of the one before; their mean loss is one step."""
    model: Any = load_model(str(recurrent)).train()
    found = loss_and_gradients(model, {"deep_supervision": {"segments": 3}}, inputs, Depth(recurrences, None))
    model.zero_grad(set_to_none=True)
    lengths = {1: [1], 2: [1, 1], 5: [2, 2, 1]}[recurrences]
    keep, targets = inputs["labels"][:, 1:] != -100, inputs["labels"][:, 1:]
    state: dict[str, torch.Tensor] = {}
    total: Any = 0.0
    for length in lengths:
        out = model(input_ids=inputs["input_ids"], use_cache=False, num_recurrences=length, **state)
        total = total + F.cross_entropy(out.logits[:, :-1][keep], targets[keep], reduction="sum") / len(lengths)
        state = {"initial_state": out.last_state.detach()}
    check_same(model, total, found)


def test_gate_stages_of_a_model(gated, inputs):
    model: Any = load_model(str(gated)).train()
    torch.nn.init.normal_(model.exit_gate.weight)

    def joint(flat, targets, gates):
        lam = torch.sigmoid(torch.stack(gates))
        left, total, entropy = torch.ones_like(lam[0]), 0.0, 0.0
        for r, x in enumerate(flat):
            p = left * lam[r] if r + 1 < len(flat) else left
            left = left * (1 - lam[r])
            total = total + p * F.cross_entropy(x, targets, reduction="none")
            entropy = entropy - p * p.log()
        # 0.1 falls to 0.05 over the 11 steps of the run: 0.085 at step 3
        return [total - 0.085 * entropy]

    keys = {"exit_gate": {"entropy": 0.1, "entropy_end": 0.05}}
    found = loss_and_gradients(model, keys, inputs, Depth(3, None))
    check_same(model, depth_losses(model, inputs, Depth(3, None), joint)[0].sum(), found)

    def gate_only(flat, targets, gates):
        each = torch.stack([F.cross_entropy(x, targets, reduction="none") for x in flat]).detach()
        w = torch.sigmoid(50 * ((each[:-1] - each[1:]).clamp(min=0) - 0.005))
        lam = torch.sigmoid(torch.stack(gates))[1:]
        return [-(w * (1 - lam).log() + (1 - w) * lam.log()).sum(0) / len(flat)]

    found = loss_and_gradients(model, {"exit_gate": {"stage": "gate"}}, inputs, Depth(3, None))
    check_same(model, depth_losses(model, inputs, Depth(3, None), gate_only)[0].sum(), found)


def test_ponder_of_a_model_that_halts(tokenizer, inputs, tmp_path):
    path = save_recurrent(tmp_path / "act", tokenizer, halting="act", prelude=[], core=[0, 1], coda=[])
    model: Any = load_model(str(path)).train()
    torch.nn.init.normal_(model.halting_gate.weight)
    found = loss_and_gradients(model, {"ponder": {"weight": 0.5}}, inputs, Depth(3, None))
    model.zero_grad(set_to_none=True)
    out = model(input_ids=inputs["input_ids"], use_cache=False, num_recurrences=3)
    keep = inputs["labels"][:, 1:] != -100
    own = F.cross_entropy(out.logits[:, :-1][keep], inputs["labels"][:, 1:][keep], reduction="sum")
    check_same(model, own + 0.5 * out.ponder[:, :-1][keep].sum(), found)


def test_balanced_experts(inputs):
    """transformers' load-balancing loss over all recurrences, at each of several depths and of a plain model."""
    torch.manual_seed(0)
    layers = {"prelude": [0], "core": [1, 2], "coda": [3], "injection": "linear"}
    config = RecurrentDepthConfig(source_config=source_config("mixtral"), num_recurrences=3, **layers)
    model, depth = RecurrentDepthForCausalLM(config).train(), Depth(3, None)
    found = loss_and_gradients(model, {"experts": 0.1, "exits": {"intermediate": 0.5}}, inputs, depth)
    losses = depth_losses(model, inputs, depth)
    out = model(input_ids=inputs["input_ids"], num_recurrences=3, use_cache=False, output_router_logits=True)
    assert len(out.router_logits) == 8
    total = sum(0.5 * x.sum() for x in losses[:2]) + losses[2].sum()
    check_same(model, total + 0.1 * len(losses[0]) * out.aux_loss, found)
    plain = type(model.source)(config.source_config).train()
    wanted = plain(input_ids=inputs["input_ids"], labels=inputs["labels"], output_router_logits=True, use_cache=False)
    objective = Objective(Objectives.model_validate({"experts": 0.02}), plain.config, None, 11, 0, 0)
    assert plain.config.router_aux_loss_coef == 0.001
    loss = objective(plain, inputs, 3, None, len(losses[0]))
    assert close(loss, wanted.loss + (0.02 - 0.001) * wanted.aux_loss)


def test_distillation_at_every_depth(recurrent, inputs):
    model = load_model(str(recurrent)).train()
    wanted = random(2, 12, 272, seed=4)

    def distilled(flat, targets, _):
        keep = inputs["labels"][:, 1:].flatten() != -100
        p = (wanted[:, :-1].flatten(0, 1)[keep] / 2).softmax(-1)
        return [4 * (p * (p.log() - (x / 2).log_softmax(-1))).sum(-1) for x in flat]

    keys = {"cross_entropy": 0, "distillation": {"teacher": "-", "temperature": 2}, "exits": {"intermediate": 0.3}}
    found = loss_and_gradients(model, keys, inputs, Depth(3, None), teacher=lambda _: wanted)
    each = [x.sum() for x in depth_losses(model, inputs, Depth(3, None), distilled)]
    check_same(model, 0.3 * sum(each[:-1]) + each[-1], found)


def test_no_two_depths_of_logits_are_held_at_once(recurrent, inputs):
    """Memory saved for the backward pass grows by less than the logits of one depth."""
    model = load_model(str(recurrent)).train()

    def kept(recurrences: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return x

        objective = Objective(Objectives.model_validate({"exits": {}}), model.config, None, 1, 0, 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = objective(model, inputs, 0, Depth(recurrences, 1), 10)
        loss.backward()
        return sum(sizes.values())

    logits = 2 * 12 * 272 * 4
    assert kept(6) - kept(2) < 4 * logits / 2


DISTILLATION = {"teacher": "-", "temperature": 2}
# Objectives, and the model and teacher that they need.
FEW = {
    "cross-entropy": ({}, "recurrent", None),
    "plain": ({}, "plain", None),
    "exits": ({"exits": {"weights": "layerskip"}}, "recurrent", None),
    "from the final depth": ({"exits": {"target": "final"}}, "recurrent", None),
    "nested": ({"nested": 2}, "recurrent", None),
    "gate": ({"exit_gate": {"entropy": 0.1}}, "gated", None),
    "gate alone": ({"exit_gate": {"stage": "gate"}}, "gated", None),
    "distillation": ({"distillation": {**DISTILLATION, "divergence": "reverse-kl"}}, "recurrent", "model"),
    "deep supervision": ({"deep_supervision": {"segments": 2}}, "recurrent", None),
    "progressive": ({"progressive": {"alpha": 0.4}}, "recurrent", None),
    "exits and distillation": ({"exits": {}, "distillation": DISTILLATION}, "recurrent", "model"),
    "top k": ({"distillation": {**DISTILLATION, "top_k": 5}}, "recurrent", "stored"),
    "plain, distilled": ({"distillation": DISTILLATION}, "plain", "model"),
    "blocks": ({"average": "blocks"}, "recurrent", None),
    "blocks, exits": ({"average": "blocks", "exits": {}}, "recurrent", None),
}


@pytest.mark.parametrize("case", FEW)
def test_logits_at_few_targets_give_the_loss_of_all(case, recurrent, plain, gated, inputs):
    """The head runs at the targets alone, and loss and gradients are those of all positions."""
    from loopwise.train import teacher
    from loopwise.train.recipe import Distillation

    objectives, name, of = FEW[case]
    model: Any = load_model(str({"recurrent": recurrent, "plain": plain, "gated": gated}[name])).train()
    if name == "gated":
        torch.nn.init.normal_(model.exit_gate.weight)
    labels = torch.full_like(inputs["labels"], -100)
    for row, place in ((0, 1), (0, 5), (0, 6), (1, 11)):
        labels[row, place] = inputs["input_ids"][row, place]
    few = {**inputs, "labels": labels}
    given = teacher.Teacher(Distillation(teacher=str(recurrent), num_recurrences=2), torch.device("cpu"), "float32")
    if of == "stored":
        values, places = (given(few) / 2).log_softmax(-1).topk(5)
        few |= {"teacher_ids": places, "teacher_log_probs": values}
    options = {"teacher": {None: None, "model": given, "stored": teacher.stored}[of]}
    heads = [model.get_output_embeddings(), given.model.get_output_embeddings()]
    seen: list[tuple[int, ...]] = []
    hooks = [head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape))) for head in heads]
    depth = None if name == "plain" else Depth(3, None)
    found, gradients = loss_and_gradients(model, objectives, few, depth, **options)
    assert {*seen} == {(1, 4, 272)}
    seen.clear()
    wanted, expected = loss_and_gradients(model, objectives, few, depth, selects=False, **options)
    assert {*seen} == {(2, 12, 272)}
    for hook in hooks:
        hook.remove()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.item() != 0
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(gradients[key], gradient, rtol=0, atol=2e-6 * gradient.abs().max().item()), key


@pytest.mark.parametrize("more", [{}, {"exits": {}}, {"nested": 2}, {"distillation": {"teacher": "t"}}])
def test_blocks_count_alike_however_many_targets_they_have(recurrent, inputs, more):
    """The loss of a micro-batch is the sum of its blocks' mean losses, over the blocks of the step."""
    model: Any = load_model(str(recurrent)).train()
    labels = inputs["labels"].clone()
    labels[1, :9] = -100  # 8 targets beside 3
    options: dict[str, Any] = {"teacher": lambda _: random(2, 12, 272, seed=9)} if "distillation" in more else {}
    found = loss_and_gradients(
        model, {"average": "blocks", **more}, {**inputs, "labels": labels}, Depth(3, None), selects=False, **options
    )
    wanted: Any = 0.0
    gradients: dict[str, torch.Tensor] = {}
    for row, count in ((0, 8), (1, 3)):
        alone = labels.clone()
        alone[1 - row] = -100
        loss, own = loss_and_gradients(
            model, more, {**inputs, "labels": alone}, Depth(3, None), selects=False, **options
        )
        wanted += loss / count
        gradients = {name: gradients.get(name, 0) + g / count for name, g in own.items()}
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(found[1][name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item()), name


def test_logits_at_many_targets_or_none_are_computed_everywhere(recurrent, inputs):
    """Text trains as before, to the bit. A batch without a target has a loss of 0, with a gradient in every weight."""
    model: Any = load_model(str(recurrent)).train()
    seen: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape[:2]))
    for count, dense in ((22, True), (13, True), (12, False), (0, True)):
        labels = torch.full_like(inputs["labels"], -100)
        chosen = [(i // 11, 1 + i % 11) for i in range(count)]  # nothing predicts the first of a row
        for place in chosen:
            labels[place] = inputs["input_ids"][place]
        seen.clear()
        loss, gradients = loss_and_gradients(model, {}, {**inputs, "labels": labels}, Depth(2, None))
        assert seen == [(2, 12) if dense else (1, count)]
        assert len(gradients) == len([*model.parameters()])
        assert (loss.item() == 0) == (count == 0)


DISTILLED = ["objectives.cross_entropy=0", "objectives.distillation.temperature=2", "steps=8", "log_every=1"]


@pytest.fixture(scope="module")
def sharp(tmp_path_factory, tokenizer):
    """A plain model whose distributions are far from uniform."""
    from transformers import AutoModelForCausalLM

    from tests.helpers.train_tiny import llama_config

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "sharp"
    AutoModelForCausalLM.from_config(llama_config(initializer_range=0.2)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_distillation_from_the_disk_equals_that_in_the_process(recurrent, sharp, command, tmp_path):
    """With all tokens but one on disk, the rest is that one token, and the loss is the same."""
    teacher = f"objectives.distillation.teacher={sharp}"
    for name, more in {"one": [], "two": ["objectives.distillation.top_k=271"]}.items():
        run(command(recurrent, tmp_path / name, teacher, *DISTILLED, *more, "recurrence.mean=2"))
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=2e-4)
    assert one[-1] < 0.95 * one[0]
    assert one[0] > 0.1


def test_distillation_from_itself_is_nothing(recurrent, command, tmp_path):
    run(command(recurrent, tmp_path / "out", f"objectives.distillation.teacher={recurrent}", *DISTILLED))
    assert history(tmp_path / "out")[0] == pytest.approx(0, abs=1e-6)


def test_answers_alone_train_as_all_positions_do(recurrent, tokenizer, tmp_path, monkeypatch):
    """A run on conversations, of which few tokens are learned, with and without logits at these alone."""
    import json

    talk = [{"role": "user", "content": "the core runs again " * 3}, {"role": "assistant", "content": "over"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(60)))
    data = [f"data.train={file}", "data.chat_field=messages", "data.sequence_length=32", "batch_size=2", "steps=4"]
    more = ["log_every=1", "optimiser.learning_rate=3e-3", "recurrence.mean=2"]
    run(["train", str(recurrent), str(tmp_path / "few"), *data, *more])
    monkeypatch.setattr(Objective, "selects", False)
    run(["train", str(recurrent), str(tmp_path / "all"), *data, *more])
    assert history(tmp_path / "few") == pytest.approx(history(tmp_path / "all"), rel=1e-5)
    assert not same(tmp_path / "few", recurrent)


def test_a_killed_precomputation_begins_anew(recurrent, plain, corpus, tokenizer, tmp_path):
    from loopwise.train import teacher
    from loopwise.train.data import build
    from loopwise.train.recipe import Data, Distillation

    keys = Distillation(teacher=str(plain), top_k=4)
    blocks = build(Data(train=[str(corpus)], sequence_length=32), tokenizer, tmp_path / "tokens")
    teacher.allocate(keys, blocks)
    for rank in range(2):
        teacher.precompute(keys, blocks, torch.device("cpu"), "float32", 8, (rank, 2))
    found = teacher.load(blocks)
    with torch.no_grad():
        logits = load_model(str(plain))(torch.from_numpy(blocks.train.tokens[:20].astype(np.int64))).logits
    values, ids = logits.log_softmax(-1).topk(4)
    assert np.allclose(found["teacher_log_probs"][:20], values, atol=1e-5)
    assert (found["teacher_ids"][:20] == ids.numpy()).mean() > 0.999
    assert (found["teacher_log_probs"].max(-1) < 0).all()


REFUSED = {
    "objectives.exits.intermediate=0.1 objectives.nested=2": "exits and nested both weigh the depths",
    "objectives.progressive.alpha=0.5 objectives.nested=2": "nested and progressive both weigh the depths",
    "objectives.progressive.alpha=0": "objectives.progressive.alpha=0: Input should be greater than 0",
    "objectives.deep_supervision.segments=1": "segments=1: Input should be greater than or equal to 2",
    "objectives.deep_supervision.segments=2 recurrence.backprop=1": "both cut the gradient between recurrences",
    "objectives.cross_entropy=0": "cross_entropy=0 leaves the loss empty",
    "objectives.exit_gate.entropy=0.1": "objectives.exit_gate: this model has no exit gate",
    "objectives.ponder.weight=0.1": "objectives.ponder: this model's tokens do not halt",
    "objectives.router.z_loss=0.1": "objectives.router: this model has no router",
    "objectives.experts=0.1": "objectives.experts=0.1 has no effect: this llama has no experts to balance",
    "recurrence.capacity_warmup=0.1": "recurrence.capacity_warmup: this model has no expert-choice router",
    "objectives.distillation.weight=1": "objectives.distillation.teacher: Field required",
    "objectives.distillation.teacher=nowhere/at/all": "nowhere/at/all: no such model directory",
    "objectives.distillation.teacher=PLAIN objectives.distillation.top_k=999": (
        "top_k=999: give less than the vocabulary"
    ),
    "objectives.distillation.teacher=PLAIN objectives.distillation.num_recurrences=2": "is a plain llama",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_bad_objectives(settings, recurrent, plain, command, tmp_path, capsys):
    arguments = command(recurrent, tmp_path / "out", *settings.replace("PLAIN", str(plain)).split())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert REFUSED[settings] in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_objectives_on_a_plain_model(plain, recurrent, command, tmp_path, capsys):
    assert main(command(plain, tmp_path / "out", "steps=2", "objectives.exits.intermediate=0.1")) == 2
    assert "objectives.exits belongs to recurrent-depth models; this is a llama" in capsys.readouterr().err
    run(command(plain, tmp_path / "out", "steps=2", f"objectives.distillation.teacher={recurrent}"))


@pytest.mark.parametrize(
    "objective",
    [
        "objectives.progressive.alpha=0.5",
        "objectives.average=blocks",
        pytest.param("objectives.exit_gate.entropy=0.1", marks=pytest.mark.slow),
        pytest.param("objectives.deep_supervision.segments=2", marks=pytest.mark.slow),
    ],
)
def test_accumulation_changes_no_objective(gated, command, tmp_path, objective):
    settings = ["steps=4", "log_every=1", "recurrence.mean=3", objective]
    run(command(gated, tmp_path / "one", *settings))
    run(command(gated, tmp_path / "two", *settings, "batch_size=2", "gradient_accumulation=2"))
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=1e-5)
    run(command(gated, tmp_path / "three", *settings, "gradient_checkpointing=recurrence"))
    assert history(tmp_path / "three") == pytest.approx(history(tmp_path / "one"), abs=1e-5)
    assert not same(tmp_path / "one", gated)


ROUTED = {"injection": "none", "num_recurrences": 2}
# Fields of a model: settings, and the error that refuses them before a token is read.
UNFIT = {
    "expert": (
        {**ROUTED, "router": {"kind": "expert", "depths": 2}},
        {
            "objectives.router.balancing=0.1": "balancing=0.1 has no effect: this model's router is e",
            "objectives.router.bias_step=0.1": "objectives.router.bias_step=0.1 has no effect",
            "recurrence.eval_at=1,3 data.eval_fraction=0.1": "recurrence.eval_at=3: this model's expert-choice router",
        },
    ),
    "token": (
        {**ROUTED, "router": {"kind": "token", "depths": 2, "kv": "first-recursion"}},
        {
            "objectives.router.auxiliary=0.001": "objectives.router.auxiliary=0.001 has no effect",
            "recurrence.eval_at=1 data.eval_fraction=0.1": "router runs exactly 2 recurrences",
            "objectives.progressive.alpha=0.5": "this model's token-choice router runs exactly 2",
            "gradient_checkpointing=layer": "this model's router.kv=first-recursion reads what the first",
            "objectives.deep_supervision.segments=2": "this model's router.kv=first-recursion reads what the first",
        },
    ),
    "uninjected": (
        {"injection": "none"},
        {"objectives.progressive.alpha=1": "alpha=1: with injection='none', recurrences without gradient would leave"},
    ),
    "halting": (
        {"halting": "act", "prelude": [], "core": [0, 1], "coda": []},
        {"objectives.deep_supervision.segments=2": "deep_supervision: with halting=act every depth is a mean of all"},
    ),
    "first": (
        {"kv_policy": "first"},
        {
            "gradient_checkpointing=recurrence": "this model's kv_policy=first reads what the first",
            "gradient_checkpointing=true": "gradient_checkpointing=layer: this model's kv_policy=first reads",
            "objectives.deep_supervision.segments=2": "this model's kv_policy=first reads what the first recurrence",
        },
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_a_model_has_no_use_for_is_refused(kind, tokenizer, plain, command, tmp_path, capsys):
    changes, refused = UNFIT[kind]
    model = save_recurrent(tmp_path / "model", tokenizer, **changes)
    for settings, message in refused.items():
        assert main(command(model, tmp_path / "out", "steps=1", *settings.split())) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    assert main(command(plain, tmp_path / "out", "steps=1", "gradient_checkpointing=recurrence")) == 2
    assert "this is a plain llama: use gradient_checkpointing=layer" in capsys.readouterr().err


def test_layers_that_transformers_cannot_checkpoint(tokenizer, command, tmp_path, capsys):
    """Whole recurrences of CTRL's can be, and the run is the same as without."""
    torch.manual_seed(0)
    source = source_config("ctrl", vocab_size=len(tokenizer))
    config = RecurrentDepthConfig(source_config=source, prelude=[0], core=[1, 2], coda=[3], num_recurrences=3)
    RecurrentDepthForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for more in ([], ["--dry-run"]):
        arguments = command(tmp_path / "model", tmp_path / "out", "steps=2", "gradient_checkpointing=layer", *more)
        assert main(arguments) == 2
        message = "gradient_checkpointing=layer: transformers cannot checkpoint ctrl layers; use recurrence or none"
        assert capsys.readouterr().err == f"loopwise: error: {message}\n"
        assert not (tmp_path / "out").exists()
    for kind in ("none", "recurrence"):
        run(command(tmp_path / "model", tmp_path / kind, "steps=2", f"gradient_checkpointing={kind}"))
    assert same(tmp_path / "none", tmp_path / "recurrence")

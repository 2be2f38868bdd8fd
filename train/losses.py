"""Training losses, on plain tensors.

Shapes: B batch, T tokens, V vocabulary, R depths or recurrences. Losses are per token [B, T] in nats and float32,
unless a docstring names another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits in a chunk of tokens; a divergence makes several float32 copies of them


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """The target [B, T] of every position, -100 for none. (Shifting the logits instead would copy them.)"""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) [B, T] from logits [B, T, V] and targets [B, T]; 0 for a target of -100."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float, reverse: bool) -> torch.Tensor:
    """temperature^2 KL(teacher || student), or with `reverse` KL(student || teacher), from logits [..., V].

    Both distributions are at `temperature` (Hinton et al., arXiv 1503.02531).
    """
    s, t = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    first, second = (s, t) if reverse else (t, s)
    return temperature**2 * (first.exp() * (first - second)).sum(-1)


def top_k_divergence(
    student: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, temperature: float, reverse: bool
) -> torch.Tensor:
    """`divergence` from the teacher's top k: ids [..., k] and their log_probs [..., k] at `temperature`.

    All other tokens count as one token. The result is at most the full divergence, and equal to it for k = V - 1.
    """
    s = (student.float() / temperature).log_softmax(-1)
    parts = [(s.gather(-1, ids.long()), log_probs.float())]
    rest = [torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7)) for x in parts[0]]
    s, t = (torch.cat(pair, -1) for pair in zip(parts[0], rest, strict=True))
    first, second = (s, t) if reverse else (t, s)
    return temperature**2 * (first.exp() * (first - second)).sum(-1)


def by_chunks(function: Callable, student: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`function(student, *others)` per token [B, T], in chunks of tokens, recomputed in the backward pass."""
    flat = [x.flatten(0, 1) for x in (student, *others)]
    size = max(1, CHUNK // student.shape[-1])
    parts = [
        checkpoint(function, *(x[i : i + size] for x in flat), use_reentrant=False)
        for i in range(0, len(flat[0]), size)
    ]
    return torch.cat(parts).view(student.shape[:-1])


def layerskip_weights(recurrences: int, scale: float) -> list[float]:
    """LayerSkip's normalized e(l) (arXiv 2404.16710), with l = depth - 1 and L = `recurrences`.

    Before the division by their sum: scale (0 + ... + l) for l < L - 1, and L - 1 + scale (0 + ... + L - 2) for the
    last.
    """
    last = recurrences - 1
    raw = [scale * i * (i + 1) / 2 for i in range(last)] + [last + scale * last * (last - 1) / 2]
    return [1.0] if last == 0 else [weight / sum(raw) for weight in raw]


def exit_probabilities(exit_logits: torch.Tensor) -> torch.Tensor:
    """log p_r [R, B, T] from gate logits [R, B, T] (Ouro, arXiv 2510.25741).

    p_r = lambda_r prod_{j<r} (1 - lambda_j); the last depth has the remaining probability.
    """
    continued = F.logsigmoid(-exit_logits).cumsum(0)
    before = torch.cat([torch.zeros_like(continued[:1]), continued[:-1]])
    return torch.cat([(before + F.logsigmoid(exit_logits))[:-1], before[-1:]])


def expected_loss(losses: torch.Tensor, exit_logits: torch.Tensor, entropy: float) -> torch.Tensor:
    """sum_r p_r loss_r - entropy H(p), from losses [R, B, T] of all depths: Ouro's first stage (arXiv 2510.25741)."""
    log_p = exit_probabilities(exit_logits.float())
    p = log_p.exp()
    return (p * losses).sum(0) + entropy * (p * log_p).sum(0)


def gate_loss(losses: torch.Tensor, exit_logits: torch.Tensor, slope: float, threshold: float) -> torch.Tensor:
    """Ouro's second stage (arXiv 2510.25741): a loss of the gate only, from losses [R, B, T].

    The target of the gate at depth r = 2 .. R is to continue with probability w = sigmoid(slope (improvement -
    threshold)), where improvement = max(0, loss_{r-1} - loss_r). The result is the mean over R of the binary
    cross-entropy -(w log(1 - lambda_r) + (1 - w) log lambda_r).
    """
    losses = losses.detach()
    target = torch.sigmoid(slope * ((losses[:-1] - losses[1:]).clamp(min=0) - threshold))
    logits = exit_logits.float()[1:]
    return F.binary_cross_entropy_with_logits(-logits, target, reduction="none").sum(0) / len(losses)


def router_prediction(logits: torch.Tensor, selected: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of an expert-choice router, a scalar (Mixture-of-Recursions, arXiv 2507.10524).

    logits, selected, candidates: [B, T, R]. Mean over the candidates of each recurrence, summed over recurrences.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), selected.float(), reduction="none")
    counts = candidates.sum((0, 1)).clamp(min=1)
    return ((losses * candidates).sum((0, 1)) / counts).sum()


def balancing_loss(probabilities: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """sum_i f_i P_i of a token-choice router, a scalar (Mixture-of-Recursions, arXiv 2507.10524).

    probabilities [N, R]; depths [N]: chosen, counted from 0. f_i = R x share of tokens that chose i, P_i = its mean
    probability. The result is 1 if both are uniform.
    """
    count = probabilities.shape[-1]
    shares = F.one_hot(depths, count).float().mean(0) * count
    return (shares * probabilities.float().mean(0)).sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean square of logsumexp over the last dimension (ST-MoE, arXiv 2202.08906); a scalar."""
    return logits.float().logsumexp(-1).square().mean()


def balanced_bias(bias: torch.Tensor, counts: torch.Tensor, step: float) -> torch.Tensor:
    """The bias [R] after one step of loss-free balancing (arXiv 2408.15664).

    counts [R]: tokens of the step that chose each depth. The bias grows for depths below the mean count, and falls for
    the others.
    """
    counts = counts.float()
    return bias + step * torch.sign(counts.mean() - counts)


def weighted(losses: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of weight x loss."""
    total = losses[0] * weights[0]
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * weight
    return total

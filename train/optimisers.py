"""Parameters by role, frozen roles, and the optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loopwise.errors import UserError

from .recipe import ROLES, Objectives, Optimiser

# Roles of modules whose name is not their role.
OTHERS = {
    "relaxation": "lora", "exit_gate": "gate", "halting_gate": "gate",
    "recurrence_encoding": "injection", "damping": "injection", "ends": "injection", "time_conditioning": "injection",
}  # fmt: skip
BODY = ("prelude", "core", "coda", "injection")  # roles whose matrices Muon trains (arXiv 2511.07384)


def roles(model: Any) -> dict[str, str]:
    """Role of every parameter, by its name. In a plain model all layers are `core`.

    All norms are `norms`. A matrix that the head shares with the embeddings is `embeddings`.
    """
    recurrent = hasattr(model, "core")
    head = model.get_output_embeddings()
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    of_input = {id(p) for p in model.get_input_embeddings().parameters()}
    places = {"prelude", "core", "coda", "injection", "router"}
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}" if module_name else name
            top = path.partition(".")[0]
            if ".lora_" in path and top != "relaxation":
                role = "adapters"
            elif id(parameter) in of_input:
                role = "embeddings"
            elif id(parameter) in of_head:
                role = "head"
            elif top in OTHERS:
                role = OTHERS[top]
            elif "norm" in type(module).__name__.lower():
                role = "norms"
            elif top in places:
                role = top
            else:  # position embeddings, or the layers of a plain model
                role = "embeddings" if recurrent or isinstance(module, nn.Embedding) else "core"
            found.setdefault(path, role)
    return found


def freeze(model: Any, keys: Optimiser, objectives: Objectives, adapted: bool) -> None:
    """Set `requires_grad` of every parameter of `model`: False for roles that the recipe freezes.

    adapted: the model has PEFT adapters. An exit gate is trained only with objectives.exit_gate. Raises UserError if no
    parameter is left to train.
    """
    by_name = roles(model)
    wanted = set(keys.train or (["adapters"] if adapted else ROLES))
    if keys.train and adapted:
        wanted.add("adapters")
    if objectives.exit_gate and objectives.exit_gate.stage == "gate":
        wanted = {"gate"}
    for name, parameter in model.named_parameters():
        reached = objectives.exit_gate or not name.startswith("exit_gate.")  # no other loss reaches the gate
        parameter.requires_grad_(bool(by_name[name] in wanted and reached))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        present = sorted(set(by_name.values()))
        raise UserError(
            f"optimiser.train={','.join(sorted(wanted))}: no parameter is left to train; there are {', '.join(present)}"
        )


def groups(model: Any, keys: Optimiser) -> list[dict[str, Any]]:
    """Parameter groups of the trained parameters: one for each (Muon or not, multiplier, weight decay)."""
    by_name = roles(model)
    decaying = _decaying(model)
    multipliers: dict[Any, float] = dict(keys.multipliers or {})
    found: dict[tuple[bool, float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = keys.kind == "muon" and by_name[name] in BODY and parameter.dim() == 2
            decay = keys.weight_decay if name in decaying else 0.0
            found.setdefault((muon, multipliers.get(by_name[name], 1.0), decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "muon": muon,
            "lr": (keys.muon_learning_rate if muon else keys.learning_rate) * multiplier,
            "weight_decay": decay,
        }
        for (muon, multiplier, decay), parameters in found.items()
    ]


def _decaying(model: Any) -> set[str]:
    """Names of the parameters with weight decay: matrices, but no norms, biases and per-depth magnitudes."""
    by_name = roles(model)

    def is_matrix(name: str, parameter: torch.Tensor) -> bool:
        if by_name[name] == "lora":
            return name.endswith(("lora_A", "lora_B"))
        return by_name[name] != "norms" and parameter.dim() > 1

    return {name for name, parameter in model.named_parameters() if is_matrix(name, parameter)}


def build(model: Any, keys: Optimiser) -> torch.optim.Optimizer:
    """The optimiser over the trained parameters of `model`."""
    parts = groups(model, keys)
    muon = [part for part in parts if part["muon"]]
    rest = [part for part in parts if not part["muon"]]
    options: Any = {"betas": tuple(keys.betas), "eps": 1e-8, "fused": True}
    if not muon:
        return torch.optim.AdamW(rest, lr=keys.learning_rate, **options)
    return MuonAndAdamW(muon, rest, {"momentum": keys.muon_momentum, "adjust_lr_fn": keys.muon_adjust}, options)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The result of a step's `closure`, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Muon(torch.optim.Muon):
    """torch's Muon with its orthogonalisation in float32 on CPUs: with AVX2 alone, bfloat16 takes 35 times as long."""

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step. On other devices it computes in bfloat16, as torch does."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(grad)
        momentum: torch.Tensor = self.state[parameter]["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = update.to(precision(update.device))
        update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        rms = group["adjust_lr_fn"] == "match_rms_adamw"
        scale = 0.2 * max(rows, columns) ** 0.5 if rms else max(1, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def precision(device: torch.device) -> torch.dtype:
    """The type in which Muon multiplies matrices."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """`matrix` (rows, columns) with singular values near 1, by a quintic Newton-Schulz iteration in its own dtype.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.mT if tall else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the groups `muon` and AdamW for the groups `rest`, as one optimiser with one state."""

    def __init__(self, muon: list[dict], rest: list[dict], muon_options: dict, adamw_options: dict):
        self.muon = Muon(muon, **muon_options)
        self.adamw = torch.optim.AdamW(rest, **adamw_options) if rest else None
        super().__init__(list(itertools.chain(*(part.param_groups for part in self._parts()))), {})
        self._join()

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [self.muon, self.adamw] if self.adamw else [self.muon]

    def _join(self) -> None:
        """Give both parts the groups and the state of the whole, which accelerate and a resume replace."""
        for part, muon in zip(self._parts(), (True, False), strict=False):
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both parts."""
        loss = evaluated(closure)
        self._join()
        for part in self._parts():
            part.step()
        return loss

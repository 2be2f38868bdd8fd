"""The engine's computation, written the slow way: one request, one position at a time, on transformers' layers.

Each layer and slot has a plain tensor of keys and one of values. Exits, rules and policies are implemented anew.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from loopwise.model.initial_state import initial_state


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    margin: float = float("inf")  # smallest lead of the best token, or relative distance of an exit from its threshold


class Store:
    """A stand-in for transformers' cache: keys and values of a layer go to `layer`, `slot` and `positions`."""

    def __init__(self, policy: str, limit: int, length: int):
        self.policy, self.limit, self.length = policy, limit, length
        self.kept: dict[tuple[str, int, int], list[torch.Tensor]] = {}

    def slot(self, depth: int) -> int:
        if self.policy in ("single", "first"):
            return 0
        return depth % int(self.policy[7:]) if self.policy.startswith("modulo-") else depth

    def at(self, part: str, layer: int, depth: int, positions: torch.Tensor) -> Store:
        self.key = (part, layer, self.slot(depth) if part == "core" else 0)
        self.writes = not (part == "core" and self.policy == "first" and depth)
        self.positions = positions
        return self

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any):
        if self.key not in self.kept:
            empty = [new.new_zeros(*new.shape[:2], self.length, new.shape[3]) for new in (keys, values)]
            self.kept[self.key] = empty
        kept = self.kept[self.key]
        if self.writes:
            for whole, new in zip(kept, (keys, values), strict=True):
                whole[:, :, self.positions] = new
        reach = int(self.positions.max()) + 1
        return kept[0][:, :, :reach], kept[1][:, :, :reach]

    def leave(self, layers: int, depth: int, position: int) -> None:
        """An exit after `depth` recurrences copies its last keys and values to the slots beyond."""
        last = self.limit if self.policy == "last-exited" else 0
        if self.policy.startswith("modulo-"):
            last = min(self.limit, int(self.policy[7:]))
        for slot in range(depth, last):
            for layer in range(layers):
                source = self.kept["core", layer, depth - 1]
                target = self.kept.setdefault(("core", layer, slot), [torch.zeros_like(t) for t in source])
                for whole, old in zip(target, source, strict=True):
                    whole[:, :, position] = old[:, :, position]


class Oracle:
    def __init__(self, model: Any, policy: str | None = None, length: int = 128):
        self.model, self.config, self.length = model.eval(), model.config, length
        self.policy = policy or model.config.kv_policy
        self.taps = [m for m in model.source.modules() if type(m).__name__ == "Tap"]
        self.text: dict[int, int] = {}  # token of each position, for layers that embed them
        self.limit = 0  # R of the request

    # ---- the model, one call at a time ----------------------------------------------------------------------------
    def source(self, ids: list[int], positions: torch.Tensor, visit: Any) -> Any:
        before = [tap.visit for tap in self.taps]
        for tap in self.taps:
            tap.visit = visit
        try:
            return self.model.source(input_ids=torch.tensor([ids]), position_ids=positions[None], use_cache=False)
        finally:
            for tap, old in zip(self.taps, before, strict=True):
                tap.visit = old

    def run(self, part: str, x: torch.Tensor, positions: torch.Tensor, store: Store, depth: int = 0) -> torch.Tensor:
        """x [N, D] at `positions` through a part's layers, at `depth` counted from 0."""
        passed: dict[int, tuple[tuple, dict]] = {}

        def note(index, hidden, args, kwargs):
            passed[index] = (args, kwargs)
            return hidden

        self.source([0] * len(positions), positions, note)
        x = x[None]
        for n, source in enumerate(getattr(self.config, part)):
            args, kwargs = passed[source]
            if "token_ids" in kwargs:
                kwargs = {**kwargs, "token_ids": torch.tensor([[self.text[at] for at in positions.tolist()]])}
            kind = getattr(self.config.source_config, "layer_types", None)
            window = getattr(self.config.source_config, "sliding_window", None)
            window = window if kind is None or kind[source] == "sliding_attention" else None
            keys = torch.arange(int(positions.max()) + 1)
            back = positions[:, None] - keys
            seen = (back >= 0) & (back < (window or 1 << 30))
            mask = torch.where(seen, 0.0, float("-inf"))[None, None]
            layer = getattr(self.model, part)[n]
            call = inspect.signature(layer.forward).bind(x, *args, **kwargs)
            known = call.signature.parameters
            cache = next((name for name in ("past_key_values", "layer_past") if name in known), "past_key_values")
            for name, value in {"attention_mask": mask, cache: store.at(part, n, depth, positions)}.items():
                (call.arguments if name in known else call.arguments["kwargs"])[name] = value
            more = {"depth": depth} if part == "core" and self.config.relaxation else {}
            if part == "core" and self.config.time_conditioning:
                more["time"] = self.model.time_conditioning(depth, self.limit, x.device)
            x = layer(*call.args, **call.kwargs, **more)
            x = x[0] if isinstance(x, tuple) else x
        return x[0]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        last = len(self.taps) - 1
        out = self.source([0] * len(x), torch.arange(len(x)), lambda i, h, a, k: x[None] if i == last else h)
        return out.logits[0]

    def coda(self, s: torch.Tensor, positions: torch.Tensor, store: Store) -> torch.Tensor:
        if self.config.recurrence_norm == "last":
            s = self.model._final_norm(s)
        return self.run("coda", self.model.ends.leave(s), positions, store)

    def damped(self, old: torch.Tensor, new: torch.Tensor, depth: int, limit: int) -> torch.Tensor:
        """One state [D] from those before and after recurrence `depth`, counted from 0, of a request of `limit`."""
        kind = self.config.recurrence_damping
        if kind == "1/R":
            return ((limit - 1) * old + new) / limit
        if kind == "selective":
            gate = self.model.damping
            rate = torch.log1p((gate.up @ (gate.down @ (new - old)) + gate.bias).exp()) * gate.log_rate.exp()
            return (-rate).exp() * new + (1 - (-rate).exp()) * old
        if kind == 1 or depth == 0:
            return new
        share = 1 / (1 + (-self.model.damping.weight).exp()) if kind == "learned" else kind
        return (1 - share) * old + share * new

    # ---- positions in lockstep --------------------------------------------------------------------------------
    def positions(self, ids, first: int, store: Store, answer: Answer, params: Any, forced: list[int]) -> torch.Tensor:
        """Run tokens `ids` from position `first` on. Returns the head's input [D] at the last.

        `forced`: their depths; 0 leaves a token to the rule.
        """
        positions = torch.arange(first, first + len(ids))
        embedded: list[torch.Tensor] = []
        self.source(ids, positions, lambda i, h, a, k: embedded.append(h) or h)
        self.text |= dict(zip(positions.tolist(), ids, strict=True))
        self.limit = params.num_recurrences
        e = self.model.ends.enter(self.run("prelude", embedded[0][0], positions, store))
        s = initial_state(self.config, e[None], positions[None], None)[0].clone()
        limit = params.num_recurrences
        rules = [Rule(params.exit_rule, params.exit_threshold, self, s[i]) for i in range(len(ids))]
        depths, out = [0] * len(ids), s.clone()
        for depth in range(limit):
            on = [i for i in range(len(ids)) if not depths[i] or self.policy == "per-depth"]
            if not on:
                break
            before = s.clone()
            x = s[on]
            if self.config.recurrence_norm == "between" and depth:
                x = self.model._final_norm(x)
            y = self.run("core", self.model.injection(x, e[on]), positions[on], store, depth)
            x = torch.stack([self.damped(*pair, depth, limit) for pair in zip(x, y, strict=True)])
            if self.config.recurrence_norm == "each":
                x = self.model.recurrence_norm(x)
            s[on] = x
            new = [i for i in on if not depths[i]]
            logits = None
            if any(rules[i].needs_logits and not forced[i] for i in new):
                logits = dict(zip(new, self.logits(self.coda(s[new], positions[new], store)), strict=True))
            for i in new:
                done = depth + 1 >= limit
                if forced[i]:
                    done |= depth + 1 >= forced[i]
                else:
                    far = rules[i].distance(before[i], s[i], logits[i] if logits else None)
                    fires = far is not None and far < 0 and depth + 1 >= params.min_recurrences
                    if far is not None and not done and depth + 1 >= params.min_recurrences:
                        answer.margin = min(answer.margin, abs(far))
                    done |= fires
                if done:
                    depths[i], out[i] = depth + 1, s[i]
                    store.leave(len(self.config.core), depth + 1, first + i)
        answer.depths.append(depths[-1])
        return self.coda(out, positions, store)[-1]

    @torch.no_grad()
    def generate(self, prompt: list[int], params: Any) -> Answer:
        """Greedy tokens by `params` (a serve.Params with every depth field set)."""
        answer, store, ids = Answer(), Store(self.policy, params.num_recurrences, self.length), list(prompt)
        trace = [*params.trace, *[0] * (self.length - len(params.trace))]
        forced = trace[: len(ids)]
        if not params.prompt_exit:
            forced = [depth or params.num_recurrences for depth in forced]
        x = self.positions(ids, 0, store, answer, params, forced)
        while True:
            best = penalised(self.logits(x[None])[0], ids, len(prompt), params).topk(2)
            answer.margin = min(answer.margin, float(best.values[0] - best.values[1]))
            answer.tokens.append(int(best.indices[0]))
            ids.append(answer.tokens[-1])
            if len(answer.tokens) == params.max_tokens or ids[-1] in params.stop_token_ids:
                return answer
            x = self.positions(ids[-1:], len(ids) - 1, store, answer, params, [trace[len(ids) - 1]])

    @torch.no_grad()
    def diffuse(self, prompt: list[int], params: Any, width: int) -> Answer:
        """Diffusion forcing without noise, in the order of the authors' loop. The longest converged prefix freezes."""
        of, limit = params.diffusion, params.num_recurrences
        answer, store = Answer(), Store(self.policy, limit, self.length)
        x = self.positions(prompt, 0, store, answer, params, [limit] * len(prompt))

        def best(logits: torch.Tensor) -> list[int]:
            top = logits.topk(2)
            answer.margin = min(answer.margin, float((top.values[:, 0] - top.values[:, 1]).min()))
            return top.indices[:, 0].tolist()

        frozen = [*prompt, *best(self.logits(x[None]))]
        tokens, first = list(frozen), len(prompt)
        states: list[Any] = [None]
        previous: Any = [None]
        changes: list[Any] = [None]
        old_e: Any = None
        old_first = first
        stable: dict[int, int] = {}
        depths, step = [0], 0
        while len(frozen) - len(prompt) < params.max_tokens:
            positions = torch.arange(first, first + len(states))
            embedded: list[torch.Tensor] = []
            self.source(tokens[first:], positions, lambda i, h, a, k, to=embedded: to.append(h) or h)
            new = self.run("prelude", embedded[0][0], positions, store)
            if step == 0:
                old_e = new
            old = old_e[first - old_first :]
            e = new * (1 - of.ema)
            e[: len(old)] += of.ema * old
            old_e = e
            starts = initial_state(self.config, new[None], positions[None], None)[0]
            s = torch.stack([starts[i] if s is None else s for i, s in enumerate(states)])
            previous = torch.stack([starts[i] if p is None else p for i, p in enumerate(previous)])
            for depth in range(of.inner):
                if self.config.recurrence_norm == "between":  # a state continues from the step before
                    begun = torch.tensor(depths)[:, None] + depth > 0
                    s = torch.where(begun, self.model._final_norm(s), s)
                y = self.run("core", self.model.injection(s, e), positions, store, depth)
                done = [own + depth for own in depths]
                s = torch.stack([self.damped(*each, limit) for each in zip(s, y, done, strict=True)])
                if self.config.recurrence_norm == "each":
                    s = self.model.recurrence_norm(s)
            guess = best(self.logits(self.coda(s, positions, store)))
            edits = [tokens[first], *guess[:-1]]
            for i in range(len(edits)):
                stable[first + i] = stable.get(first + i, 0) + (tokens[first + i] == edits[i])
            change = s - previous
            size = s.norm(dim=-1)
            if of.freeze == "acceleration":
                far = torch.stack([c if d is None else c - d for c, d in zip(change, changes, strict=True)])
                ok = self.below(far.norm(dim=-1) / size, of.threshold, answer)
            elif of.freeze == "latent-diff":
                ok = self.below(change.norm(dim=-1) / size, of.threshold, answer)
            elif of.freeze == "token-stability":
                ok = [stable[first + i] > limit // of.inner for i in range(len(edits))]
            else:
                ok = [i <= of.headway and step > limit // of.inner for i in range(len(edits))]
            depths = [depth + of.inner for depth in depths]
            if of.freeze != "fixed":
                ok = [yes or depth >= limit for yes, depth in zip(ok, depths, strict=True)]
            out = 0
            while out < len(ok) and ok[out]:
                out += 1
            out = max(out - 1, 0)
            frozen = [*frozen, *guess[:out]]
            room = max(min(of.headway, width - len(states)), 0)
            tokens = [*tokens[:first], *edits, *[guess[-1]] * room]
            more = list(s[-of.headway :])[:room] if of.continuous and len(s) >= of.headway else [None] * room
            old_first = first
            depths = [*depths, *[0] * room][out:]
            states, previous, changes = [*s, *more][out:], [*s, *more][out:], [*change, *[None] * room][out:]
            first += out
            step += 1
        answer.tokens = frozen[len(prompt) :][: params.max_tokens]
        return answer

    @staticmethod
    def below(values: torch.Tensor, threshold: float, answer: Answer) -> list[bool]:
        answer.margin = min(answer.margin, float(((values - threshold) / threshold).abs().min()))
        return (values < threshold).tolist()


def penalised(logits: torch.Tensor, ids: list[int], prompt: int, params: Any) -> torch.Tensor:
    """Logits [V] after tokens `ids`, the first `prompt` of them given.

    transformers' repetition penalty applies first, then OpenAI's two penalties.
    """
    if params.repetition_penalty not in (None, 1):
        process = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        logits = process(torch.tensor([ids]), logits[None].float())[0]  # pyright: ignore[reportArgumentType]
    for token, count in Counter(ids[prompt:]).items():
        logits[token] -= count * (params.frequency_penalty or 0) + (params.presence_penalty or 0)
    return logits


class Rule:
    """The exit rule of one position. It fires where `distance`, relative to the threshold, is below 0."""

    def __init__(self, name: str | None, threshold: float, oracle: Oracle, s: torch.Tensor):
        self.name, self.threshold, self.oracle = name, threshold, oracle
        vocabulary = oracle.config.vocab_size
        self.entropy, self.best, self.stable, self.left = 100.0, None, 0, 0.0
        self.p = torch.full((vocabulary,), 1 / vocabulary)
        self.needs_logits = name in ("entropy-diff", "kl", "minp-kl", "argmax-stability")

    def distance(self, before: torch.Tensor, after: torch.Tensor, logits: torch.Tensor | None) -> float | None:
        if self.name in (None, "fixed"):
            return None
        value = self.value(before, after, logits)
        if self.name in ("argmax-stability", "gate"):
            return (self.threshold - value) / max(self.threshold, 1e-9) - (1e-9 if value >= self.threshold else 0)
        return (value - self.threshold) / self.threshold

    def value(self, before, after, logits) -> float:
        if self.name == "latent-diff":
            return float(torch.dist(after, before) / after.norm())
        if self.name == "cosine":
            return 1 - float(torch.cosine_similarity(after, before, dim=0))
        if self.name == "gate":
            model = self.oracle.model
            gate = float(torch.sigmoid(model.exit_gate(after[None], model._final_norm))[0])
            self.left = self.left + (1 - self.left) * gate
            return self.left
        p = logits.softmax(-1)
        if self.name == "entropy-diff":
            old, self.entropy = self.entropy, float(torch.distributions.Categorical(p).entropy())
            return abs(self.entropy - old)
        if self.name == "argmax-stability":
            best = int(p.argmax())
            self.stable = self.stable + 1 if best == self.best else 0
            self.best = best
            return self.stable
        if self.name == "minp-kl":
            p = p.clone()
            p[p < 0.1 * p.max()] = 1 / len(p)
            p = p / p.sum()
        old, self.p = self.p, p
        return float((old * (old / p).log()).sum())

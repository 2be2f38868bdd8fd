"""`loopwise`: lm-eval's transformers model at a number of recurrences.

Batches, truncation, tokens and stops are those of lm-eval's HFLM. Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface

from ... import model as _registered  # noqa: F401  AutoModelForCausalLM finds recurrent-depth models by it
from ...errors import UserError
from ...sampling import end_tokens
from ...train.pretrained import is_recurrent
from .templates import ChatTemplates
from .work import Work

HFLM: Any = huggingface.HFLM  # its decorator hides its type


class LoopwiseLM(ChatTemplates, HFLM):
    """A recurrent-depth or plain model, loaded or a path, whose calls run `num_recurrences` recurrences.

    num_recurrences: R; default the config's. It may be changed between calls, and must be None for a plain model.
    Other arguments are those of HFLM. `work` counts what its requests cost. Raises UserError for a router that ranks
    the tokens of a whole sequence: a padded batch would change its choices, and it cannot generate from a cache.
    """

    def __init__(self, pretrained: Any, num_recurrences: int | None = None, **arguments: Any):
        super().__init__(**{"pretrained": pretrained, **arguments})
        self.num_recurrences = num_recurrences
        self.work = Work()
        router: dict[str, Any] = getattr(self.config, "router", None) or {}
        if router.get("inference") == "topk":
            raise UserError(
                "this router takes the best tokens of a whole sequence, and a task has prompts to continue; give it "
                "thresholds with loopwise calibrate"
            )
        self._routed: list[torch.Tensor] = []  # of each call since the last count: depths [B, T]
        if router:
            self.model.register_forward_hook(self._note_depths)

    @property
    def depth(self) -> int | None:
        """R of a call; None for a plain model."""
        return (self.num_recurrences or self.config.num_recurrences) if is_recurrent(self.config) else None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self.work.timed():
            return super().generate_until(requests, disable_tqdm or _quiet())

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self.work.timed():
            return super().loglikelihood(requests, disable_tqdm or _quiet())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self.work.timed():
            return super().loglikelihood_rolling(requests, disable_tqdm or _quiet())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        done = super()._loglikelihood_tokens(requests, disable_tqdm or _quiet(), override_bs)
        # HFLM runs equal inputs once: answers of one token share their prompt.
        inputs = {(*context, *answer[:-1]) for _, context, answer in requests}
        self.work.add(sum(min(len(ids), self.max_length) for ids in inputs), self._mean_depth())
        return done

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        if self.depth is None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, num_recurrences=self.depth).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """`context` [B, T], padded on the left, and its continuations. settings: attention_mask, and generate's own."""
        depth = {} if self.depth is None else {"num_recurrences": self.depth}
        ids = super()._model_generate(context, max_length, stop, **depth, **settings)
        ends = end_tokens(self.model.generation_config.eos_token_id)
        made = ids[:, context.shape[1] :]
        ended = torch.isin(made, torch.tensor(ends, device=made.device, dtype=made.dtype))
        after_end = ended.int().cumsum(1) - ended.int() > 0
        self.work.add(int(settings["attention_mask"].sum()) + int((~after_end).sum()), self._mean_depth())
        return ids

    def _note_depths(self, model: Any, arguments: Any, out: Any) -> None:
        routed = out.router_outputs
        real = routed.candidates[..., 0]
        self._routed.append(routed.selected.sum(-1)[real].float())

    def _mean_depth(self) -> float | None:
        """Mean recurrences of the tokens since the last call; None for a plain model."""
        if not self._routed:
            return self.depth
        depths, self._routed = torch.cat(self._routed), []
        return float(depths.mean())


def _quiet() -> bool:
    """True where nobody sees HFLM's bars. They are on whatever TQDM_DISABLE says."""
    return not sys.stderr.isatty()


register_model("loopwise")(LoopwiseLM)

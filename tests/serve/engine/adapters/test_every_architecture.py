"""Every source architecture in the offline engine: its greedy answers are those of transformers' generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.serve import Engine, Params
from tests.helpers.engines import build
from tests.helpers.tiny import ARCHITECTURES, VOCAB

DEPTHS = (2, 4)
LENGTHS = (10, 3, 7)  # of the prompts; with the answers they pass the windows of 8 positions
# Words of the refusal -> the architectures that the engine refuses.
REFUSED: dict[str, str] = {
    "its attention is fixed in its layers": """
        bamba biogpt bloom codegen falcon falcon_h1 gpt_neo gpt_neox_japanese gptj inkling_text jamba kimi_linear mpt
        nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next stablelm xglm""",
    "holds both in one size": "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite mimo_v2_flash minicpm3 youtu",
    "of full and sliding attention, and this model has": """
        axk2 deepseek_v32 granitemoehybrid lfm2 lfm2_moe llama4_text minimax_m3_vl_text""",
    "a mask of its own": "doge",
}
REASONS = {name: words for words, names in REFUSED.items() for name in names.split()}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_answers_as_generate_or_is_refused(model_type):
    """At two depths side by side, all requests at once, in fewer rows than requests."""
    model = build(model_type)
    if model_type in REASONS:
        with pytest.raises(UserError, match=REASONS[model_type]):
            Engine(model, max_num_seqs=2, max_model_len=24)
        return
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (1, length), generator=generator) for length in LENGTHS]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    wanted, asked, params = list[list[int]](), list[list[int]](), list[Params]()
    for depth in DEPTHS:
        for prompt in prompts:
            mask = torch.ones_like(prompt)
            whole = model.generate(prompt, attention_mask=mask, num_recurrences=depth, **options)
            wanted.append(whole[0, prompt.shape[1] :].tolist())
            asked.append(prompt[0].tolist())
            params.append(Params(6, depth, temperature=0, exit_rule="fixed", ignore_eos=True))
    replies = Engine(model, max_num_seqs=2, max_model_len=24).generate(asked, params)
    assert [list(reply.tokens) for reply in replies] == wanted

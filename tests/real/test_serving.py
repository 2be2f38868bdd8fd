"""SmolLM2 made recurrent and served: answers are those of transformers' `generate` in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main
from loopwise.demo.processes import Server

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm")]

QUESTIONS = ("What is the capital of France?", "Name three primary colours.", "Write a short poem about the sea.")
CONVERSIONS = {
    "retrofit": ("sizes=12,4,14", "num_recurrences=2"),
    "recursive": ("method=recursive", "loops=2", "lora.rank=64"),
    "mor": ("method=mor", "loops=2", "lora.rank=64", "router.kind=token"),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_served_chats_are_transformers_answers(kind, smollm2, tmp_path):
    """Greedy, 24 tokens a question, at every depth that the model is used at. Token by token: the text of a served
    answer leaves out an incomplete character at its end, which `decode` marks."""
    out = tmp_path / kind
    assert main(["convert", str(smollm2), str(out), *CONVERSIONS[kind], "dtype=float32", "--no-verify"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    server = Server(out, tmp_path / "log", "dtype=float32", "--", "--enforce-eager", "--max-model-len", "512")
    with server.running() as process:
        client = server.wait(process)
        for depth in (1, 2, 4) if kind == "retrofit" else (2,):
            for question in QUESTIONS:
                chat = [{"role": "user", "content": question}]
                asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
                made = model.generate(**asked, max_new_tokens=24, do_sample=False, num_recurrences=depth)
                wanted = made[0, asked["input_ids"].shape[1] :].tolist()
                reply = client.chat.completions.create(
                    model=server.name, messages=chat, max_tokens=24, temperature=0,
                    extra_body={"num_recurrences": depth, "return_token_ids": True},
                )  # fmt: skip
                assert (reply.choices[0].model_extra or {})["token_ids"] == wanted, (depth, question)
                assert reply.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True).rstrip(
                    "\ufffd"
                )
                assert wanted

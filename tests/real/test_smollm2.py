"""SmolLM2's GGUF file converts into what transformers' own reader makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.real

TEXT = "Hello  world!\n\n\t12345 + 678 = 13023, Größe, 漢字, 🎉 <|im_start|>user\nHi<|im_end|> def f(x):\n    return x"
EMBEDDINGS = 49152 * 576 * 4  # bytes of the largest tensor


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory) -> tuple[Path, int]:
    """The output of a conversion that keeps every layer, and the bytes of memory that it took beyond its imports."""
    out = tmp_path_factory.mktemp("converted") / "out"
    program = f"""if True:
        import resource, sys
        import loopwise.convert.pipeline
        from loopwise.cli import main
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = main(["convert", {str(smollm2)!r}, {str(out)!r}, "sizes=10,10,10", "--no-verify"])
        print("grown:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return out, 1024 * int(done.stdout.partition("grown: ")[2])


def test_one_recurrence_is_transformers_model(converted, smollm2_hf):
    """Logits in float32 and in bfloat16, bit for bit."""
    ids = AutoTokenizer.from_pretrained(smollm2_hf)(TEXT, return_tensors="pt").input_ids
    for dtype in (torch.float32, torch.bfloat16):
        made = AutoModelForCausalLM.from_pretrained(converted[0], dtype=dtype, trust_remote_code=True).eval()
        plain = AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=dtype).eval()
        with torch.no_grad():
            assert torch.equal(made(ids, num_recurrences=1).logits, plain(ids).logits)


def test_verification_finds_no_difference(smollm2, tmp_path, capsys):
    from loopwise.cli import main

    assert main(["convert", str(smollm2), str(tmp_path / "out"), "sizes=10,10,10"]) == 0
    assert "max |dlogit| 0 (float32))" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert list(facts["source"]["sha256"]) == [smollm2.name]


def test_memory_holds_a_few_of_the_largest_tensors(converted, smollm2):
    """Not the model, of nearly five times the embeddings; the mapped file counts as memory too."""
    assert converted[1] - os.path.getsize(smollm2) < 4 * EMBEDDINGS


def test_tokenizer_and_chat_template(converted, smollm2):
    found = AutoTokenizer.from_pretrained(converted[0])
    wanted = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert found(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    assert found.decode(found(TEXT)["input_ids"]) == TEXT
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = found.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert asked == wanted.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<|im_start|>assistant\n")


def test_it_answers(converted):
    """At one recurrence; it ends its turn by the file's end token."""
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    model: Any = AutoModelForCausalLM.from_pretrained(converted[0], trust_remote_code=True).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=20, do_sample=False, num_recurrences=1)
    assert tokenizer.decode(out[0, asked["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"

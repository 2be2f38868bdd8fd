"""The offline engine where vLLM is not installed."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.helpers.blocked import without
from tests.helpers.serve_tiny import GROUPED, RETROFIT, generate, prompts, save, source_config

PROGRAM = """
import json

from loopwise.serve import Engine, Params

folder, prompts = json.loads(sys.argv[1])
params = Params(max_tokens=8, num_recurrences=3, ignore_eos=True)
done = Engine(folder, max_num_seqs=4, max_model_len=128, dtype="float32").generate(prompts, params)
print(json.dumps([each.tokens for each in done]))
try:
    import vllm
except ModuleNotFoundError:
    print("blocked")
"""


def test_the_offline_engine_needs_no_vllm(tmp_path):
    """In a process that cannot import it, greedy text is transformers'."""
    folder = tmp_path / "tiny"
    model = save(folder, source_config("llama", **GROUPED), **RETROFIT, num_recurrences=2)
    some = prompts(4)
    arguments = json.dumps([str(folder), some])
    done = subprocess.run(
        [sys.executable, "-c", without("vllm", PROGRAM), arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    tokens, blocked = done.stdout.strip().splitlines()[-2:]
    assert blocked == "blocked"
    assert json.loads(tokens) == [generate(model, prompt, 3, 8).tokens for prompt in some]

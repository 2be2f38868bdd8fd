"""Outputs are loaded as a stranger would: in a process that cannot import loopwise, with `trust_remote_code=True`.

One process loads the output of every format, method and verb that writes a model, so that nothing works only because
loopwise has registered its classes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main
from tests.helpers.blocked import without
from tests.helpers.tiny import ARCHITECTURES, save_source

GOLDEN = Path(__file__).parent / "convert" / "golden"
ROUTED = {"mor-expert": "router.capacity=1,0.6667,0.3333", "mor-expert-shared-kv": "router.capacity=0.9,0.5"}
CODE_OF_THEIR_OWN = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3"}
METHODS: dict[str, tuple[str, list[str]]] = {  # name -> architecture, settings
    "retrofit": ("phi3", ["sizes=1,2,1"]),
    "plain": ("llama", ["layers.core=1,2", "injection=none"]),
    "sequence": ("llama", ["method=recursive", "loops=2", "sharing=sequence"]),
    "lora": ("gpt2", ["method=recursive", "loops=2", "lora.rank=4"]),
    "dora": ("qwen2", ["method=recursive", "loops=2", "lora.rank=4", "lora.dora=true"]),
    "universal": ("llama", ["method=universal", "halting=act", "num_recurrences=3"]),
    "expert": ("llama", ["method=mor", "loops=2", "router.kind=expert"]),
    "token": ("mixtral", ["method=mor", "loops=2", "router.kind=token"]),
    "noise": ("gemma2", ["sizes=1,2,1", "state_init=normal", "recurrence_norm=true"]),
}

STRANGER = """
import copy, json, pathlib, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
for name, asked in json.loads((root / "asked.json").read_text()).items():
    try:
        model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True).eval()
        ids = torch.tensor(asked["ids"])
        with torch.no_grad():
            made = {"logits": model(ids, use_cache=False).logits}
            made["tokens"] = model.generate(ids, **asked["generate"])
        torch.save(made, root / f"{name}.stranger.pt")
        said = None
        if asked["text"]:
            tokenizer = AutoTokenizer.from_pretrained(root / name, trust_remote_code=True)
            said = [tokenizer(asked["text"]).input_ids, tokenizer.eos_token]
        model.save_pretrained(root / f"{name}.again")  # a stranger's copy loads as well
        again = AutoModelForCausalLM.from_pretrained(root / f"{name}.again", trust_remote_code=True).eval()
        pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs), "other tensors, saved and loaded"
        # Products round by where in memory tensors lie. Those of a file lie where its header ends; copies lie alike.
        with torch.no_grad():
            before, after = (copy.deepcopy(one)(ids, use_cache=False).logits for one in (model, again))
        assert torch.equal(before, after), "another model, saved and loaded"
        (root / f"{name}.said.json").write_text(json.dumps(said))
    except Exception as error:
        (root / f"{name}.said.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))
print("loopwise" in sys.modules)
"""


def ask(root: Path, names: list[str]) -> dict[str, Any]:
    """Load `names` in a process without loopwise, and here; what the stranger got of each, or its error."""
    torch.manual_seed(0)
    asked, wanted = {}, {}
    for name in names:
        model: Any = AutoModelForCausalLM.from_pretrained(root / name).eval()
        ids = torch.randint(3, min(60, model.config.vocab_size), (2, 8))
        cached = (getattr(model.config, "router", None) or {}).get("inference") != "topk"
        generate = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        asked[name] = {
            "ids": ids.tolist(),
            "generate": {**generate, "use_cache": cached},
            "text": "the cat 12 😀" if (root / name / "tokenizer.json").exists() else "",
        }
        with torch.no_grad():
            tokens = model.generate(ids, **asked[name]["generate"])
            wanted[name] = {"logits": model(ids, use_cache=False).logits, "tokens": tokens}
        if text := asked[name]["text"]:
            tokenizer = AutoTokenizer.from_pretrained(root / name)
            wanted[name]["said"] = [tokenizer(text).input_ids, tokenizer.eos_token]
    (root / "asked.json").write_text(json.dumps(asked))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", without("loopwise", STRANGER), str(root)],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("False")
    return wanted


def compare(root: Path, wanted: dict[str, Any]) -> None:
    for name, want in wanted.items():
        said = json.loads((root / f"{name}.said.json").read_text())
        assert said == want.get("said"), (name, said)
        got = torch.load(root / f"{name}.stranger.pt")
        assert torch.equal(got["logits"], want["logits"]), name
        assert torch.equal(got["tokens"], want["tokens"]), name


def source(directory: Path, model_type: str) -> Path:
    """A tiny source whose config.json says what a stranger may trip over."""
    save_source(directory, model_type)
    file = directory / "config.json"
    leaks = {"auto_map": CODE_OF_THEIR_OWN, "tokenizer_class": "OtherTokenizer", "output_hidden_states": True}
    leaks |= {"output_router_logits": True} if model_type == "mixtral" else {}
    file.write_text(json.dumps({**json.loads(file.read_text()), **leaks}))
    (directory / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}')
    return directory


def test_every_format_method_and_verb(tmp_path):
    for kind in {architecture for architecture, _ in METHODS.values()}:
        source(tmp_path / f"source-{kind}", kind)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. def f(x): return x + 1\n" * 60)
    for name, (architecture, settings) in METHODS.items():
        argv = ["convert", str(tmp_path / f"source-{architecture}"), str(tmp_path / name), *settings, "--no-verify"]
        assert main(argv) == 0, name
    formats = [path.name for path in GOLDEN.iterdir() if path.is_dir()]
    for name in formats:
        settings = [ROUTED[name]] if name in ROUTED else []
        assert main(["convert", str(GOLDEN / name), str(tmp_path / name), *settings, "--no-verify"]) == 0, name
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "export"), "--unroll", "3"]) == 0
    shutil.copytree(tmp_path / "expert", tmp_path / "calibrated")
    assert main(["calibrate", str(tmp_path / "calibrated"), str(text)]) == 0
    run = [f"data.train={text}", "data.sequence_length=16", "batch_size=2", "steps=1", "save_every=1"]
    for name, of, more in (("trained", "retrofit", []), ("adapted", "lora", ["adapters.rank=2"])):
        assert main(["train", str(tmp_path / of), str(tmp_path / name), *run, *more]) == 0, name
        shutil.copytree(tmp_path / name / "checkpoint-1", tmp_path / f"{name}-checkpoint")
    verbs = ["export", "calibrated", "trained", "trained-checkpoint", "adapted"]
    names = [*METHODS, *formats, *verbs]
    assert all((tmp_path / name / "loopwise.json").is_file() for name in [*METHODS, *formats, "export", "trained"])
    compare(tmp_path, ask(tmp_path, names))
    for name in names:
        config = json.loads((tmp_path / name / "config.json").read_text())
        own = {"AutoConfig": "configuration_recurrent_depth.RecurrentDepthConfig"}
        own |= {"AutoModelForCausalLM": "modeling_recurrent_depth.RecurrentDepthForCausalLM"}
        assert config.get("auto_map") == (None if name == "export" else own), name
        assert "auto_map" not in config.get("source_config", {}), name


@pytest.mark.slow
def test_every_architecture(tmp_path):
    for kind in ARCHITECTURES:
        source(tmp_path / f"source-{kind}", kind)
        assert main(["convert", str(tmp_path / f"source-{kind}"), str(tmp_path / kind), "sizes=1,3,2"]) == 0, kind
    compare(tmp_path, ask(tmp_path, list(ARCHITECTURES)))

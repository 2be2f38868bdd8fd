"""Documents in a block do not see each other, or data.separate_documents is refused (CASES.md 15)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.train import separation
from tests.helpers.tiny import named, save_source, source_config, tokenizer, with_state
from tests.helpers.train_tiny import run

# Their masks do not look at positions.
BLIND = {"afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "llama4_text", "mpt", "opt", "xglm"}


def recurrent(arch: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    keys = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 2, "injection": "linear", **fields}
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config(arch), **keys))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def leak(model: Any) -> float:
    """The greatest change of a logit of the second document by the first one."""
    ids, places = torch.arange(3, 15)[None], torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        both = model.eval()(input_ids=ids, position_ids=places, use_cache=False).logits[:, 5:]
        return float((both - model(input_ids=ids[:, 5:], use_cache=False).logits).abs().max())


@pytest.mark.parametrize("arch", named())
def test_every_architecture_separates_or_is_refused(arch):
    model = recurrent(arch)
    if arch in BLIND or arch in with_state():
        why = f"layers of {arch} keep a state" if arch in with_state() else f"masks of {arch} ignore positions"
        with pytest.raises(UserError, match=rf"separate_documents: in model \({why}\) a docu"):
            separation.check(model, "model")
    else:
        separation.check(model, "model")
        assert leak(model) < 1e-4


ROUTED = {"injection": "none", "num_recurrences": 2}
VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "kv_policy=first": ({"kv_policy": "first"}, "kv_policy=first reads keys and values through a cache"),
    "kv_policy=single": ({"kv_policy": "single"}, None),
    "kv_policy=modulo-2": ({"kv_policy": "modulo-2"}, None),
    "kv_policy=last-exited": ({"kv_policy": "last-exited"}, None),
    "state_init=normal": ({"state_init": "normal"}, None),
    "sharing=sequence": ({"sharing": "sequence", "injection": "none"}, None),
    "expert": ({**ROUTED, "router": {"kind": "expert", "depths": 2}}, None),
    "token": ({**ROUTED, "router": {"kind": "token", "depths": 2}}, None),
    "expert, first-recursion": (
        {**ROUTED, "router": {"kind": "expert", "depths": 2, "kv": "first-recursion"}},
        "router.kv=first-recursion reads",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cache_policy_and_router(variant):
    fields, refused = VARIANTS[variant]
    model = recurrent("llama", **fields)
    if refused is None:
        separation.check(model, "model")
    else:
        with pytest.raises(UserError, match=refused):
            separation.check(model, "model")
    assert model.training  # as it was


def test_train_refuses_before_the_first_step(plain, tmp_path, capsys):
    source = save_source(tmp_path / "opt", "opt")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n" * 2)
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": "the cat sat on the mat"}) + "\n") * 60)
    keys = [f"data.train={tmp_path / 'text.jsonl'}", "data.sequence_length=16", "batch_size=2", "steps=1"]
    separate = [*keys, "data.separate_documents=true"]
    assert main(["train", str(source), str(tmp_path / "out"), *separate]) == 2
    error = capsys.readouterr().err
    assert "(masks of opt ignore positions) a document would see the one before it in the same block" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    run(["train", str(source), str(tmp_path / "out"), *keys])
    # A teacher reads the same blocks.
    model = recurrent("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for more in ([], ["objectives.distillation.top_k=2"]):
        taught = [*separate, f"objectives.distillation.teacher={source}", *more]
        assert main(["train", str(tmp_path / "model"), str(tmp_path / "taught"), *taught]) == 2
        assert f"separate_documents: in objectives.distillation.teacher={source} (masks of" in capsys.readouterr().err
        assert not (tmp_path / "taught").exists()

"""transformers' habits on the recurrent-depth class: what works on its own models works on ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import is_bitsandbytes_available

from loopwise.cli import main
from loopwise.serve import Engine, Params
from tests.helpers.convert import run, source
from tests.helpers.model import build, build_relaxed
from tests.helpers.tiny import VOCAB, save_source

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BNB = "bitsandbytes==0.50.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("habits")
    run(save_source(at / "source"), at / "out", sizes=[1, 3, 2], num_recurrences=3)
    return at / "out"


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_pipelines_of_text_and_of_chats_take_num_recurrences(folder, model):
    made: Any = pipeline("text-generation", model=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for depth in (1, 2):
        ids = tokenizer("hello there", return_tensors="pt").input_ids
        want = tokenizer.decode(model.generate(ids, num_recurrences=depth, **GREEDY)[0], skip_special_tokens=True)
        got = made("hello there", num_recurrences=depth, **GREEDY)
        assert got[0]["generated_text"] == want
    reply = made([{"role": "user", "content": "hi"}], **GREEDY)[0]["generated_text"][-1]
    assert reply["role"] == "assistant"


def test_device_map_places_parts_and_offloads_to_disk(folder, model, tmp_path):
    half = sum(parameter.nbytes for parameter in model.parameters()) // 2
    made: Any = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": half}, offload_folder=str(tmp_path)
    )
    assert {"cpu", "disk"} <= set(made.hf_device_map.values())
    assert torch.equal(made.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert torch.equal(whole.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


@pytest.mark.parametrize("name", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_reach_every_layer(folder, model, name):
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name).eval()
    changed: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed.set_attn_implementation(name)
    with torch.no_grad():
        want = model(IDS).logits
        for made in (loaded, changed):
            assert {layer.self_attn.config._attn_implementation for layer in made.core} == {name}
            assert (made(IDS).logits - want).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("given", ["eager", "batched_mm", "grouped_mm", {"source_config": "eager"}])
def test_implementations_of_experts_reach_every_layer(given, tmp_path):
    model = build("qwen3_moe", prelude=[0, 1], core=[1, 2])  # layer 1 stands twice
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=given).eval()
    changed: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm").eval()
    changed.set_experts_implementation(given)
    name = "eager" if isinstance(given, dict) else given
    for made in (loaded, changed):
        parts = [module for part in (made.prelude, made.core, made.coda) for module in part.modules()]
        names = [module.config._experts_implementation for module in parts if hasattr(module, "gate_up_proj")]
        assert names == [name] * 5
        torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["source_config", ""])
def test_an_attention_of_the_source_is_that_of_the_model(folder, part):
    made: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation={part: "eager"})
    assert {layer.self_attn.config._attn_implementation for layer in made.core} == {"eager"}
    assert made.config._attn_implementation == "eager"


def test_an_unknown_attention_is_an_error(folder):
    with pytest.raises(ValueError, match="magic"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="magic")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_new_tokens_are_trained_saved_and_served(architecture, tmp_path):
    """Their embeddings come last; gpt2 ties them to the head."""
    made = run(save_source(tmp_path / "source", architecture), tmp_path / "out", sizes=[1, 3, 2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    made.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    tokenizer.add_tokens([f"<new{n}>" for n in range(VOCAB + 1 - len(tokenizer))])
    for part in (made, tokenizer):
        part.save_pretrained(tmp_path / "larger")
    (tmp_path / "text.jsonl").write_text('{"text": "<new0> a b c <new0> d"}\n' * 8)
    data = [f"data.train={tmp_path / 'text.jsonl'}", "data.sequence_length=8", "batch_size=2", "steps=2"]
    assert main(["train", str(tmp_path / "larger"), str(tmp_path / "trained"), *data, "recurrence.mean=2"]) == 0
    trained: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    assert trained.config.vocab_size == trained.get_input_embeddings().weight.shape[0] == VOCAB + 8
    prompt = [3, VOCAB, VOCAB + 7, 5]
    want = trained.generate(torch.tensor([prompt]), num_recurrences=2, **GREEDY)[0, 4:].tolist()
    params = Params(num_recurrences=2, max_tokens=6, temperature=0.0)
    (got,) = Engine(tmp_path / "trained", max_num_seqs=1, max_model_len=32).generate([prompt], params)
    assert list(got.tokens)[: len(want)] == want


def test_value_embeddings_of_a_parcae_import_get_the_new_tokens_too(tmp_path):
    made = run(source("parcae", tmp_path / "source"), tmp_path / "out")
    first = made.config.vocab_size
    before = made(IDS % first).logits
    made.resize_token_embeddings(first + 8)
    assert torch.equal(made(IDS % first).logits[..., :first], before)
    made.save_pretrained(tmp_path / "larger")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "larger").eval()
    new = (IDS % first).index_fill(1, torch.tensor([4, 8]), first + 7)
    assert torch.equal(again(new).logits, made(new).logits)


def test_trainer_lowers_the_loss_with_gradient_checkpointing(folder, tmp_path):
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    before = model(IDS, labels=IDS).loss.item()
    data: Any = [{"input_ids": ids, "labels": ids} for ids in IDS] * 8
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert model.eval()(IDS, labels=IDS).loss.item() < before - 1


def test_a_second_pass_through_shared_factors_is_refused():
    """With use_reentrant=True each layer's recomputation would go through the time's factors again."""
    model = build(time_conditioning={"scale": ["input_layernorm"], "frequencies": 8}).train()
    with pytest.raises(ValueError, match="use_reentrant=True goes through the factors of time_conditioning"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()


def test_peft_by_hand_on_a_relaxed_model():
    """As docs/reference/training.md has it: modules of the relaxation have the names of layers', and are no targets."""
    from peft import LoraConfig, get_peft_model

    plain = build_relaxed()
    config = LoraConfig(target_modules=["q_proj", "down_proj"], exclude_modules=r"relaxation\..*", r=2)
    model = get_peft_model(plain, config)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 * 2 * 2  # layers, modules, matrices
    for name in names:
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    with torch.no_grad():
        want = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want, rtol=0, atol=1e-4)


def test_bitsandbytes_asks_for_its_package(folder):
    if is_bitsandbytes_available():
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        assert type(made.core[0].mlp.up_proj).__name__ == "Linear4bit"
    else:
        with pytest.raises(ImportError, match="bitsandbytes"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_every_layer(folder, tmp_path, bits):
    """With the package, in a process of its own: all linear layers are quantised, and the logits stay near."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), BNB]
    subprocess.run(install, check=True)
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path / "site")!r})
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        import loopwise.model
        plain = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.bfloat16).eval()
        made = AutoModelForCausalLM.from_pretrained(
            {str(folder)!r}, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_{bits}bit=True)
        ).eval()
        kinds = {{type(m).__name__ for part in (made.prelude, made.core, made.coda) for m in part.modules()
                 if hasattr(m, "in_features")}}
        ids = torch.arange(3, 40).unsqueeze(0)
        with torch.no_grad():
            want, got = plain(ids, num_recurrences=2).logits, made(ids, num_recurrences=2).logits
        print(kinds, torch.cosine_similarity(want.flatten().float(), got.flatten().float(), 0).item())
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    kinds, near = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert kinds == ("{'Linear4bit'}" if bits == 4 else "{'Linear8bitLt'}")
    assert float(near) > 0.9

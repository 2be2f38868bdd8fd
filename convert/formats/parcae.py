"""Parcae (arXiv 2604.12946): a decayed injection of the normed input, value embeddings, a map of the last state."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import UserError
from ...model.configuration_ungated import UngatedConfig
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format, check_options
from .layers import attend, named_layers, rotary, rotary_table

PARTS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}  # our names -> theirs in tensor names
SIZES = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
COPIED = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.fc",
}
# Fields with the one value that the released models have, and that the code below knows.
FIXED = {
    "injection_type": "diagonal", "block_class_name": "TransformerPreNormBlock", "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2", "bias": False, "qk_bias": False, "clip_qkv": None,
    "logit_softcap": None, "use_abacus": False, "mup_model_scaling_factor": 1,
}  # fmt: skip
STRATEGIES = ("scaled", "scaled-zero", "scaled-geiping", "scaled-stuck")  # those without scales of embeddings or logits
STATES = {"like-init": "normal", "zero": "zeros"}
GATED = 32  # channels that the gate of a value embedding reads
EPS = torch.finfo(torch.float32).eps  # of the norm of queries and keys


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a Parcae checkpoint. Raises UserError for options that the released ones do not have."""
    _check(fields)
    width, heads = fields["n_embd"], fields["num_attention_heads"]
    counts = [fields[size] for size in SIZES]
    values, order = _value_embeddings(fields, raw.names()), _order(heads, width // heads)
    base = float((fields.get("rope_settings") or {}).get("rope_base", 50_000))
    source = UngatedConfig(
        vocab_size=fields["padded_vocab_size"],
        hidden_size=width,
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=sum(counts),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        hidden_act="relu2",
        max_position_embeddings=fields["block_size"],
        rms_norm_eps=fields["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=bool(fields["tie_embeddings"]),
        qk_norm=bool(fields.get("qk_norm")),
        value_embeddings=values,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    ends = torch.tensor(counts).cumsum(0).tolist()
    mean = fields["mean_recurrence"]
    sampled = "poisson" in fields.get("sampling_scheme", "")
    result = CheckpointMap(
        {
            "source_config": source,
            **{part: list(range(end - n, end)) for part, end, n in zip(PARTS, ends, counts, strict=True)},
            "num_recurrences": mean,
            # A depth was drawn for each sequence; 99.9 % of a Poisson distribution are below this.
            "trained_recurrences": {"mean": mean, "min": 1, "max": round(mean + 3.1 * sqrt(mean)) if sampled else mean},
            "injection": "diagonal",
            "prelude_norm": bool(fields.get("prelude_norm")),
            "state_projection": True,
            "state_init": STATES[fields["state_init"]],
            "state_std": sqrt(2 / (5 * width)),
        }
    )
    layers = [(part, n) for part, count in zip(PARTS, counts, strict=True) for n in range(count)]
    for number, (part, n) in enumerate(layers):
        _map_layer(result, f"{part}.{n}.", f"transformer.{PARTS[part]}.{n}.", order)
        if values[number]:
            ours = f"{part}.{n}.self_attn.value_embedding."
            result.copy(f"{ours}embedding.weight", f"value_embeds.{number}.weight")
            result.copy(f"{ours}gate.weight", f"transformer.{PARTS[part]}.{n}.attn.ve_gate.weight")
    result.copy("source.model.embed_tokens.weight", "transformer.wte.weight")
    result.copy("source.model.norm.weight", "transformer.ln_f.weight")
    result.copy("ends.projection", "transformer.C.weight")
    if result.fields["prelude_norm"]:
        result.copy("ends.norm", "transformer.ln_prelude.weight")
    for name, raw_name in (("weight", "B"), ("log_rate", "A_log"), ("step", "dt_bias")):
        result.copy(f"injection.{name}", f"transformer.adapter.{raw_name}")
    result.copy_head(tied=source.tie_word_embeddings)
    result.leave_out("freqs_cis", rotary_table(base, width // heads, fields["block_size"]))
    return result


def _check(fields: dict[str, Any]) -> None:
    """Raise UserError, naming it, for a field with a value that is not supported."""
    width, heads, rope = fields["n_embd"], fields["num_attention_heads"], fields.get("rope_settings") or {}
    same = {
        "recurrent_embedding_dimension": width,
        "recurrent_intermediation_embedding_dimension": fields["intermediate_size"],
        "recurrent_num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    check_options("Parcae", fields, {**FIXED, **same})
    for name, allowed in (("init_strategy", STRATEGIES), ("state_init", tuple(STATES))):
        if fields[name] not in allowed:
            raise UserError(f"{name}={fields[name]!r} of this Parcae checkpoint: {', '.join(allowed)} are supported")
    if not rope.get("use_rope", True) or rope.get("rope_condense_ratio", 1) != 1:
        raise UserError(f"a Parcae checkpoint with rope_settings={rope} is not supported; rope_base alone may differ")


def _value_embeddings(fields: dict[str, Any], names: set[str]) -> list[bool]:
    """For each layer: it has value embeddings and their gate. Raises UserError for a layer with one of the two.

    The authors' code uses neither without the other. It places both by rules of their own, which agree for the released
    sizes: an odd number of layers or recurrences leaves one that was never trained.
    """
    layers = [(PARTS[part], n) for part, size in zip(PARTS, SIZES, strict=True) for n in range(fields[size])]
    found: list[bool] = []
    for number, (part, n) in enumerate(layers):
        pair = [f"value_embeds.{number}.weight", f"transformer.{part}.{n}.attn.ve_gate.weight"]
        present = [name for name in pair if name in names]
        if len(present) == 1:
            (lacking,) = {*pair} - {*present}
            raise UserError(
                f"{present[0]} of this Parcae checkpoint stands without {lacking}; a layer has both, or neither"
            )
        found.append(bool(present))
    return found


def _order(heads: int, head_dim: int) -> torch.Tensor:
    """The rows of queries and keys: pairs that rotate are neighbors on disk, and half a head apart in the model."""
    one = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
    return torch.cat([one + head * head_dim for head in range(heads)])


def _map_layer(result: CheckpointMap, ours: str, theirs: str, order: torch.Tensor) -> None:
    """Add the tensors of one layer, `ours` and `theirs` being the beginnings of its names."""
    for name, raw in COPIED.items():
        result.copy(f"{ours}{name}.weight", f"{theirs}{raw}.weight")
    for name in "qk":
        result.rows(f"{ours}self_attn.{name}_proj.weight", f"{theirs}attn.c_{name}.weight", [len(order)], 0, order)
    # The authors' activation is half a squared ReLU.
    result.tensors[f"{ours}mlp.down_proj.weight"] = ([f"{theirs}mlp.proj.weight"], _half)


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / 2


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas, from `state` [B, T, D]."""
    assert state is not None
    config, read, fields = checkpoint.config, checkpoint.read, checkpoint.fields
    source = config.source_config
    assert isinstance(source, UngatedConfig)
    heads, eps = source.num_attention_heads, source.rms_norm_eps
    rotation, (norm, linear) = rotary(source, ids.shape[1]), named_layers(read, eps)
    offsets = dict(zip(PARTS.values(), (0, len(config.prelude), len(config.prelude + config.core)), strict=True))

    def run(x: torch.Tensor, part: str, count: int) -> torch.Tensor:
        for n in range(count):
            at, values = f"transformer.{part}.{n}.", f"value_embeds.{offsets[part] + n}"
            h = norm(x, f"{at}norm_1")
            q, k, v = (linear(h, f"{at}attn.c_{name}") for name in "qkv")
            if {f"{values}.weight", f"{at}attn.ve_gate.weight"} <= checkpoint.names:
                gate = 2 * torch.sigmoid(linear(h[..., :GATED], f"{at}attn.ve_gate"))
                added = read(f"{values}.weight")[ids].unflatten(-1, (heads, -1))
                v = v + (gate[..., None] * added).flatten(-2)
            if fields.get("qk_norm"):  # before the rotation, which keeps lengths
                q, k = (F.rms_norm(t.unflatten(-1, (heads, -1)), (t.shape[-1] // heads,), eps=EPS) for t in (q, k))
                q, k = q.flatten(-2), k.flatten(-2)
            x = x + linear(attend(q, k, v, h.shape[-1] // heads, rotation, neighbors=True), f"{at}attn.c_proj")
            x = x + linear(F.relu(linear(norm(x, f"{at}norm_2"), f"{at}mlp.fc")) ** 2 / 2, f"{at}mlp.proj")
        return x

    e = run(read("transformer.wte.weight")[ids], "prelude", len(config.prelude))
    if fields.get("prelude_norm"):
        e = norm(e, "transformer.ln_prelude")
    dt = F.softplus(read("transformer.adapter.dt_bias"))
    kept, x = torch.exp(-dt * read("transformer.adapter.A_log").exp()), state
    for _ in range(depth):
        x = run(x * kept + dt * F.linear(e, read("transformer.adapter.B")), "core_block", len(config.core))
    x = norm(run(linear(x, "transformer.C"), "coda", len(config.coda)), "transformer.ln_f")
    return linear(x, "transformer.wte" if source.tie_word_embeddings else "lm_head")


FORMAT = Format(
    "Parcae", "parcae", has=("transformer.adapter.A_log", "transformer.C.weight"), mapping=mapping, reference=reference
)

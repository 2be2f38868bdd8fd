"""Block influence of the source's layers (ShortGPT, arXiv 2403.03853, section 3.1), to choose the layers that recur."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import UserError
from ..input_files import check_regular
from ..model.source_layers import layer_list_name
from .plan import PARTS
from .source import SourceWeights
from .source_config import empty_model
from .stream import streamed
from .tokenizer import load_tokenizer

TOKENS, BLOCK = 8192, 512


def block_influence(source: Path, weights: SourceWeights, text: str, dtype: torch.dtype) -> list[float]:
    """1 - mean cosine of a layer's input and output, for every layer, over the first TOKENS tokens of file `text`.

    One module's weights are in memory at a time. Raises UserError for a file that is no text or shorter than a block.
    """
    config = weights.config
    ids = text_tokens(source, config, text, "influence=")
    model = streamed(lambda: empty_model(config), weights.read, dtype)
    found: list[float] = []

    def compare(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        after = out[0] if isinstance(out, tuple) else out
        similarity = torch.cosine_similarity(args[0].float(), after.float(), dim=-1)
        found.append(1 - similarity.mean().item())

    for layer in model.get_submodule(layer_list_name(model, config.num_hidden_layers)).children():
        layer.register_forward_hook(compare)
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return found


def text_tokens(source: Path, config: PreTrainedConfig, text: str, label: str) -> torch.Tensor:
    """The first TOKENS token ids of file `text`, in blocks [N, BLOCK], by the tokenizer of `source`.

    Raises UserError, in which `label` precedes the name of the file, where it is no text or shorter than a block.
    """
    block = min(BLOCK, getattr(config, "max_position_embeddings", None) or BLOCK)
    check_regular(Path(text).expanduser(), f"{label}{text}")
    try:
        content = Path(text).expanduser().read_text(encoding="utf-8-sig")[: 16 * TOKENS]
    except UnicodeDecodeError as error:
        raise UserError(f"{label}{text}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{label}{text}: {error.strerror}") from None
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(f"{source}: no tokenizer to read {label}{text} with")
    ids = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"][:TOKENS])
    if len(ids) < block:
        raise UserError(f"{label}{text}: {len(ids)} tokens; at least one block of {block} is needed")
    if int(ids.max()) >= config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer gives id {int(ids.max())}; the embeddings end at {config.vocab_size - 1}"
        )
    return ids[: len(ids) // block * block].view(-1, block)


def table(influence: list[float], plan: dict[str, Any]) -> str:
    """A table of each layer's influence and the part that it became, from the facts `plan` of a conversion."""
    roles = _roles(plan)
    longest = max(influence)
    lines = ["layer  influence"]
    for layer, value in enumerate(influence):
        bar = "█" * round(30 * max(value, 0) / longest) if longest > 0 else ""
        lines.append(f"{layer:>5}  {value:>9.4f}  {roles.get(layer, 'dropped'):<8} {bar}")
    return "\n".join(lines)


def plot(influence: list[float], plan: dict[str, Any], file: Path) -> None:
    """Write the same as a bar chart to `file`."""
    from matplotlib.figure import Figure

    roles = _roles(plan)
    figure = Figure(figsize=(max(5, len(influence) * 0.3), 3), layout="constrained")
    axes = figure.subplots()
    for part, color in {"prelude": "C0", "core": "C3", "coda": "C2", "dropped": "0.75"}.items():
        layers = [layer for layer in range(len(influence)) if roles.get(layer, "dropped") == part]
        axes.bar(layers, [influence[layer] for layer in layers], color=color, label=part)
    axes.set_xlabel("source layer")
    axes.set_ylabel("block influence")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _roles(plan: dict[str, Any]) -> dict[int, str]:
    """The part that each source layer became; dropped ones are left out."""
    return {layer: part for part in PARTS for group in plan["parents"][part] for layer in group}

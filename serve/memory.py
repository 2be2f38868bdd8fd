"""Keys and values in bytes, compared with the memory that is free, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .engine.kv import KVPolicy

GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")
CGROUPS = (  # limit and use of a container: version 2, then version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def slot_bytes(shapes: list[tuple[int, int]], outer: int, slots: int, size: int) -> int:
    """Bytes of the keys and values of one position.

    shapes: (heads, head size) of every layer.   outer: layers with one slot, which come first; the others have `slots`.
    size: bytes a number.
    """
    return sum(2 * heads * width * size * (slots if n >= outer else 1) for n, (heads, width) in enumerate(shapes))


def source_shape(source: Any) -> tuple[int, int]:
    """(key-value heads, head size) of a source config's layers."""
    heads: int = source.num_attention_heads
    kv: int = getattr(source, "num_key_value_heads", None) or heads
    if getattr(source, "multi_query", False):
        kv = heads if getattr(source, "new_decoder_architecture", False) else 1
    return kv, getattr(source, "head_dim", None) or source.hidden_size // heads


def shown(count: float) -> str:
    """`count` bytes, as "1.5 GiB"."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def available(device: Any = None) -> int | None:
    """Free bytes on `device` (a torch.device; None: the host); None where the system does not report them."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return None
    words = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines() if ":" in line)
    free = int(words["MemAvailable"].split()[0]) << 10 if "MemAvailable" in words else None
    for limit, used in CGROUPS:
        if limit.exists() and used.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
            left = int(most) - int(used.read_text(encoding="ascii"))
            return left if free is None else min(free, left)
    return free


def check_room(each: int, policy: KVPolicy, max_num_seqs: int, max_model_len: int, device: Any) -> None:
    """Raises UserError, naming settings to lower, where `max_num_seqs` requests of `max_model_len` positions of `each`
    bytes do not fit into the free memory of `device`."""
    need, free = each * max_num_seqs * (max_model_len + 1), available(device)
    if free is None or need <= free:
        return
    fits = max(free * 9 // 10 // each, 0)  # positions
    seqs, longest = fits // (max_model_len + 1), fits // max_num_seqs - 1
    advice = [f"max_model_len={longest}"] if longest > 0 else []
    advice += [f"max_num_seqs={seqs}"] if max_num_seqs > 1 and seqs else []
    advice += ["a smaller max_recurrences"] if policy.slots > 1 else []
    raise UserError(
        f"max_num_seqs={max_num_seqs} of max_model_len={max_model_len} at max_recurrences={policy.depths} "
        f"(kv_policy={policy.name}) need {shown(need)} of keys and values, and {shown(free)} are free; "
        f"choose {', or '.join(advice) or 'less'}"
    )


def serving_bytes(config: Any, policy: KVPolicy | None, size: int, ranks: int = 1) -> int:
    """Bytes of the keys and values of one position of a served model, on each of `ranks`.

    config: a RecurrentDepthConfig.   policy: the lane engine's; None: the fixed engine, with a cache for each of
    `num_recurrences`.   size: bytes a number.
    """
    heads, width = source_shape(config.source_config)
    outer = len(config.prelude) + len(config.coda)
    slots = policy.slots if policy else config.num_recurrences
    return slot_bytes([(max(heads // ranks, 1), width)] * (outer + len(config.core)), outer, slots, size)


def check_cache(each: int, length: int, budget: int, depth: str, advice: list[str]) -> None:
    """Raises UserError where a request of `length` positions of `each` bytes is larger than a cache of `budget` bytes.

    depth: the setting that `each` follows from.   advice: settings that make the request smaller or the cache larger.
    """
    if each * length <= budget:
        return
    fits = budget // each // BLOCK * BLOCK - BLOCK
    first = [f"'-- --max-model-len {fits}'"] if fits > 0 else []
    raise UserError(
        f"--max-model-len {length}: a request of that length needs {shown(each * length)} of keys and values at "
        f"{depth}, and the cache has {shown(budget)}; choose {', or '.join([*first, *advice])}"
    )


BLOCK = 128  # positions of vLLM's largest block on any device; one block of a cache belongs to no request

"""YAML whose aliases multiply: in 300 characters, ten lists of nine aliases each stand for 10 GB of text."""

from __future__ import annotations

from typing import Any

import yaml

MOST = 2**20  # characters that aliases may add to a text


class Loader(yaml.SafeLoader):
    """SafeLoader without aliases that add more than MOST characters, or that stand inside of their own value."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        check_aliases(node)
        return node


def check_aliases(node: yaml.Node | None) -> None:
    """Raises yaml.constructor.ConstructorError for aliases below `node`, the root of a text, as `Loader` does."""
    if node is not None and _size(node, {}) - sum(map(_own, nodes(node))) > MOST:
        raise yaml.constructor.ConstructorError(problem=f"its aliases add more than {MOST:,} characters")


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Characters of the scalars below `node`, and 1 for each node, where every alias is written out."""
    if (known := sizes.get(id(node))) is not None:
        if known < 0:
            raise yaml.constructor.ConstructorError(problem="an alias stands inside of its own value")
        return known
    sizes[id(node)] = -1
    sizes[id(node)] = size = _own(node) + sum(_size(part, sizes) for part in parts(node))
    return size


def _own(node: yaml.Node) -> int:
    return 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)


def nodes(root: yaml.Node) -> list[yaml.Node]:
    """All nodes below `root`, and it, each once."""
    found, seen = [root], {id(root)}
    for node in found:
        for part in parts(node):
            if id(part) not in seen:
                seen.add(id(part))
                found.append(part)
    return found


def parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes right below `node`: items of a list, keys and values of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []

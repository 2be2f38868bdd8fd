"""Monte-Carlo tree search over chains of layers (CoLa, arXiv 2507.07996, section 3).

A node is a chain; a move skips or repeats some of its layers. The score of a child is its mean reward plus
`exploration` sqrt(ln N / n), less `length_penalty` times its length over the source's, with N visits of its parent and
n of its own. A node has at most sqrt(visits) children, rounded up: a chain has some hundred moves, more than there are
simulations, and a tree that tries all of them stays one move deep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

Chain = tuple[int, ...]
LONGEST = 2  # chains have at most this many times the source's layers


@dataclass
class Settings:
    """simulations, longest, exploration, length_penalty, random_share: as in the recipe `Search`."""

    simulations: int
    longest: int
    exploration: float
    length_penalty: float
    random_share: float


@dataclass
class Node:
    """chain: at this node.   moves: chains of children that are not made yet.   reward: sum over visits."""

    chain: Chain
    parent: Node | None
    moves: list[Chain]
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0

    @property
    def may_grow(self) -> bool:
        """True if a visit makes a new child."""
        return bool(self.moves) and len(self.children) < math.ceil(math.sqrt(self.visits))


def moves(chain: Chain, count: int, longest: int) -> list[Chain]:
    """The chains that one move makes of `chain`, each once. count: layers of the source."""
    found: dict[Chain, None] = {}
    for first in range(len(chain)):
        for size in range(1, min(longest, len(chain) - first) + 1):
            before, block, after = chain[:first], chain[first : first + size], chain[first + size :]
            if before or after:
                found[before + after] = None
            if len(chain) + size <= LONGEST * count:
                found[before + block + block + after] = None
    found.pop(chain, None)
    return [*found]


def search(
    count: int, reward: Callable[[Chain], float], settings: Settings, random: Random, known: dict[Chain, float]
) -> dict[Chain, float]:
    """Rewards of the chains that the search tries, the source's first, in order.

    count: layers of the source.   reward: of a chain, in [0, 1]; it is not called for one in `known`.
    """

    def node(chain: Chain, parent: Node | None) -> Node:
        possible = moves(chain, count, settings.longest)
        random.shuffle(possible)
        return Node(chain, parent, possible)

    def score(child: Node, visits: int) -> float:
        explored = settings.exploration * math.sqrt(math.log(visits) / child.visits)
        return child.reward / child.visits + explored - settings.length_penalty * len(child.chain) / count

    root, found = node(tuple(range(count)), None), {}
    for _ in range(settings.simulations):
        at = root
        while not at.may_grow and at.children:
            if random.random() < settings.random_share:
                at = at.children[int(random.random() * len(at.children))]
            else:
                visits = at.visits
                at = max(at.children, key=lambda child: score(child, visits))
        if at.may_grow:
            at.children.append(node(at.moves.pop(), at))
            at = at.children[-1]
        if at.chain not in found:
            found[at.chain] = known[at.chain] if at.chain in known else reward(at.chain)
        value = found[at.chain]
        up: Node | None = at
        while up is not None:
            up.visits, up.reward = up.visits + 1, up.reward + value
            up = up.parent
    return found

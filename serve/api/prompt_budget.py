"""Prompt tokens of a step, budgeted in tokens x depth.

A prompt runs through all recurrences in one step: n tokens at depth R take R passes of n lanes. A budget of
tokens alone would let a step at R = 32 take 32 times as long as one at R = 1.
"""

from __future__ import annotations


class PromptBudget:
    """The tokens x depth that prompts may take in one step.

    total: so many, which are the tokens of a step at depth 1.   prompts: requests that have prompt tokens left.
    """

    def __init__(self, total: int, prompts: int):
        self.total, self.left, self.prompts = total, total, prompts

    def take(self, tokens: int, depth: int) -> int:
        """The number of a prompt's next `tokens` that run in this step, at this `depth`.

        One that has to be cut leaves half of the budget to the prompts behind it, so that a short one need not wait for
        its end. The first gets one token at least.
        """
        left = self.left
        if tokens * depth > left and self.prompts > 1:
            left //= 2
        count = min(tokens, left // depth)
        if not count and self.left == self.total:
            count = 1
        self.left = max(self.left - count * depth, 0)
        return count

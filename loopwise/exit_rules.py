"""The names of the exit rules, for recipes and their help, which must not wait for torch."""

from typing import Literal, get_args

# In the order of RecurrentDepthConfig's EXIT_RULES, which travels with checkpoints; a test compares the two.
ExitRule = Literal["fixed", "latent-diff", "cosine", "gate", "entropy-diff", "kl", "minp-kl", "argmax-stability"]
CHOICES = ", ".join(get_args(ExitRule))

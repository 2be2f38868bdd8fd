"""The fixtures that tests of training and of measurement share."""

from tests.helpers.questions import asked
from tests.helpers.train_fixtures import command, corpus, noisy, plain, recurrent, text, tokenizer

__all__ = ["asked", "command", "corpus", "noisy", "plain", "recurrent", "text", "tokenizer"]

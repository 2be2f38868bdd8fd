"""The release of loopwise that saved files name."""

__version__ = "0.2.0.dev0"

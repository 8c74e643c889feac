"""Fine-tune vision-language models so that they are right for the right reasons, and measure it."""

from importlib.metadata import version

__version__ = version("evidence-ft")

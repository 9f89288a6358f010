"""Build, train, test and measure gated linear attention language models."""

__version__ = "0.1.0"

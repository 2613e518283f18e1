"""lowres: pretrain LLaMA-style language models up to 7B on one consumer GPU."""

__version__ = "0.1.0"

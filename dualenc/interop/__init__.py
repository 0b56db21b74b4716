"""Checkpoints of others, in and out."""

from dualenc.interop.checkpoint import TextCheckpoint, open_text
from dualenc.interop.predictor import TextPredictor, load_text

__all__ = ["TextCheckpoint", "TextPredictor", "load_text", "open_text"]

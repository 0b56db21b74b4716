"""Formats of Hugging Face: text encoders, dual encoders and tokenizers."""

"""Formats of other libraries: names of tensors, configurations and tokenizers. No model is run here."""

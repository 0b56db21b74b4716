"""Texts: files of lines, tokenizers, hidden words, and batches of texts."""

"""Hugging Face's formats."""

"""Evaluation sets in the layout of CLIP_benchmark or of loose files."""

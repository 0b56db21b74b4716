"""Errors, files, URLs and texts, for use by every other part of the package."""

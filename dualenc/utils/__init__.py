"""Errors, files, URLs and texts: what every other part may use."""

"""Shards: tar files, where their samples lie, and copies of those that lie elsewhere."""

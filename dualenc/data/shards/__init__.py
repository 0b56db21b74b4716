"""Shards: the index of their samples, reading of tar files, and the cache of remote ones."""

"""Curation of data: scores of pairs, filters and their reports, and shards of the samples that they choose."""

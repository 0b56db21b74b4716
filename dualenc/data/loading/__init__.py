"""From an index to batches: the order, the loader, and what is done with bad samples."""

"""What would hurt a run on shards, found before it."""

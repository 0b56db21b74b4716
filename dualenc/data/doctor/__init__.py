"""The doctor: problems of shards that would hurt a run, found before it starts."""

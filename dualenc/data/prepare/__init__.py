"""Commands that write shards: from tables and folders, smaller ones, and drawn scenes."""

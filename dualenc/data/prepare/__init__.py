"""Writing of shards: from tables and folders, with smaller images, and of synthetic scenes."""

"""Search in a collection of pictures or texts: the index, queries, and the service with its page."""

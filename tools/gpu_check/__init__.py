"""A check of a new GPU: what to run in the first half hour, in order of value."""

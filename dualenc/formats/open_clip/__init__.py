"""open_clip's formats."""

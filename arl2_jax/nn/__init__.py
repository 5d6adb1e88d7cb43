"""Building blocks that memories and models share."""

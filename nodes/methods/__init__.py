"""One node per sparse method."""

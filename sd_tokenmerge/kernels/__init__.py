"""Array in, array out: the numerical core, without models or methods."""

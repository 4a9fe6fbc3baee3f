"""What a sweep found, as tables, plots and picture grids: plain rows in, files out."""

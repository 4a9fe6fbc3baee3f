"""The results of a sweep as tables, plots and picture grids."""

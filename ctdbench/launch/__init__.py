"""Running cells: one at a time here; grids build on it."""

"""Examples to token ids and labels; one module for each task."""

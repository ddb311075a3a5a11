"""Examples to token ids and labels, one file a task."""

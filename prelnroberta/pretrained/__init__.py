"""The seven Flax* classes, and how they are read from and written to Hugging Face folders."""

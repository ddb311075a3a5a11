"""Readers and writers for the checkpoint formats of other libraries."""

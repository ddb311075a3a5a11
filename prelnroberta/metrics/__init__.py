"""Metrics of the tasks and of language models."""

"""Models of other frameworks, their checkpoint formats, and verification against Flax."""

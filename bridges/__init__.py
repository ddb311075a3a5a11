"""The parameter tree <-> other frameworks: their models, their files, and the proof of both."""

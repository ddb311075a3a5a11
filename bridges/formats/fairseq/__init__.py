"""Reads and writes fairseq and DinkyTrain checkpoints; see README.md."""

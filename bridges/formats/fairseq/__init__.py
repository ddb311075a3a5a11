"""fairseq and DinkyTrain checkpoints <-> the parameter tree; see README.md."""

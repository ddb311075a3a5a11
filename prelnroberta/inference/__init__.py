"""Use of a trained model: generation, fill-mask, ragged batches, StableHLO export."""

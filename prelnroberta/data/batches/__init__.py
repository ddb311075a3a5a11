"""Features to batches: padded buckets for evaluation, packed rows for training."""

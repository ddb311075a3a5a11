"""Raw text to shuffled, masked batches: corpus, token files, packing, masking, loader."""

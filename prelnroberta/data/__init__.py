"""From text to batches: tokenizer, corpus, packing, masking, loader. numpy only, no accelerator."""

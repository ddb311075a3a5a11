"""Text to batches, with numpy and tokenizers but without JAX.

Pretraining: corpus -> token files -> packing -> masking -> loader (`pretraining`). Fine-tuning:
`readers` -> `features` -> `batches`; each package imports only those before it.
"""

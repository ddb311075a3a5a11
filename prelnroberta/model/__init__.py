"""The network: layers, attention, blocks, the encoder, heads and losses."""

"""The transformer: norm, rotary, attention, mlp, block, transformer, each in one file."""

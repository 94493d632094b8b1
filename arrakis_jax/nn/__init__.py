"""The transformer. Norm, rotary, attention, mlp, block and transformer have a file each."""

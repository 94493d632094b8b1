"""The engine of decomposition: what every part of the model writes, kept as factors."""

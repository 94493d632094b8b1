"""The engine of decomposition. It keeps all that the model writes as factors."""

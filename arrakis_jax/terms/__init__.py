"""The engine of decomposition. It keeps what every part of the model writes as factors."""

"""Patching: what does an activation of another run change? Exactly, and to first order."""

"""Patching: what changes if an activation is that of another run? Exactly, and to first order."""

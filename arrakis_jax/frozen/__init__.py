"""The model with its norms' scales frozen, which is linear."""

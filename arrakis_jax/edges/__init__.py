"""Patching edges: what one writer adds to the input of one reader."""

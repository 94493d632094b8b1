"""Circuits: what heads compute from weights alone, and how they compose."""

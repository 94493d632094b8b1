"""Decomposition: what wrote this? One method, one file."""

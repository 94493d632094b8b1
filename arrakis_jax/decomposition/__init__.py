"""Decomposition: which parts of the model wrote this? Each method has its own file."""

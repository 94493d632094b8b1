"""What the library costs, and what its peers cost: `python -m benchmarks --help`.

A benchmark is a module with `figures(options)`, which yields one dict a figure.
"""

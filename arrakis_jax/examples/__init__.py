"""Nine programs, each complete by itself: a question, what it prints, and how it is found out.

They run offline, on the model in the package:
`python -m arrakis_jax.examples.activation_patching`.
"""

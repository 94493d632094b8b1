"""Checkpoints: Hugging Face folders and hub ids in, native ones (Orbax) in and out."""

from arrakis_jax.checkpoint.files import local_folder
from arrakis_jax.checkpoint.load import from_pretrained
from arrakis_jax.checkpoint.native import new_folder, save
from arrakis_jax.checkpoint.parameters import partition
from arrakis_jax.checkpoint.weights import export_weights

__all__ = ["export_weights", "from_pretrained", "local_folder", "new_folder", "partition", "save"]

"""Takes the residual stream of a transformer apart: decomposition, movement and attribution."""

from importlib.metadata import version

from arrakis_jax.attribution.features import Attribution, feature_attribution
from arrakis_jax.attribution.gradients import residual_gradients
from arrakis_jax.checkpoint import from_pretrained, save
from arrakis_jax.config import ModelConfig, RopeScaling
from arrakis_jax.decomposition.change import MovementAttribution, attribute_movement
from arrakis_jax.decomposition.direct import Decomposition, capture_for, decompose
from arrakis_jax.decomposition.direction import DirectionAttribution, attribute_to
from arrakis_jax.decomposition.readout import LogitAttribution, logit_attribution
from arrakis_jax.decomposition.residual import ResidualDecomposition, residual_decomposition
from arrakis_jax.decomposition.top import TopAttribution, top_attribution
from arrakis_jax.demo import demo_model
from arrakis_jax.edits import Add, Edit, Project, Replace, Scale, Set
from arrakis_jax.errors import CheckpointError, NotCapturedError
from arrakis_jax.families import config_for
from arrakis_jax.forward import cpu_compiler_options, resume, run
from arrakis_jax.labels import Label, Labels
from arrakis_jax.movement.layers import (
    Movement,
    MovementMatrix,
    movement_matrix,
    residual_movement,
)
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.residual_tools import ResidualTools
from arrakis_jax.residuals import Capture, ModelOutput, ResidualStream, Routing
from arrakis_jax.table import Table
from arrakis_jax.tokens import encode, token_id, tokenizer_for

__version__ = version("arrakis-jax")
del version

__all__ = [
    "Add",
    "Attribution",
    "Capture",
    "CheckpointError",
    "Decomposition",
    "DirectionAttribution",
    "Edit",
    "Label",
    "Labels",
    "LogitAttribution",
    "ModelConfig",
    "ModelOutput",
    "Movement",
    "MovementAttribution",
    "MovementMatrix",
    "NotCapturedError",
    "Project",
    "Replace",
    "ResidualDecomposition",
    "ResidualStream",
    "ResidualTools",
    "RopeScaling",
    "Routing",
    "Scale",
    "Set",
    "Table",
    "TopAttribution",
    "Transformer",
    "attribute_movement",
    "attribute_to",
    "capture_for",
    "config_for",
    "cpu_compiler_options",
    "decompose",
    "demo_model",
    "encode",
    "feature_attribution",
    "from_pretrained",
    "logit_attribution",
    "movement_matrix",
    "residual_decomposition",
    "residual_gradients",
    "residual_movement",
    "resume",
    "run",
    "save",
    "token_id",
    "tokenizer_for",
    "top_attribution",
]

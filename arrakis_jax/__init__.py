"""Takes the residual stream of a transformer apart: decomposition, movement and attribution.

Every public name is imported from here. The rooms of the package, by floor:

    1   core            shape letters, errors, numerics, the config, checks of arguments
    2   results         what tools return: records, labels, terms, the k largest, tables
    3   stream          the residual stream as a value: fields, padding, points, captures, edits
    4   nn              one transformer for all families, its layers stacked; `walk` scans them
    5   families        a table for each family of checkpoints: config fields and weights
    5   frozen          the model with its norms' scales frozen, which is linear
    6   forward         the compiled forward, what a tool reads, targets
    6   checkpoint      reading and writing weights
    7   terms           the engine of decomposition: terms kept as factors
    7   text            tokenizers
    8   decomposition   what wrote this?
    8   movement        how does the stream change on its way?
    8   attribution     which inputs caused this output?
    8   circuits        what do weights compute?
    9   patching        what if a node were another run's?
    10  edges           what if an edge were?
    11  evaluation      is an attribution right?
    12  demo            the shipped model, and how it is trained
    12  residual_tools  three tools bound to a model
    13  cli             the command line
    13  examples        nine programs

A module imports from its own room and from lower floors, never from its own floor's other rooms.
Two rules more: `families` does not import `nn`, so that configs and weight tables are tested
without an array; and no tool imports `families` or `checkpoint`: it gets a model.
`tests/test_package.py` holds all of this. A method has a file that is named as its function.
"""

from arrakis_jax.attribution.feature_attribution import (
    Attribution as Attribution,
    feature_attribution,
)
from arrakis_jax.attribution.integrated_gradients import IntegratedGradients as IntegratedGradients
from arrakis_jax.attribution.perturb import Occlusion as Occlusion, ValueZeroing as ValueZeroing
from arrakis_jax.attribution.residual_gradients import residual_gradients
from arrakis_jax.attribution.saliency import (
    GradTimesInput as GradTimesInput,
    Saliency as Saliency,
    SmoothGrad as SmoothGrad,
)
from arrakis_jax.checkpoint import from_pretrained, save as save
from arrakis_jax.circuits.bigrams import bigram_logits, top_bigrams
from arrakis_jax.circuits.composition import (
    Composition as Composition,
    CompositionBaseline as CompositionBaseline,
    composition_baseline,
    composition_scores,
)
from arrakis_jax.circuits.copying import (
    CopyingRanks as CopyingRanks,
    copying_ranks,
    copying_scores,
    copying_traces,
    matching_scores,
)
from arrakis_jax.circuits.factored import Factored as Factored
from arrakis_jax.circuits.head_scores import HeadScores as HeadScores, head_scores, repeated_tokens
from arrakis_jax.circuits.head_tables import (
    SkipTrigrams as SkipTrigrams,
    ov_table,
    qk_table,
    skip_trigrams,
)
from arrakis_jax.circuits.matrices import ov_matrices, qk_matrices
from arrakis_jax.circuits.path_expansion import Path as Path, PathTerms as PathTerms, path_expansion
from arrakis_jax.circuits.virtual_head import VirtualHead as VirtualHead, virtual_head
from arrakis_jax.circuits.vocabulary import TopTokens as TopTokens
from arrakis_jax.core.config import ModelConfig as ModelConfig, RopeScaling as RopeScaling
from arrakis_jax.core.errors import (
    CheckpointError as CheckpointError,
    NotCapturedError as NotCapturedError,
)
from arrakis_jax.core.prompts import Prompts as Prompts
from arrakis_jax.decomposition.attribute_movement import (
    MovementAttribution as MovementAttribution,
    attribute_movement,
)
from arrakis_jax.decomposition.attribute_to import (
    DirectionAttribution as DirectionAttribution,
    attribute_to,
)
from arrakis_jax.decomposition.decompose import decompose
from arrakis_jax.decomposition.logit_attribution import (
    LogitAttribution as LogitAttribution,
    logit_attribution,
)
from arrakis_jax.decomposition.logit_lens import LogitLens as LogitLens, logit_lens
from arrakis_jax.decomposition.residual_decomposition import (
    ResidualDecomposition as ResidualDecomposition,
    residual_decomposition,
)
from arrakis_jax.decomposition.top_attribution import (
    TopAttribution as TopAttribution,
    top_attribution,
)
from arrakis_jax.demo import demo_model
from arrakis_jax.edges.circuit import (
    CircuitFaithfulness as CircuitFaithfulness,
    circuit_faithfulness,
    run_circuit,
)
from arrakis_jax.edges.edge_attribution import EAP as EAP, EAPIG as EAPIG, edge_attribution
from arrakis_jax.edges.effects import EdgeEffects as EdgeEffects
from arrakis_jax.edges.graph import Edge as Edge, Graph as Graph, Node as Node
from arrakis_jax.edges.path_patching import PathEffects as PathEffects, path_patching
from arrakis_jax.edges.select import greedy_edges, pruned, top_edges
from arrakis_jax.evaluation.agreement import Agreement as Agreement, agreement
from arrakis_jax.evaluation.randomisation import randomisation_check, randomised_weights
from arrakis_jax.evaluation.token_faithfulness import (
    Curves as Curves,
    TokenFaithfulness as TokenFaithfulness,
    token_faithfulness,
)
from arrakis_jax.families import config_for
from arrakis_jax.forward.compilation_cache import compilation_cache
from arrakis_jax.forward.run import cpu_compiler_options, resume as resume, run as run
from arrakis_jax.forward.targets import (
    KL as KL,
    Continuation as Continuation,
    Custom as Custom,
    Entropy as Entropy,
    Logit as Logit,
    LogProb as LogProb,
    Prob as Prob,
    Target as Target,
)
from arrakis_jax.movement.flow_routes import FlowRoutes as FlowRoutes, flow_routes
from arrakis_jax.movement.information_flow import (
    InformationFlow as InformationFlow,
    information_flow,
)
from arrakis_jax.movement.linear_cka import CKA as CKA, linear_cka
from arrakis_jax.movement.movement_matrix import MovementMatrix as MovementMatrix, movement_matrix
from arrakis_jax.movement.residual_movement import Movement as Movement, residual_movement
from arrakis_jax.movement.stream_geometry import StreamGeometry as StreamGeometry, stream_geometry
from arrakis_jax.nn.transformer import Transformer as Transformer
from arrakis_jax.patching.attribution_patching import (
    AtP as AtP,
    AtPStar as AtPStar,
    attribution_patching,
)
from arrakis_jax.patching.effects import Cell as Cell, PatchEffects as PatchEffects
from arrakis_jax.patching.patch_sweep import patch_sweep
from arrakis_jax.residual_tools import ResidualTools as ResidualTools
from arrakis_jax.results.labels import Label as Label, Labels as Labels
from arrakis_jax.results.table import Table as Table
from arrakis_jax.stream.capture import Capture as Capture
from arrakis_jax.stream.edits import (
    Add as Add,
    Edit as Edit,
    Project as Project,
    Replace as Replace,
    Scale as Scale,
    Set as Set,
)
from arrakis_jax.stream.residuals import (
    ModelOutput as ModelOutput,
    ResidualStream as ResidualStream,
    Routing as Routing,
)
from arrakis_jax.terms.capture import capture_for
from arrakis_jax.terms.decomposition import Decomposition as Decomposition
from arrakis_jax.text import encode, token_id, tokenizer_for

__version__ = "0.1.0"

# `from arrakis_jax import *` brings the tools. The types, and names that would hide common ones
# (`Path`, `Set`, `run`), are imported by name.
__all__ = [
    "agreement",
    "attribute_movement",
    "attribute_to",
    "attribution_patching",
    "bigram_logits",
    "capture_for",
    "circuit_faithfulness",
    "compilation_cache",
    "composition_baseline",
    "composition_scores",
    "config_for",
    "copying_ranks",
    "copying_scores",
    "copying_traces",
    "cpu_compiler_options",
    "decompose",
    "demo_model",
    "edge_attribution",
    "encode",
    "feature_attribution",
    "flow_routes",
    "from_pretrained",
    "greedy_edges",
    "head_scores",
    "information_flow",
    "linear_cka",
    "logit_attribution",
    "logit_lens",
    "matching_scores",
    "movement_matrix",
    "ov_matrices",
    "ov_table",
    "patch_sweep",
    "path_expansion",
    "path_patching",
    "pruned",
    "qk_matrices",
    "qk_table",
    "randomisation_check",
    "randomised_weights",
    "repeated_tokens",
    "residual_decomposition",
    "residual_gradients",
    "residual_movement",
    "run_circuit",
    "skip_trigrams",
    "stream_geometry",
    "token_faithfulness",
    "token_id",
    "tokenizer_for",
    "top_attribution",
    "top_bigrams",
    "top_edges",
    "virtual_head",
]

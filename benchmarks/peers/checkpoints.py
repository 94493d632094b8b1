"""python -m benchmarks.peers.checkpoints WORKLOAD FOLDER: writes a workload's Hugging Face folder.

The matrices are those of a fresh model, by seed 0. In float32 gains are drawn around 1 and biases
around 0, so that folding them wrongly shows. A folder that exists is complete.
"""

import sys
from pathlib import Path

import torch
import transformers

from benchmarks.workloads import WORKLOADS, Workload

GAINS, BIASES = 0.1, 0.02  # standard deviations


def drawn(workload: Workload) -> transformers.PreTrainedModel:
    """A model with random weights."""
    assert workload.shape is not None, "the shipped model has weights of its own"
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(workload.family, **workload.shape)
    dtype = getattr(torch, workload.dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if dtype == torch.float32:
        with torch.no_grad():
            for name, vector in model.named_parameters():
                if vector.ndim == 1:
                    mean, std = (0.0, BIASES) if name.endswith("bias") else (1.0, GAINS)
                    vector.normal_(mean, std)
    return model


def main(name: str, folder: Path) -> None:
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    drawn(WORKLOADS[name]).save_pretrained(part)
    transformers.GPT2Tokenizer().save_pretrained(part)  # TransformerLens loads none without
    part.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Model weights on disk: checkpoints of others into our tree and back, and a run's own files."""

from gemma_grpo.weights.assemble import assemble, hf_tensors
from gemma_grpo.weights.hf_write import write_folder
from gemma_grpo.weights.load import NANO, digest, open_source, tokenizer_path
from gemma_grpo.weights.peft_adapter import hub_name, write_adapter
from gemma_grpo.weights.safetensors_file import load, save
from gemma_grpo.weights.source import Source

__all__ = [
    "NANO",
    "Source",
    "assemble",
    "digest",
    "hf_tensors",
    "hub_name",
    "load",
    "open_source",
    "save",
    "tokenizer_path",
    "write_adapter",
    "write_folder",
]

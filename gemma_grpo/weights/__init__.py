"""Model weights on disk: checkpoints of others into our tree and back, and a run's own files."""

from gemma_grpo.weights.assemble import assemble, hf_tensors
from gemma_grpo.weights.load import open_source, tokenizer_path
from gemma_grpo.weights.safetensors_file import load, save
from gemma_grpo.weights.source import Source

__all__ = ["Source", "assemble", "hf_tensors", "load", "open_source", "save", "tokenizer_path"]

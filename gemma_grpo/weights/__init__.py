"""Model weights on disk."""

from gemma_grpo.weights.safetensors_file import load, save

__all__ = ["load", "save"]

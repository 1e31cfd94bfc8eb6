"""The embedded model's files, made by gemma_grpo.pretrain."""

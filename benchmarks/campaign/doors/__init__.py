"""Inputs by door: settings, problems, checkpoints of others, run folders, commands."""

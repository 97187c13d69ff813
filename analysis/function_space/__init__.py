"""Runs in function space, their bounds and certificates."""

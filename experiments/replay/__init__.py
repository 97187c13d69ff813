"""Recorded trajectories, run again step by step."""

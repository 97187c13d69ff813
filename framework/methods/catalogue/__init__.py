"""Registered methods, one file a family."""

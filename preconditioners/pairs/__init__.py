"""Secant pairs: damping, tests, first scale."""

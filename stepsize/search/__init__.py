"""Searches: how far to go, by evaluating the objective on the way."""

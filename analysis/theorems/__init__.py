"""Checkable theorems of the papers, one file a group."""

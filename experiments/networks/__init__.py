"""The networks of the problems."""

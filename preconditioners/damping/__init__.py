"""Rules that say how lambda reaches the matrices that are inverted, and whether it changes."""

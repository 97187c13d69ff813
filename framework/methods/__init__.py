"""Methods: their parts, the table of parts, compositions, and the catalogue of names."""

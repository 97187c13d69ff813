"""One side of a Kronecker product each."""

"""Slow transcriptions of the papers' algorithms, line by line, in float64.

Nothing here imports ``osculate``: the package is checked against these files, and these files against trajectories
recorded from the authors' own code (``tests/data``). Readability comes before speed everywhere.

Conventions: arrays are numpy float64; a layer's parameters are the matrix ``[W | b]`` with the bias as LAST column;
``h`` is a layer's input, ``a`` its pre-activation, ``g`` the gradient of one sample's own loss with respect to ``a``.
Every ``run(meta, arrays)`` takes a trajectory's metadata and inputs and returns all the arrays of the recorded format.
"""

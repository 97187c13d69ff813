"""On the path of a process, hides an installed torchvision that does not fit the installed torch.

Lightning's metrics import torchvision wherever it is installed; BackPACK requires it to be, but never imports it.
"""

import importlib.metadata as metadata
import importlib.util
import sys

_distribution, _find_spec = metadata.distribution, importlib.util.find_spec


def distribution(name):
    if name.lower() == "torchvision":
        raise metadata.PackageNotFoundError(name)
    return _distribution(name)


metadata.distribution = distribution
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else _find_spec(name, package)
sys.modules["torchvision"] = None

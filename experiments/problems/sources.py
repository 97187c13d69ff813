"""Where the data of the problems come from: licence and citation of each set."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .problem import Source

__all__ = ["CIFAR10", "CIFAR100", "CURVES", "GENERATED", "GRAMMAR", "GRAPHS", "OLIVETTI", "SOURCES", "SVHN"]

_GENERATED = "generated here, none needed"

CURVES = Source(
    "generated curves through three points", _GENERATED, "after Hinton and Salakhutdinov, Science 313, 2006"
)
OLIVETTI = Source(
    "Olivetti faces",
    "credit AT&T Laboratories Cambridge when the images are used",
    "Samaria and Harter, Parameterisation of a stochastic model for human face identification, WACV 1994",
    "https://cs.nyu.edu/~roweis/data.html",
)
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "MNIST": Source(
            "MNIST",
            "CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
            "LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        "Fashion-MNIST": Source(
            "Fashion-MNIST",
            "MIT, Zalando SE",
            "Xiao, Rasul and Vollgraf, arXiv:1708.07747",
            "https://github.com/zalandoresearch/fashion-mnist",
        ),
    }
)
"""By the title of the set of image files."""

_TINY_IMAGES = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
_CIFAR = ("no explicit licence; the authors ask for the citation", _TINY_IMAGES)
CIFAR10 = Source("CIFAR-10", *_CIFAR, "https://www.cs.toronto.edu/~kriz/cifar.html")
CIFAR100 = Source("CIFAR-100", *_CIFAR, "https://www.cs.toronto.edu/~kriz/cifar.html")
SVHN = Source(
    "Street View House Numbers, cropped digits",
    "for non-commercial use only",
    "Netzer, Wang, Coates, Bissacco, Wu and Ng, Reading Digits in Natural Images, 2011",
    "http://ufldl.stanford.edu/housenumbers/",
)
_PLANETOID = (
    "repository MIT, Zhilin Yang; the graphs come from the LINQS group",
    "Sen et al., Collective Classification in Network Data, 2008; split of Yang, Cohen and Salakhutdinov, ICML 2016",
    "https://github.com/kimiyoung/planetoid",
)
GRAPHS: Mapping[str, Source] = MappingProxyType(
    {title: Source(f"{title} citation graph", *_PLANETOID) for title in ("Cora", "Citeseer", "Pubmed")}
)
"""By the title of the graph."""

GRAMMAR = Source("sentences of a small grammar", _GENERATED, "ours")
GENERATED = Source("random numbers", _GENERATED, "ours")

"""Adapters: how each kind of module is read as a linear map at shared positions."""

from .convolution import ConvolutionAdapter, TransposedConvolutionAdapter
from .embedding import ONE_HOT_LIMIT, EmbeddingAdapter
from .forwards import keeps_forward, own_forward
from .linear import LinearAdapter, ProjectionAdapter, ProjectionBiasAdapter, TensorAdapter, TransposedLinearAdapter
from .normalisation import BatchNormAdapter, GroupNormAdapter, InstanceNormAdapter, LayerNormAdapter, RMSNormAdapter
from .protocol import LayerAdapter, MatrixAdapter, PatchAdapter, ScaleAdapter

__all__ = [
    "ADAPTERS",
    "KINDS",
    "ONE_HOT_LIMIT",
    "BatchNormAdapter",
    "ConvolutionAdapter",
    "EmbeddingAdapter",
    "GroupNormAdapter",
    "InstanceNormAdapter",
    "LayerAdapter",
    "LayerNormAdapter",
    "LinearAdapter",
    "MatrixAdapter",
    "PatchAdapter",
    "ProjectionAdapter",
    "ProjectionBiasAdapter",
    "RMSNormAdapter",
    "ScaleAdapter",
    "TensorAdapter",
    "TransposedConvolutionAdapter",
    "TransposedLinearAdapter",
    "keeps_forward",
    "own_forward",
]

ADAPTERS: tuple[LayerAdapter, ...] = (
    LinearAdapter(),
    *(ConvolutionAdapter(dimensions) for dimensions in (1, 2, 3)),
    *(TransposedConvolutionAdapter(dimensions) for dimensions in (1, 2, 3)),
    EmbeddingAdapter(),
    BatchNormAdapter(),
    LayerNormAdapter(),
    GroupNormAdapter(),
    InstanceNormAdapter(),
    RMSNormAdapter(),
)
"""In the order in which they are asked."""

KINDS = (*(adapter.kind for adapter in ADAPTERS), "Attention", "Other")
"""Every kind of layer."""

"""Arithmetic on adapters: adapters in, an adapter out, computed on the true dW of every method."""

from studio.algebra.blends import BLENDS, Blend
from studio.algebra.combine import blend, combine
from studio.algebra.cut import Cut
from studio.algebra.extract import base_weights, extract, model_weights
from studio.algebra.product import Product, best_product
from studio.algebra.report import BlendReport, CombinedState
from studio.algebra.resize import resize

__all__ = [
    "BLENDS",
    "Blend",
    "BlendReport",
    "CombinedState",
    "Cut",
    "Product",
    "base_weights",
    "best_product",
    "blend",
    "combine",
    "extract",
    "model_weights",
    "resize",
]

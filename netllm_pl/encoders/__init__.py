"""Encoders: each turns one kind of input into token-like vectors that a language model reads."""

from netllm_pl.encoders.graph import GraphEncoder, Graphs, GraphVectors, pack_graphs
from netllm_pl.encoders.image import ImageEncoder, VisionConfig
from netllm_pl.encoders.scalar import ScalarEncoder
from netllm_pl.encoders.series import SeriesEncoder
from netllm_pl.encoders.tokens import TokenNorm, Tokens, join, padded

__all__ = [
    "GraphEncoder",
    "GraphVectors",
    "Graphs",
    "ImageEncoder",
    "ScalarEncoder",
    "SeriesEncoder",
    "TokenNorm",
    "Tokens",
    "VisionConfig",
    "join",
    "pack_graphs",
    "padded",
]

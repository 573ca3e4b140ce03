"""Adapts one frozen large language model to many networking tasks."""

__version__ = "0.1.0"

"""Viewport prediction: where will a viewer of a 360-degree video look in the next seconds?"""

from tasks.viewport_prediction import fetching as _fetching  # registers the public data sets
from tasks.viewport_prediction.data import ViewportPredictionData
from tasks.viewport_prediction.learned_baselines import ViewportGRU, ViewportTRACK
from tasks.viewport_prediction.prompted import PromptedViewport
from tasks.viewport_prediction.task import ViewportPrediction

__all__ = ["PromptedViewport", "ViewportGRU", "ViewportPrediction", "ViewportPredictionData", "ViewportTRACK"]

del _fetching

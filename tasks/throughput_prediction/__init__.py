"""Throughput prediction: how fast will a link be in the next half minute?"""

from tasks.throughput_prediction.data import ThroughputPredictionData
from tasks.throughput_prediction.task import ThroughputPrediction

__all__ = ["ThroughputPrediction", "ThroughputPredictionData"]

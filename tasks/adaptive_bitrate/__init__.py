"""Adaptive bitrate streaming: at which quality should a client fetch the next chunk of a video?"""

from tasks.adaptive_bitrate.data import AdaptiveBitrateData
from tasks.adaptive_bitrate.hindsight_mlp import HindsightMLP
from tasks.adaptive_bitrate.learned_baselines import Pensieve
from tasks.adaptive_bitrate.online import OnlineBitrate
from tasks.adaptive_bitrate.task import AdaptiveBitrate

__all__ = ["AdaptiveBitrate", "AdaptiveBitrateData", "HindsightMLP", "OnlineBitrate", "Pensieve"]

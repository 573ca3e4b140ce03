"""Cluster job scheduling: which stage of which job should the next free executors work on?"""

from tasks.job_scheduling import fetching as _fetching  # registers the public data set
from tasks.job_scheduling.data import JobSchedulingData
from tasks.job_scheduling.graph_scheduler import GraphScheduler
from tasks.job_scheduling.learned_baselines import Decima
from tasks.job_scheduling.online import OnlineScheduling
from tasks.job_scheduling.task import JobScheduling

__all__ = ["Decima", "GraphScheduler", "JobScheduling", "JobSchedulingData", "OnlineScheduling"]

del _fetching

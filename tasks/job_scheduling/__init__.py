"""Cluster job scheduling: which stage of which job should the next free executors work on?"""

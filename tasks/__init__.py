"""Networking tasks, one folder each; the command line finds them here."""

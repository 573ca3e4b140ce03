"""Studies: questions whose answer takes many runs, described in configs/study/*.yaml and answered by one command."""

"""`python -m netllm_pl`."""

from netllm_pl.cli import main

main()

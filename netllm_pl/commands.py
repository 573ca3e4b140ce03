"""The commands beside Lightning's own: their arguments, and one call each."""

import sys
from pathlib import Path
from typing import Any

from netllm_pl.parsing import Parser

IGNORED = ("model", "trainer", "ckpt_path", "weights_only", "run_dir", "save_every")
"""Parts of a config of `fit` that `evaluate` has no use for."""


def evaluate(args: list[str]) -> None:
    """Run policies on the same test windows or episodes and print one table."""
    from netllm_pl.data import NetDataModule
    from netllm_pl.discovery import discover
    from netllm_pl.evaluate import run

    discover()
    parser = Parser(prog="python -m netllm_pl evaluate", description=evaluate.__doc__)
    parser.add_argument("-c", "--config", action="config", help="YAML of a task; only its data part is used")
    parser.add_subclass_arguments(NetDataModule, "data", required=True)
    parser.add_argument("--policies", type=str, help="baselines and checkpoints, separated by commas", required=True)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for summary.csv and episodes.parquet")
    parser.add_argument("--steps", action="store_true", help="also write steps.parquet, one row a step")
    parser.add_argument("--seed_everything", type=int | bool, default=0, help="seed of everything random")
    for ignored in IGNORED:
        parser.add_argument(f"--{ignored}", type=Any, default=None, help="ignored; here so that the same file serves")
    config = parser.read(args)
    for ignored in IGNORED:
        config.pop(ignored)  # else jsonargparse builds every class that they name
    _seed(config.seed_everything)
    data = parser.instantiate(config).data
    policies = [name.strip() for name in config.policies.split(",") if name.strip()]
    run(data, policies, config.out, steps=config.steps)


def export(args: list[str]) -> None:
    """Write a checkpoint as a folder to take away: PEFT adapter, encoder_head.safetensors, config.yaml."""
    parser = _parser("export", export.__doc__)
    parser.add_argument("checkpoint", type=Path, help="what fit wrote")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    config = parser.read(args)
    from netllm_pl.export import export as write

    print(f"wrote {write(config.checkpoint, config.out)}")


def fetch(args: list[str]) -> None:
    """Bring a public data set or the small default language model, and check its sum."""
    from netllm_pl import fetch as fetching

    parser = _parser("fetch", fetch.__doc__)
    parser.add_argument("name", type=str, help="what to bring")
    parser.add_argument("--data_dir", type=str | None, default=None, help="where data sets go; or NETLLM_DATA")
    parser.add_argument("--url", type=str | None, default=None, help="a mirror, or a local copy of the archive")
    config = parser.read(args)
    print(f"{config.name} is at {fetching.fetch(config.name, config.data_dir, config.url)}")


def _parser(name: str, description: str | None) -> Parser:
    return Parser(prog=f"python -m netllm_pl {name}", description=description)


def _seed(seed: int | bool) -> None:
    from lightning.pytorch import seed_everything

    if seed is not False:
        seed_everything(0 if seed is True else seed, workers=True, verbose=False)
    sys.stdout.flush()

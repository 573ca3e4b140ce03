"""The commands beside Lightning's own: their arguments, and one call each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from netllm_pl.errors import UserError
from netllm_pl.parsing import Parser

IGNORED = ("model", "trainer", "ckpt_path", "weights_only", "run_dir", "save_every")
"""Parts of a config of `fit` that `evaluate` and `collect` have no use for."""


def evaluate(args: list[str]) -> None:
    """Run policies on the same test windows or episodes and print one table."""
    from netllm_pl.evaluate import run

    parser = _task_parser("evaluate", evaluate.__doc__)
    parser.add_argument("--policies", type=str, help="baselines and checkpoints, separated by commas", required=True)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for summary.csv and episodes.parquet")
    parser.add_argument("--steps", action="store_true", help="also write steps.parquet, one row a step")
    parser.add_argument("--seed_everything", type=int | bool, default=0, help="seed of everything random")
    config, data = _with_data(parser, args, lambda config: config.seed_everything)
    policies = [name.strip() for name in config.policies.split(",") if name.strip()]
    run(data, policies, config.out, steps=config.steps)


def collect(args: list[str]) -> None:
    """Run policies in random episodes and write what happened as an experience pool, from which `fit` can learn."""
    from netllm_pl import collect as collecting

    parser = _task_parser("collect", collect.__doc__)
    parser.add_argument("--policy", type=str | None, default=None, help="NAME[:SHARE],...: who acts, and how often")
    parser.add_argument("--episodes", type=int, default=1000, help="how many to run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool; it must not exist")
    parser.add_argument("--explore", type=float, default=0.0, help="probability of a random action, such as 0.15")
    parser.add_argument("--split", type=str, default="train", help="what the episodes are drawn from")
    parser.add_argument("--values", type=str | None, default=None, help="action values to add, such as hindsight")
    parser.add_argument("--parallel", type=int, default=64, help="episodes side by side")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--convert", type=Path | None, default=None, help="write this published pool instead of running"
    )
    parser.add_argument("--seed_everything", type=Any, default=None, help="ignored; --seed counts here")
    config, data = _with_data(parser, args, lambda config: config.seed)
    if config.convert is not None:
        collecting.convert(data, config.convert, config.out, config.policy or "published")
    elif config.policy is None:
        raise UserError("missing: --policy; say who acts, such as bba:1,robust_mpc:3, or give --convert FILE")
    else:
        options = {name: config[name] for name in ("explore", "split", "values", "seed", "parallel")}
        collecting.collect(data, collecting.parse_mixture(config.policy), config.episodes, config.out, **options)
    print(collecting.summary(config.out))


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


def _task_parser(name: str, description: str | None) -> Parser:
    """Parser of a command that takes a task's config and uses its data."""
    from netllm_pl.data import NetDataModule
    from netllm_pl.discovery import discover

    discover()
    parser = _parser(name, description)
    parser.add_argument("-c", "--config", action="config", help="YAML of a task; only its data part is used")
    parser.add_subclass_arguments(NetDataModule, "data", required=True)
    for ignored in IGNORED:
        parser.add_argument(f"--{ignored}", type=Any, default=None, help="ignored; here so that the same file serves")
    return parser


def _with_data(parser: Parser, args: list[str], seed: Callable[[Namespace], int | bool]) -> tuple[Namespace, Any]:
    """Read the command line, seed everything, build the data module."""
    config = parser.read(args)
    for ignored in IGNORED:
        config.pop(ignored)  # else jsonargparse builds every class that they name
    _seed(seed(config))
    return config, parser.instantiate(config).data


def _parser(name: str, description: str | None) -> Parser:
    return Parser(prog=f"python -m netllm_pl {name}", description=description)


def _seed(seed: int | bool) -> None:
    from lightning.pytorch import seed_everything

    if seed is not False:
        seed_everything(0 if seed is True else seed, workers=True, verbose=False)
    sys.stdout.flush()

"""Which jobs a name in a config stands for, and which seeds belong to a split."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from netllm_pl.data import SPLITS
from netllm_pl.errors import UserError, unknown
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate
from tasks.job_scheduling.workloads import Workload, read_workload

OWN_SEEDS = 2**31
"""Seeds that a config names lie below; those of drawn episodes above, see `first_seed`."""


def named_workload(name: str, split: str, root: Path, synthetic: SyntheticWorkload) -> Workload:
    """Return the jobs of a split.

    Args:
        name: ``synthetic``, ``tpch``, or a path; `JobSchedulingData` says what each is.
        split: train, valid or test; generated jobs of two splits differ, others do not.
        root: Folder that holds cjs/.
        synthetic: The generator's settings.

    Raises:
        UserError: The name is unknown, or its files are missing or broken.
    """
    if name == "synthetic":
        return generate(replace(synthetic, seed=len(SPLITS) * synthetic.seed + SPLITS.index(split)))
    return read_workload(place_of(name, root))


def place_of(name: str, root: Path) -> Path:
    """Return where a workload that is not generated lies.

    Raises:
        UserError: The name is unknown, or there is nothing.
    """
    path = root / "cjs" / "tpch.parquet" if name == "tpch" else Path(name).expanduser()
    if path.exists():
        return path
    if name == "tpch":
        raise UserError(
            f"{path} does not exist; run `python -m netllm_pl fetch tpch`, set data.data_dir or NETLLM_DATA to the "
            "folder that holds cjs/, or take --data.workload synthetic"
        )
    raise unknown("workload", name, ("synthetic", "tpch"), "The path of a Parquet file or of a folder is one too.")


def drawn(workload: Workload, split: str, held_out: Sequence[int]) -> Workload:
    """Return a workload whose test jobs are of the held-out queries, and those of other splits of all the others.

    Raises:
        UserError: There is no such query, or none would be left.
    """
    known = np.unique(workload.queries)
    strange = sorted(set(held_out) - set(known.tolist()))
    if strange:
        raise UserError(
            f"data.held_out: there is no query {strange[0]}; the workload has {', '.join(map(str, known.tolist()))}"
        )
    if not held_out:
        return workload
    held = np.isin(known, held_out)
    if held.all():
        raise UserError("data.held_out names all queries of the workload; leave some to train on")
    return replace(workload, table=workload.table[:, held if split == "test" else ~held])


def first_seed(split: str) -> int:
    """Return what is added to the numbers of drawn episodes, so that no seed is in two splits or named in a config.

    `collect` numbers them ``seed * 2**32 + i``, and learners that play ``epoch * 2**32 + i``; below i = 2**29 splits
    never meet.
    """
    return OWN_SEEDS + SPLITS.index(split) * 2**29


def check_seeds(**seeds: Sequence[int]) -> None:
    """Refuse lists of seeds that make no fair comparison.

    Raises:
        UserError: A list is empty, a seed is out of range, or one stands twice.
    """
    taken: dict[int, str] = {}
    for name, values in seeds.items():
        if not values:
            raise UserError(f"data.{name} is empty; give at least one seed")
        for value in values:
            if not 0 <= value < OWN_SEEDS:
                raise UserError(f"data.{name}: seed {value} must lie between 0 and {OWN_SEEDS - 1}")
            if value in taken:
                raise UserError(f"seed {value} of data.{name} is one of data.{taken[value]} already; give each once")
            taken[value] = name

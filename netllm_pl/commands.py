"""The commands beside Lightning's own: their arguments, and one call each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from netllm_pl.errors import UserError, at_least
from netllm_pl.parsing import Parser
from netllm_pl.progress import say

if TYPE_CHECKING:
    from netllm_pl.parts import Shard

UNUSED = ("trainer", "ckpt_path", "weights_only", "run_dir", "figures", "costs", "save_every")
"""Parts of a config of `fit` of which other commands build nothing."""
IGNORED = ("model", *UNUSED)
"""Parts of a config of `fit` that `evaluate` and `collect` have no use for."""


def evaluate(args: list[str]) -> None:
    """Run policies on the same test windows or episodes and print one table."""
    from netllm_pl import side_by_side
    from netllm_pl.evaluate import Evaluation
    from netllm_pl.parts import Shard

    parser = task_parser("evaluate", evaluate.__doc__)
    parser.add_argument("--policies", type=str, help="baselines and checkpoints, separated by commas", required=True)
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the results; a new one in it if it holds some"
    )
    parser.add_argument("--steps", action="store_true", help="also write steps.parquet, one row a step")
    _offer_shards(parser, "OUT/parts")
    parser.add_argument("--seed_everything", type=int | bool, default=0, help="seed of everything random")
    words = _offer_flags(parser, args)
    config, data = _with_data(parser, words, lambda config: config.seed_everything)
    policies = [name.strip() for name in config.policies.split(",") if name.strip()]
    shard = _shard(config)
    evaluation = Evaluation(data, policies, config.out, config.steps)
    if shard is not None:
        evaluation.run_shard(shard)
        return
    if config.devices is not None:
        more = _enough_batches(data, config.devices)
        if more:
            config, data = _with_data(parser, [*words, *more], lambda config: config.seed_everything)
            evaluation = Evaluation(data, policies, config.out, config.steps)
        evaluation.check(Shard(1, config.devices))  # a mistake is told once
        side_by_side.run_shards("evaluate", [*side_by_side.without_devices(args), *more], config.devices)
    whole = evaluation.run if not config.merge and config.devices is None else evaluation.merge
    whole(command="evaluate")


def collect(args: list[str]) -> None:
    """Run policies in random episodes and write what happened as an experience pool, from which `fit` can learn."""
    from netllm_pl import collect as collecting
    from netllm_pl import side_by_side
    from netllm_pl.pool_format import refuse_existing

    parser = task_parser("collect", collect.__doc__)
    parser.add_argument("--policy", type=str | None, default=None, help="NAME[:SHARE],...: who acts, and how often")
    parser.add_argument("--episodes", type=int, default=1000, help="how many to run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool; it must not exist")
    parser.add_argument("--explore", type=float, default=0.0, help="probability of a random action, such as 0.15")
    parser.add_argument("--split", type=str, default="train", help="what the episodes are drawn from")
    parser.add_argument("--values", type=str | None, default=None, help="action values to add, such as hindsight")
    parser.add_argument("--parallel", type=int, default=64, help="episodes side by side")
    parser.add_argument("--best_of", type=int, default=1, help="play each episode so often, and keep the best")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--convert", type=Path | None, default=None, help="write this published pool instead of running"
    )
    _offer_shards(parser, "OUT.parts")
    parser.add_argument("--seed_everything", type=Any, default=None, help="ignored; --seed counts here")
    config, data = _with_data(parser, args, lambda config: config.seed)
    if config.convert is not None:
        collecting.convert(data, config.convert, config.out, config.policy or "published")
    elif config.policy is None:
        raise UserError("missing: --policy; say who acts, such as bba:1,robust_mpc:3, or give --convert FILE")
    else:
        names = ("explore", "split", "values", "seed", "parallel", "best_of", "merge")
        options = {name: config[name] for name in names} | {"shard": _shard(config)}
        if config.devices is not None:
            refuse_existing(config.out)
            side_by_side.run_shards("collect", side_by_side.without_devices(args), config.devices)
            options["merge"] = True
        collecting.collect(data, collecting.parse_mixture(config.policy), config.episodes, config.out, **options)
        if config.shard is not None:
            return
    *policies, written = collecting.summary(config.out).splitlines()
    for line in policies:
        say(line)
    print(written)


def benchmark(args: list[str]) -> None:
    """Measure training, decisions or predictions, and the task's simulator, beside what this machine can do at most."""
    import torch

    from netllm_pl.backbone import placed
    from netllm_pl.benchmark import MORE, PARTS, check, chosen_parts, run
    from netllm_pl.late_weights import put_off
    from netllm_pl.run import prepare
    from netllm_pl.sources import read_sources

    parser = task_parser("benchmark", benchmark.__doc__, runs_model=True)
    parser.add_argument(
        "--backbone", type=str | None, default=None,
        help="a file such as configs/llm/smollm2_135m.yaml in place of the config's: --model.init_args.backbone",
    )  # fmt: skip
    parser.add_argument(
        "--random_weights",
        type=bool,
        default=False,
        help="draw the backbone's weights; as fast (--random-weights, too)",
    )
    parser.add_argument(
        "--published", type=bool, default=True,
        help="also measure the way of the published code: float32, batches of one, nothing cached",
    )  # fmt: skip
    parser.add_argument(
        "--parts", type=str | None, default=None,
        help=f"what to measure, separated by commas; null: all of {', '.join(PARTS)} ({', '.join(MORE)}: on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--fast", type=bool, default=True,
        help="on a GPU, compile, capture graphs and train in mixed precision, whatever the config says",
    )  # fmt: skip
    parser.add_argument(
        "--scaling", type=int | None, default=None,
        help="also measure up to so many episodes side by side and steps of a pool, such as 1000000; null does not",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--repeats", type=int | None, default=None, help="behind each median; null: 5, 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="measure for a shorter time, and fewer episodes")
    parser.add_argument("--seed_everything", type=int | bool, default=0, help="seed of everything random")
    words = [f"--model.init_args.{word[2:]}" if word.partition("=")[0] == "--backbone" else word for word in args]
    words = ["--random_weights=true" if word == "--random-weights" else word for word in words]
    config = parser.read(words)
    repeats = (2 if config.quick else 5) if config.repeats is None else config.repeats
    parts = chosen_parts(config.parts, config.published)
    check(config.out, repeats, parts)
    if config.random_weights:
        _draw_weights(config.model)
    noted = {name: _plain(config[name].as_dict()) for name in ("model", "data")}
    trainer: dict[str, Any] = {}
    for source in read_sources(words):  # what the parser makes of --trainer.precision is no mapping
        trainer |= source.tree.get("trainer") or {}
    for unused in UNUSED:
        config.pop(unused)
    prepare()
    _seed(config.seed_everything)
    gpu = torch.cuda.is_available() and trainer.get("accelerator") != "cpu"
    with put_off():
        built = parser.instantiate(config)
    placed(built.model, "cuda" if gpu else "cpu")
    run(
        built.model, built.data, config.out, repeats, config.quick, trainer, noted, parts, config.scaling, config.fast
    )  # fmt: skip


def compare(args: list[str]) -> None:
    """Compare runs of `fit`: one table, and one picture of their learning curves."""
    parser = _parser("compare", compare.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/*")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for the results; a new one in it if it holds some"
    )
    config = parser.read(args)
    from netllm_pl.compare import compare as write

    write(config.runs, config.out)


def study(args: list[str]) -> None:
    """Answer a question that takes many runs: train, evaluate, and write a report; finished runs are not repeated."""
    parser = _parser("study", study.__doc__)
    parser.add_argument("name", type=str, help="a study in configs/study, or the path of such a file")
    parser.add_argument("--run_dir", type=Path | None, default=None, help="folder of its runs; null is runs/study/NAME")
    parser.add_argument(
        "--out", type=Path | None, default=None,
        help="folder of the report; null is docs/results, and for --quick and --generated that of the runs",
    )  # fmt: skip
    parser.add_argument("--parts", type=str | None, default=None, help="only these parts, separated by commas")
    parser.add_argument(
        "--trained", type=str | None, default=None,
        help="RUN=PATH,...: folders or checkpoints of runs that are trained already; {seed} in a PATH is the seed",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int | None, default=None,
        help="commands side by side, in processes of their own; 0 runs them in this one; null is 1, with --quick 0",
    )  # fmt: skip
    parser.add_argument("--generated", action="store_true", help="on generated data in place of real ones")
    parser.add_argument("--quick", action="store_true", help="small sizes, on generated data: only shows that it runs")
    parser.add_argument("--data_dir", type=str | None, default=None, help="where data sets lie; or NETLLM_DATA")
    parser.add_argument("--report", action="store_true", help="run nothing; write the report of what is there")
    parser.add_argument("--list", action="store_true", help="run nothing; print the commands that are not done yet")
    config = parser.read(args)
    from netllm_pl.study.main import Options, run

    run(Options(**{name: value for name, value in config.as_dict().items() if not name.startswith("__")}))


def export(args: list[str]) -> None:
    """Write a checkpoint as a folder to take away: PEFT adapter, encoder_head.safetensors, config.yaml."""
    parser = _parser("export", export.__doc__)
    parser.add_argument("checkpoint", type=Path, help="what fit wrote")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    config = parser.read(args)
    from netllm_pl.export import export as write

    print(f"wrote {write(config.checkpoint, config.out)}")


def fetch(args: list[str]) -> None:
    """Bring a public data set or a small language model, and check its sum."""
    from netllm_pl import fetch as fetching
    from netllm_pl.discovery import discover

    discover()  # tasks have sources, too
    known = "; ".join(f"{name}: {source.summary}" for name, source in sorted(fetching.SOURCES.items()))
    parser = _parser("fetch", fetch.__doc__)
    parser.add_argument("name", type=str, help=f"what to bring. {known}")
    parser.add_argument("--data_dir", type=str | None, default=None, help="where data sets go; or NETLLM_DATA")
    parser.add_argument("--url", type=str | None, default=None, help="a mirror, or a local copy of the archive")
    config = parser.read(args)
    print(f"{config.name} is at {fetching.fetch(config.name, config.data_dir, config.url)}")


def task_parser(name: str, description: str | None, runs_model: bool = False) -> Parser:
    """Parser of a command that takes a task's config and uses its data, and its model if it runs that."""
    from netllm_pl.data import NetDataModule
    from netllm_pl.discovery import discover
    from netllm_pl.task import NetTask

    discover()
    parser = _parser(name, description)
    used = "model and data, and the trainer's accelerator and precision, are" if runs_model else "only its data part is"
    parser.add_argument("-c", "--config", action="config", help=f"YAML of a task; {used} used")
    parser.add_subclass_arguments(NetDataModule, "data", required=True)
    if runs_model:
        parser.add_subclass_arguments(NetTask, "model", required=True)
    for ignored in UNUSED if runs_model else IGNORED:
        parser.add_argument(f"--{ignored}", type=Any, default=None, help="ignored; here so that the same file serves")
    return parser


def _offer_shards(parser: Parser, place: str) -> None:
    """Let a command be divided between machines."""
    text = (
        f"i/n: do the i-th of n equal shares only, and leave it in {place}; the other options must be the same for all"
    )
    parser.add_argument("--shard", type=str | None, default=None, help=text)
    parser.add_argument("--merge", action="store_true", help="do nothing but write the whole of what shards have left")
    text = "run so many shards side by side, each in a process with a GPU of its own, and merge them"
    parser.add_argument("--devices", type=int | None, default=None, help=text)


def _shard(config: Namespace) -> "Shard | None":
    from netllm_pl.parts import Shard

    if config.shard is not None and config.merge:
        raise UserError("give --shard for a share, or --merge when all of them are there, but not both")
    if config.devices is not None and (config.merge or config.shard is not None):
        raise UserError("--devices runs all shards of this machine and merges them; leave --shard and --merge out")
    at_least(1, devices=config.devices)
    return Shard.parse(config.shard)


def _enough_batches(data: Any, processes: int) -> list[str]:
    """Return what to add to a command line, so that the test split has a batch for each process; [] if it has."""
    before = data.eval_batch_size
    if data.batches() >= processes:
        return []
    data.eval_batch_size = 1
    size = max(1, -(-data.batches() // processes))
    data.eval_batch_size = before
    say(f"data.eval_batch_size is {size}: a batch for each of {processes} processes")
    return [f"--data.eval_batch_size={size}"]


def _offer_flags(parser: Parser, args: list[str]) -> list[str]:
    """Add the switches of all data modules to the help; return a command line on which they are arguments of data."""
    from netllm_pl.data import NetDataModule
    from netllm_pl.discovery import concrete_subclasses

    flags: dict[str, str] = {}
    for name, cls in concrete_subclasses(NetDataModule).items():  # type: ignore[type-abstract]
        for flag, text in cls.flags.items():
            flags[flag] = f"{flags[flag]}; {name}: {text}" if flag in flags else f"{name}: {text}"
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    return [f"--data.{word[2:]}=true" if word[:2] == "--" and word[2:] in flags else word for word in args]


def _with_data(parser: Parser, args: list[str], seed: Callable[[Namespace], int | bool]) -> tuple[Namespace, Any]:
    """Read the command line, seed everything, build the data module."""
    config = parser.read(args)
    for ignored in IGNORED:
        config.pop(ignored)  # else jsonargparse builds every class that they name
    _seed(seed(config))
    return config, parser.instantiate(config).data


def _plain(tree: Any) -> Any:
    """Leave out what jsonargparse notes for itself, such as where a part was read from."""
    if not isinstance(tree, dict):
        return tree
    return {name: _plain(value) for name, value in tree.items() if not name.startswith("__")}


def _draw_weights(model: Namespace) -> None:
    """Let the backbone of a model's config have random weights."""
    backbone = model.init_args.get("backbone")
    if backbone is None:
        raise UserError(f"{model.class_path.rpartition('.')[2]} has no backbone; leave out --random_weights")
    backbone.pretrained = False


def _parser(name: str, description: str | None) -> Parser:
    return Parser(prog=f"python -m netllm_pl {name}", description=description)


def _seed(seed: int | bool) -> None:
    from lightning.pytorch import seed_everything

    if seed is not False:
        seed_everything(0 if seed is True else seed, workers=True, verbose=False)
    sys.stdout.flush()

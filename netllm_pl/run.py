"""Lightning's commands: fit, validate, test, predict, from YAML with short class names."""

import logging
import shlex
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from callbacks.finite import StopAtNonFinite
from callbacks.interrupt import StopAndSave, Stopped
from callbacks.predictions import PredictionTable
from callbacks.progress import Bars, PlainProgress
from callbacks.resume import ExactResume, SaveOften
from netllm_pl.backbone import is_sharded
from netllm_pl.checkpoint import AtomicCheckpointIO, check_identity, read_checkpoint
from netllm_pl.data import NetDataModule
from netllm_pl.discovery import discover
from netllm_pl.errors import Terminated, UserError, at_least
from netllm_pl.late_weights import put_off
from netllm_pl.launch import end_with_parent
from netllm_pl.metrics_file import MetricsFile
from netllm_pl.multi_task import MultiTask
from netllm_pl.parsing import LightningParser
from netllm_pl.paths import atomic
from netllm_pl.progress import is_quiet, say
from netllm_pl.run_folder import BEST, LAST, RESULTS, claim, folder_of_run, free_place, home_of, note_run
from netllm_pl.sharded import Sharded as Sharded  # so that trainer.strategy knows it by name
from netllm_pl.task import NetTask

if TYPE_CHECKING:
    import pandas as pd

EXPECTED_WARNINGS = (
    "does not have many workers",  # data lies in memory
    "LeafSpec",
    "exists and is not empty",  # config, metrics and checkpoints share the run's folder
    "module.s. in eval mode",  # frozen encoders
    "callbacks used to create the checkpoint",  # test and predict need none of fit's
    "dirpath has changed",
    "infer the batch indices",  # the sampler gives batches
    "ModelCheckpoint with manual optimization",  # the state after the step is wanted
    "is_gradient_checkpointing",  # peft asks transformers by the old name
)


class CLI(LightningCLI):
    """LightningCLI with one folder a run, checkpoints that survive a kill, and a table at the end of `fit`."""

    def __init__(self, args: list[str]) -> None:
        discover()
        self._command = args[0]
        self._made: Path | None = None
        try:
            super().__init__(
                NetTask,
                NetDataModule,
                args=args,
                trainer_class=Trainer,
                parser_class=LightningParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                save_config_callback=_SaveConfig,
                trainer_defaults={"use_distributed_sampler": False},
            )
        finally:
            if self._made is not None:
                with suppress(OSError):  # something is in it, nearly always
                    self._made.rmdir()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method there
        """Name the command that runs only: parsers take a while to build, and those of the others serve nobody."""
        return {self._command: super().subcommands()[self._command]}

    def instantiate_classes(self) -> None:
        """Build task, data and trainer; frozen weights come later, where the trainer wants them."""
        with put_off():
            super().instantiate_classes()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the run goes."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of this run: config, metrics, events, best.ckpt, last.ckpt (default: runs/TASK-TIME)",
        )
        parser.add_argument(
            "--figures", type=bool, default=True, help="draw what the model does at validations of fit, in TensorBoard"
        )
        parser.add_argument(
            "--costs", type=bool, default=True, help="log speed, memory, time of a decision and trainable share of fit"
        )
        parser.add_argument(
            "--save_every",
            type=int | None,
            default=None,
            help="also write last.ckpt every that many training steps, to lose less when killed",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, data and model in the order in which they are built: data first.

        A name of data that is wrong is told at once; to build a language model may take minutes.
        """
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(NetDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(NetTask, "model", subclass_mode=True)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read files and command line; the command line wins wherever its options stand."""
        assert isinstance(parser, LightningParser)
        self.config = parser.read(args)
        chosen = self.config[self._command]
        at_least(1, save_every=chosen.save_every)
        if not 0 <= int(chosen.seed_everything or 0) < 2**32:
            raise UserError(f"seed_everything is {chosen.seed_everything}; it must lie between 0 and {2**32 - 1}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Keep Lightning from printing the metrics of a quiet test, and predictions in memory: both are on disk."""
        found: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "test" and is_quiet():
            found["verbose"] = False
        return found | ({"return_predictions": False} if subcommand == "predict" else {})

    def _parse_ckpt_path(self) -> None:
        """Files and command line win over hyper-parameters stored in a checkpoint (Lightning 2.6 does the opposite)."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run's folder, loggers and callbacks to the trainer."""
        config = self._get(self.config, "trainer")
        end_with_parent()
        self.run_dir = self._folder(config)
        if self.subcommand == "fit" and not getattr(rank_zero_only, "rank", 0):
            claim(self.run_dir, self._get(self.config, "ckpt_path"))
        extra: dict[str, Any] = {"default_root_dir": str(self.run_dir)}
        if is_quiet():
            extra |= {"enable_progress_bar": False, "enable_model_summary": False}
        callbacks = list(self._get(self.config_init, "trainer").get("callbacks") or [])
        callbacks += self._progress_bar(callbacks)
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        # No default of the parser: it is an object, which no config.yaml can hold.
        extra["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            fitting = self.subcommand == "fit"
            extra["logger"] = [
                TensorBoardLogger(str(self.run_dir), name="", version="", default_hp_metric=False),
                *([MetricsFile(self.run_dir)] if fitting else []),
            ]
        if self.subcommand == "fit":
            callbacks.append(StopAtNonFinite(self.run_dir))
        if self.subcommand == "fit" and not config.fast_dev_run:
            watchers = self._watchers(callbacks)
            # first the checkpoints, with their timer: the last figures are not training
            callbacks += [] if config.get("enable_checkpointing") is False else self._checkpoints()
            callbacks += watchers
        if self.subcommand == "predict":
            callbacks.append(PredictionTable(self.run_dir))
        try:
            return super().instantiate_trainer(**(extra | {"callbacks": callbacks} | kwargs))
        except (ValueError, TypeError, MisconfigurationException) as error:  # what Lightning refuses
            cure = "" if config.accelerator in ("auto", "cpu") else "; trainer.accelerator auto takes what there is"
            raise UserError(f"trainer: {str(error).splitlines()[0].rstrip('.!')}{cure}") from error

    def _folder(self, trainer: Any) -> Path:
        chosen = self._get(self.config, "run_dir") or trainer.get("default_root_dir")
        if chosen is not None:
            return Path(chosen)
        resumed = home_of(self._get(self.config, "ckpt_path")) if self.subcommand == "fit" else None
        if resumed is not None:
            return resumed
        self._made = folder_of_run(type(self.model))
        return self._made

    def _progress_bar(self, callbacks: list[Callback]) -> list[Callback]:
        """Show progress as the terminal can, unless the config has a bar of its own, or wants none."""
        off = is_quiet() or self._get(self.config, "trainer").get("enable_progress_bar") is False
        if off or any(isinstance(callback, ProgressBar) for callback in callbacks):
            return []
        return [Bars() if Console().is_interactive else PlainProgress()]

    def _checkpoints(self) -> list[Callback]:
        task = type(self.model)
        where: dict[str, Any] = {"dirpath": str(self.run_dir), "enable_version_counter": False}
        best = ModelCheckpoint(filename="best", monitor=task.monitor, mode=task.monitor_mode, **where)
        last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **where)
        often = self._get(self.config, "save_every")
        more = [SaveOften(filename="last", every_n_train_steps=often, **where)] if often else []
        # Lightning adds a timer of its own where the time is limited.
        timer = [] if self._get(self.config, "trainer").get("max_time") else [Timer()]
        return [best, last, *more, StopAndSave(filename="last", **where), ExactResume(), *timer]

    def fit(self, **arguments: Any) -> None:
        """Train; Ctrl-C and SIGTERM leave a checkpoint and say how to go on."""
        finished = False
        try:
            self.trainer.fit(**arguments)
            finished = True
        except Stopped as stop:
            if not self.trainer.is_global_zero:
                raise SystemExit(0) from None  # a failure would have the first process killed, which tells how to go on
            kind = KeyboardInterrupt if stop.number == signal.SIGINT else Terminated
            raise kind(f"stopped at step {self.trainer.global_step}{self._how_to_resume()}") from None
        except Terminated:
            raise Terminated(f"terminated{self._how_to_resume()}") from None
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning had told to do nothing
            raise KeyboardInterrupt(f"interrupted{self._how_to_resume()}") from None
        finally:
            self._note(finished)

    def _note(self, finished: bool) -> None:
        """Leave run.json behind, if anything was trained."""
        trainer: Any = self.trainer  # its callbacks are not declared
        timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
        if timer is not None and trainer.is_global_zero and trainer.global_step:
            note_run(self.run_dir, self.model, trainer.global_step, timer.time_elapsed(), finished)

    def _how_to_resume(self) -> str:
        last = self.run_dir / LAST
        if not last.is_file():
            return "; there is no checkpoint yet"
        words = ["fit", "--config", str(self.run_dir / "config.yaml"), "--ckpt_path", str(last)]
        return f"; go on with\n  python -m netllm_pl {shlex.join(words)}"

    def _watchers(self, own: list[Callback]) -> list[Callback]:
        """What TensorBoard shows beside metrics, unless it is switched off or the trainer has such callbacks."""
        from callbacks.cost import CostMonitor
        from callbacks.figures import Figures
        from callbacks.hyperparameters import HyperParameters

        config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_validation=True)
        offered: dict[type[Callback], Callable[[], Callback]] = {
            HyperParameters: lambda: HyperParameters(yaml.safe_load(config)),
            **({CostMonitor: CostMonitor} if self._get(self.config, "costs") else {}),
            **({Figures: Figures} if self._get(self.config, "figures") else {}),
        }
        return [make() for kind, make in offered.items() if not any(isinstance(each, kind) for each in own)]

    def before_fit(self) -> None:
        """Check a checkpoint to resume from before anything is written."""
        path = self._get(self.config, "ckpt_path")
        if path is None:
            return
        check_identity(self.model, read_checkpoint(Path(path)))

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Say where everything is and compare the best checkpoint with the baselines on the test split."""
        if self._get(self.config, "trainer").fast_dev_run or not self.trainer.global_step:
            return
        # A run that ends before its first validation has no best checkpoint, and one may be told to write none at all.
        best = next((f for name in (BEST, LAST) if (f := self.run_dir / name).is_file()), None)
        files = self._divided(best)
        if self._get(self.config, "trainer").limit_test_batches == 0:  # no test is wanted
            say(f"run folder: {self.run_dir}")
            return
        if is_sharded(self.model) and best is not None:
            self.model.load_state_dict(read_checkpoint(best)["state_dict"], strict=False)
        if not self.trainer.is_global_zero:
            self._take_part()
            return
        if isinstance(self.model, MultiTask):
            self._compare_parts(files)
        else:
            from netllm_pl.evaluate import Evaluation

            name = type(self.model).__name__ if best is None else str(best)
            ready = {name: self._on_device()} if best is None or is_sharded(self.model) else {}
            policies = [*self.datamodule.compared, name]
            summary = Evaluation(self.datamodule, policies, self.run_dir, ready=ready).run()
            self._log_test(summary[summary["policy"] == name])
        say(f"run folder: {self.run_dir}  (tensorboard --logdir {self.run_dir.parent})")

    def _divided(self, best: Path | None) -> dict[str, Path]:
        """Write a checkpoint of each task of several, if there are several."""
        if best is None or not isinstance(self.model, MultiTask) or not self.trainer.is_global_zero:
            return {}
        return self.model.divide(best, self.datamodule, self.run_dir)

    def _compare_parts(self, files: dict[str, Path]) -> None:
        """Compare the checkpoint of each task of several with the baselines of that task."""
        from netllm_pl.evaluate import Evaluation

        for name, file in files.items():
            data = self.datamodule.parts[name]
            Evaluation(data, [*data.compared, str(file)], self.run_dir / name).run()

    def _log_test(self, own: "pd.DataFrame") -> None:
        """Let TensorBoard, and so its table of hyper-parameters, have what the best checkpoint is worth."""
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                means = {f"test/{row.metric}": row.mean for row in own.itertuples()}
                logger.log_metrics(means, self.trainer.global_step)
                logger.finalize("success")

    def after_test(self) -> None:
        """Compare what was tested with the baselines on the test split."""
        if self._get(self.config, "trainer").fast_dev_run:
            return
        if isinstance(self.model, MultiTask):
            return  # each task has a checkpoint of its own, which evaluate compares with its baselines
        if not self.trainer.is_global_zero:
            self._take_part()
            return
        from netllm_pl.evaluate import Evaluation

        name = self._get(self.config, "ckpt_path") or type(self.model).__name__
        place = free_place(self.run_dir, RESULTS, "test")
        ready = {name: self._on_device()}
        Evaluation(self.datamodule, [*self.datamodule.compared, name], place, ready=ready).run()

    def _take_part(self) -> None:
        """Make the passes of the first process, which writes the table, if it needs this one's share of the weights."""
        if is_sharded(self.model) and not isinstance(self.model, MultiTask):
            for _ in self.datamodule.batch_tables(self._on_device()):
                pass

    def _on_device(self) -> Any:
        """Return the model, ready to be asked."""
        if is_sharded(self.model):
            return self.model.eval()
        return self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def after_predict(self) -> None:
        """Say where the predictions of the test split are."""
        trainer: Any = self.trainer  # its callbacks are not declared
        for callback in trainer.callbacks:
            if isinstance(callback, PredictionTable) and self.trainer.is_global_zero:
                print(f"wrote {callback.path}")


class _SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, whatever the logger."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the configuration once."""
        if stage == "fit" and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            # Not what this part goes on from: the file describes the whole run, and whoever runs it again starts anew.
            whole = self.config.clone()
            whole.ckpt_path = None
            with atomic(folder / "config.yaml") as file:
                self.parser.save(whole, file, skip_unset=False, multifile=False)


def prepare() -> None:
    """Silence what is expected, and let large matrix products be fast: as every command that trains runs."""
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{expected}")
    for noisy in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")


def run(args: list[str]) -> None:
    """Run one of Lightning's commands."""
    prepare()
    CLI(args)

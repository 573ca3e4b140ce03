"""The configuration of a run in TensorBoard: as text, and as hyper-parameters beside its metrics."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from callbacks.events import writer_of

PARTS = ("seed_everything", "model", "data", "trainer")
"""Of a configuration, what can make two runs differ in their results."""


class HyperParameters(Callback):
    """Lets TensorBoard's HParams tab compare runs, and its text tab show the configuration.

    Metrics of the tab are the last values of all scalars of a run; so a run that was interrupted is there too, and
    runs of different tasks may lie in one folder. No list of hyper-parameters or metrics is written, as TensorBoard
    would take that of one run for all of them.

    Args:
        config: The configuration, nested; leaves are what YAML holds.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration."""
        writer = writer_of(trainer)
        if writer is None:
            return
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))  # Markdown: as it stands
        info = plugin_data_pb2.SessionStartInfo()
        for name, value in flatten({name: self.config[name] for name in PARTS if name in self.config}):
            kind = "bool_value" if isinstance(value, bool) else "string_value"
            kind = "number_value" if isinstance(value, int | float) and not isinstance(value, bool) else kind
            setattr(info.hparams[name], kind, value)
        content = plugin_data_pb2.HParamsPluginData(session_start_info=info)
        _write(writer, metadata.SESSION_START_INFO_TAG, content)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run has ended well."""
        self._end(trainer, api_pb2.STATUS_SUCCESS)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say that it has not."""
        self._end(trainer, api_pb2.STATUS_FAILURE)

    def _end(self, trainer: Trainer, status: Any) -> None:
        writer = writer_of(trainer)
        if writer is not None:
            info = plugin_data_pb2.SessionEndInfo(status=status)
            _write(writer, metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=info))
            writer.flush()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Give the leaves of a configuration by dotted names: without ``init_args``, and a class by its own short name.

    Lists are written as text; empty values are left out.
    """
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        elif key == "class_path":
            yield prefix, str(value).rpartition(".")[2]
        elif value is not None:
            yield name, value if isinstance(value, bool | int | float) else str(value)


def _write(writer: Any, tag: str, content: Any) -> None:
    summary = Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content))])
    writer._get_file_writer().add_summary(summary)

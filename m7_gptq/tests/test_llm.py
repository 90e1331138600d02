"""What the model of this stage says of itself."""

import pytest

from m7_gptq import LLM


def test_random_weights_are_said_to_be_quantised(tmp_path):
    pytest.importorskip("transformers")
    from folovllm.testing.toy_models import ToyFamily, write_toy_model

    family = ToyFamily("qwen2", "qwen2", {"hidden_size": 128, "intermediate_size": 128})
    model = write_toy_model(family, tmp_path)
    drawn = LLM(model, load_format="dummy", device="cpu").model.config.quantization
    assert drawn is not None and (drawn["quant_method"], drawn["bits"]) == ("gptq", 4)
    assert LLM(model, device="cpu").model.config.quantization is None

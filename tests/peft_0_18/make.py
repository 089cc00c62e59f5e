"""Writes the adapter in this folder, and the logits of the model with it, with the PEFT release that it is from.

PEFT 0.18 laid adapters of experts out the other way round. With 2F = D the shapes do not tell the two layouts apart.
PEFT and PyTorch are not those of the project, so this runs in an environment of its own:

    python -m venv old && old/bin/pip install peft==0.18.1 torch==2.13.0 transformers==5.23.0 ml_dtypes
    old/bin/python -m tests.peft_0_18.make
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from peers.make_checkpoint import TINY, make_checkpoint

FOLDER = pathlib.Path(__file__).parent
CONFIG: Qwen3MoeConfig = TINY.replace(num_hidden_layers=2, moe_intermediate_size=TINY.hidden_size // 2)
INPUT_IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 12))


def main() -> None:
    """Writes `adapter/` and `logits.npy`."""
    import peft
    import torch
    import transformers

    assert peft.__version__ == "0.18.1", peft.__version__
    with tempfile.TemporaryDirectory() as base:
        make_checkpoint(pathlib.Path(base) / "base", CONFIG)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            pathlib.Path(base) / "base", dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        logits = model(torch.from_numpy(INPUT_IDS)).logits
    model.peft_config["default"].base_model_name_or_path = "peers.make_checkpoint"
    model.save_pretrained(str(FOLDER / "adapter"))
    (FOLDER / "adapter" / "README.md").unlink(missing_ok=True)
    np.save(FOLDER / "logits.npy", logits.numpy())


if __name__ == "__main__":
    main()

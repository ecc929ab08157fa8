"""Reward models as modules with one shape: token ids in, outputs out.

N texts, S tokens of the longest (right-padded), L labels, K members.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from klippo.hub import load_config, load_model

STACKED_ELEMENTS = 2**15
"""Tokens times width, up to which members run faster stacked than in turn on a CPU: beyond it the
arithmetic takes the time and not the calls (benchmarks/ensemble_scoring.py)."""


class LastTokenScorer(nn.Module):
    """A causal trunk and a linear head on its last real token, found from the text's length.

    transformers' own forward looks for the last token that is not the padding token, and so skips
    an end-of-sequence token wherever the two are one.
    """

    def __init__(self, trunk: Any, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Outputs (N, L) float32 from ids (N, S) and mask (N, S) int64."""
        hidden = self.trunk(
            input_ids=input_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        outputs: Tensor = self.head(hidden[rows, mask.sum(1) - 1])
        return outputs.float()


class WholeModelScorer(nn.Module):
    """Any sequence classifier through its own forward (encoders, mostly)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Outputs (N, L) float32 from ids (N, S) and mask (N, S) int64."""
        outputs: Tensor = self.model(input_ids=input_ids, attention_mask=mask).logits
        return outputs.float()


class LoadedScorer(NamedTuple):
    """A frozen reward model, dropout off."""

    module: nn.Module
    model: Any
    """The Hugging Face model, with its config."""
    template: str | None
    """The text format that belongs to the model's class; None if absent."""


def load_scorer(name: str, revision: str | None = None, dtype: str = "float32") -> LoadedScorer:
    """The reward model of a folder or hub name, whichever published class it has.

    Raises PreflightError when it cannot be loaded or lacks weights.
    """
    from transformers import AutoModelForSequenceClassification

    from klippo.rewards import published

    kind = published.KINDS.get(str(load_config(name, revision).get("model_type")))
    auto_class = AutoModelForSequenceClassification if kind is None else kind.model_class
    model = load_model(auto_class, name, revision, dtype=getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    scorer: nn.Module = WholeModelScorer(model)
    if kind is not None:
        scorer = LastTokenScorer(*kind.parts(model))
    elif isinstance(getattr(model, "score", None), nn.Linear):
        scorer = LastTokenScorer(model.base_model, model.score)
    return LoadedScorer(scorer.eval(), model, None if kind is None else kind.template)


class Stack:
    """Members of one architecture as one batched forward, over weights stacked on a new axis.

    Where the arithmetic outweighs the calls (long batches of wide models on a CPU) the members run
    in turn on the same weights instead; the shapes alone decide, so a run is repeatable.
    """

    def __init__(self, members: Sequence[nn.Module], width: int) -> None:
        """`members` must agree in everything but the numbers in their weights."""
        self.members = list(members)
        self._width = width
        self._vmapped = self._share_weights() if len(members) > 1 else None

    def __call__(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Outputs (K, N, L) float32 from ids (N, S) and mask (N, S) int64."""
        small = input_ids.numel() * self._width <= STACKED_ELEMENTS
        if self._vmapped is not None and (small or input_ids.device.type == "cuda"):
            outputs: Tensor = self._vmapped(self._parameters, self._buffers, input_ids, mask)
            return outputs
        return torch.stack([member(input_ids, mask) for member in self.members])

    def _share_weights(self) -> Any:
        """Stack the weights, and let the members use views of the stack: nothing is there twice.

        Returns the batched forward; None for an architecture that vmap cannot trace.
        """
        self._parameters, self._buffers = torch.func.stack_module_state(self.members)
        skeleton = copy.deepcopy(self.members[0]).to("meta")
        for module in skeleton.children():
            choose_attention = getattr(module, "set_attn_implementation", None)
            if callable(choose_attention):
                choose_attention("eager")  # vmap runs fused attention row by row

        def forward(parameters: Any, buffers: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
            outputs: Tensor = torch.func.functional_call(
                skeleton, (parameters, buffers), (input_ids, mask)
            )
            return outputs

        for stack in (self._parameters, self._buffers):
            for name, stacked in stack.items():
                for k, member in enumerate(self.members):
                    holder, _, leaf = name.rpartition(".")
                    getattr(member.get_submodule(holder), leaf).data = stacked[k]
        vmapped = torch.vmap(forward, in_dims=(0, 0, None, None))
        device = next(iter(self._parameters.values())).device
        ids = torch.zeros(2, 2, dtype=torch.long, device=device)
        mask = torch.tensor([[1, 1], [1, 0]], device=device)
        try:
            with torch.no_grad():
                vmapped(self._parameters, self._buffers, ids, mask)
        except (RuntimeError, ValueError, NotImplementedError):
            return None
        return vmapped


def architecture(loaded: LoadedScorer) -> str:
    """Equal for models that differ in the numbers of their weights alone."""
    config = loaded.model.config.to_dict()
    for key in ("_name_or_path", "name_or_path", "transformers_version"):
        config.pop(key, None)
    shapes = [(n, tuple(p.shape), str(p.dtype)) for n, p in loaded.module.named_parameters()]
    return json.dumps([type(loaded.module).__name__, config, shapes], default=str, sort_keys=True)

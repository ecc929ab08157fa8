"""Held-out prompts of a run, as a model reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import load_rows
from klippo.data.settings import DataSettings
from klippo.lengths import room_for_prompts
from klippo.runs.models import OpenModel
from klippo.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows that the run did not train on, or all rows if it held none out."""

    rows: Sequence[Row]
    data: DataSettings

    def prompts(
        self,
        opened: OpenModel,
        max_tokens: int,
        seed: int,
        among: Collection[int] | None = None,
    ) -> list[Prompt]:
        """The prompts of all rows, or of those with numbers in `among`, as the model reads them."""
        room = room_for_prompts(opened.model, max_tokens, self.data.max_prompt_tokens)
        return build_prompts(
            [row for row in self.rows if among is None or row.number in among],
            self.data,
            opened.tokenizer,
            max_prompt_tokens=room,
            seed=seed,
        )


def held_out(data: DataSettings, data_seed: int) -> HeldOut:
    """The rows; `data_seed` held them out when the run trained."""
    rows, kept = load_rows(data, data_seed)
    return HeldOut(rows=kept or rows, data=data)


def own_prompts(data: DataSettings, source: str) -> DataSettings:
    """All prompts of another file or data set, read in the same way."""
    every = {"train": source, "subset": None, "split": "train"}
    return data.model_copy(update=every | {"validation": None, "validation_size": 0})

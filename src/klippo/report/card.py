"""A model card for the policy of a run: what it is, what it learnt, how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator

from klippo.report.content import RunView, num_steps_done, reward_words
from klippo.report.offline import is_offline
from klippo.report.tables import escape_markdown as esc

CARD_FILE = "MODEL_CARD.md"
START, END = "<!-- klippo: figures, written anew by klippo report -->", "<!-- klippo: end -->"


def card(view: RunView, existing: str | None = None) -> str | None:
    """The whole card, or the existing one with its figures written anew.

    None where a card stands there whose marks are gone: it is the user's now.
    """
    if existing is None:
        return "\n".join([*_head(view), START, *_figures(view), END, *_tail(view)]) + "\n"
    before, start, rest = existing.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        return None
    return before + "\n".join([START, *_figures(view), END]) + after


def _head(view: RunView) -> Iterator[str]:
    run = view.data
    policy, proxy = str(run.config.get("policy.model", "unknown")), reward_words(run, "reward")
    yield f"# {esc(run.label)}"
    yield ""
    yield "License: *to be filled in; that of the base model and of the data binds this model too*"
    yield ""
    aim = f"with PPO ({num_steps_done(run):,} steps) to score high under {esc(proxy)}"
    if is_offline(run):
        source = esc(str(run.config.get("data.train", "a file")))
        aim = (
            f"with offline PPO ({num_steps_done(run):,} steps) on the scored responses in {source}"
        )
    yield f"A causal language model: {esc(policy)}, trained {aim}."
    yield ""
    yield "## Use"
    yield ""
    yield "*To be filled in: what it is for, and what it must not be used for.*"
    yield ""


def _figures(view: RunView) -> Iterator[str]:
    facts = dict(view.facts)
    yield ""
    yield "## Training"
    yield ""
    for name, value in facts.items():
        yield f"- {name}: {esc(value)}"
    yield ""
    yield "## Did it get better?"
    yield ""
    yield f"**{view.verdict.outcome[0].upper()}{view.verdict.outcome[1:]}.** {esc(view.reason)}"
    yield ""
    if view.key_figures:
        yield "| mean per response | before | after | change (95% interval) | in sd of before |"
        yield "|---|--:|--:|--:|--:|"
        for row in view.key_figures:
            yield "| " + " | ".join(map(esc, row)) + " |"
        yield ""
    lines = [f"Health check {r.name} ({r.steps}; {r.did}): {r.diagnosis}" for r in view.checks]
    for line in [*lines, *view.notes]:
        yield f"- {esc(line)}"
    if lines or view.notes:
        yield ""
    yield from _limits(view)


def _limits(view: RunView) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- The proxy is what the policy was trained to please; a higher proxy alone says nothing."
    if view.data.has_gold:
        yield "- Gold is a model too: it never trained the policy, but it can be wrong and fooled."
    else:
        yield "- No second opinion (gold) was asked, so nothing here says that the model is better."
    yield "- The figures hold for the evaluated prompts and one sample of each, drawn by one seed."
    yield "- PPO keeps what the base model knew, harmful parts included."
    yield ""


def _tail(view: RunView) -> Iterator[str]:
    adapter = view.data.config.get("policy.tuning") == "lora"
    yield ""
    yield "## How to load it"
    yield ""
    yield "```python"
    if adapter:
        yield "from peft import AutoPeftModelForCausalLM"
        yield "from transformers import AutoTokenizer"
        yield ""
        yield 'model = AutoPeftModelForCausalLM.from_pretrained("model")  # this folder\'s model/'
    else:
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield 'model = AutoModelForCausalLM.from_pretrained("model")  # this folder\'s model/'
    yield 'tokenizer = AutoTokenizer.from_pretrained("model")'
    yield "```"

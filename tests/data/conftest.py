"""Tiny tokenizers, trained here on a few sentences."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The film was long and the music was loud.",
    "A quiet story about a river and the people who live by it.",
    "I liked the second half, but the first one made me sleep!",
    "user assistant system: tell me about cats and dogs, please?",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(*, adds_bos: bool, adds_eos: bool = False, chat: bool = False):
    """A byte-level BPE tokenizer with <s>, </s> and Open-Assistant's tokens.

    `adds_*` says what it adds to a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|prompter|>", "<|assistant|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' * adds_bos}$A{' </s>' * adds_eos}",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


@pytest.fixture(scope="session")
def plain():
    """Adds nothing to a text, as GPT-2's."""
    return make_tokenizer(adds_bos=False)


@pytest.fixture(scope="session")
def with_bos():
    """Adds a BOS token to a text, as Llama's."""
    return make_tokenizer(adds_bos=True)


@pytest.fixture(scope="session")
def with_chat():
    """Adds a BOS token to a text, and its chat template writes one too, as Llama 3's."""
    return make_tokenizer(adds_bos=True, chat=True)

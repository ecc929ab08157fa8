"""Tiny classifiers with tokenizers of their own, and rollouts made by hand."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from klippo.types import Prompt, Rollout, TokenBatch

SENTENCES = [
    "The film was long and the music was loud.",
    "A quiet story about a river and the people who live by it.",
    "I liked the second half, but the first one made me sleep!",
]
VOCAB_SIZE = 320
CONTEXT = 60
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
)


def make_tokenizer(special, *, before="", after="", vocab_size=VOCAB_SIZE, **names):
    """A byte-level BPE tokenizer that puts the special tokens `before` and `after` every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(),
        special_tokens=[(token, i) for i, token in enumerate(special)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def gpt2(folder, *, pad="none", num_labels=1, **config):
    """A causal classifier whose one special token is BOS, EOS and, with `pad="eos"`, padding."""
    end = "<|endoftext|>"
    names = {"pad_token": end} if pad == "eos" else {}
    tokenizer = make_tokenizer([end], bos_token=end, eos_token=end, **names)
    model = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2,
            num_labels=num_labels, pad_token_id=0 if pad == "eos" else None,
            bos_token_id=0, eos_token_id=0, initializer_range=0.3, **config,
        )
    )  # fmt: skip
    return save(folder, model, tokenizer)


def llama(folder, *, num_labels=1, chat=False):
    """A causal classifier whose tokenizer adds a BOS token."""
    tokenizer = make_tokenizer(
        ["<s>", "</s>"], before="<s>", vocab_size=300, bos_token="<s>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=300, max_position_embeddings=CONTEXT, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_labels=num_labels,
            bos_token_id=0, eos_token_id=1, initializer_range=0.3,
        )
    )  # fmt: skip
    return save(folder, model, tokenizer)


def roberta(folder, *, labels=("NEGATIVE", "POSITIVE"), **config):
    """An encoder whose tokenizer adds <s> and </s>."""
    tokenizer = make_tokenizer(
        ["<s>", "<pad>", "</s>"], before="<s>", after="</s>", vocab_size=310, bos_token="<s>",
        cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=310, max_position_embeddings=CONTEXT + 2, hidden_size=16,
            intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)}, initializer_range=0.3, **config,
        )
    )  # fmt: skip
    return save(folder, model, tokenizer)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> folder of a saved classifier."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("classifiers")
    return {
        "gpt2": gpt2(root / "gpt2"),
        "gpt2 pad=eos": gpt2(root / "gpt2_eos", pad="eos"),
        "llama": llama(root / "llama"),
        "llama chat": llama(root / "llama_chat", chat=True, num_labels=2),
        "roberta": roberta(root / "roberta"),
        "roberta one": roberta(root / "roberta_one", labels=("SCORE",)),
        "roberta multi": roberta(
            root / "roberta_multi",
            labels=("toxic", "rude", "threat"),
            problem_type="multi_label_classification",
        ),
    }


def make_rollout(responses, *, prompts=None, token_ids=None, metas=None):
    """A rollout with these decoded responses; token ids are counted up where none are given."""
    prompts = [f"prompt {i}" for i in range(len(responses))] if prompts is None else prompts
    metas = [{} for _ in responses] if metas is None else metas
    token_ids = token_ids or [list(range(1, 3 + i)) for i in range(len(responses))]
    width = max(len(ids) for ids in token_ids)
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in token_ids])
    mask = torch.arange(width) < torch.tensor([len(ids) for ids in token_ids])[:, None]
    ones = torch.ones(len(responses), 1, dtype=torch.long)
    return Rollout(
        prompts=[
            Prompt(id=i, text=text, token_ids=[1], meta=meta)
            for i, (text, meta) in enumerate(zip(prompts, metas, strict=True))
        ],
        responses=list(responses),
        tokens=TokenBatch(
            prompt_ids=ones, prompt_mask=ones.bool(), response_ids=padded, response_mask=mask
        ),
        finished=torch.ones(len(responses), dtype=torch.bool),
        temperature=1.0,
    )

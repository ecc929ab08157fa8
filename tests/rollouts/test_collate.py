"""From sampled ids to tensors, without going through text."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from klippo.errors import ConfigError
from klippo.rollouts.collate import collate, left_pad, stop_token_ids, truncate_after_stop
from klippo.types import Completion
from tests.toys import CPU, EOS, RAGGED, make_rollout, prompt

STOPS = frozenset({0, 9})


@pytest.mark.parametrize(
    ("ids", "kept", "finished"),
    [
        ([0, 5, 6], [0], True),  # at once
        ([5, 6, 0], [5, 6, 0], True),  # at the very end
        ([5, 6, 7], [5, 6, 7], False),  # never
        ([5, 9, 0, 9], [5, 9], True),  # the first of several, of a set of stops
        ([5, 5, 9, 9], [5, 5, 9], True),
        ([7], [7], False),
        ([9], [9], True),
    ],
)
def test_a_response_ends_with_its_first_stop_token(ids, kept, finished):
    assert truncate_after_stop(ids, STOPS) == Completion(token_ids=kept, finished=finished)


def test_without_stop_tokens_nothing_is_cut():
    ids = [0, 9, 3]
    assert truncate_after_stop(ids, frozenset()) == Completion(token_ids=ids, finished=False)


def tokenizer():
    """Tokens a, b, ab and <end>: the ids [a, b] read "ab", which encodes to the one token ab."""
    inner = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def test_stored_ids_are_the_sampled_ones_even_where_text_would_lose_them():
    ids = [[1, 2, 1, 2, 0], [3, 0, 1], [0]]
    completions = [Completion(token_ids=row, finished=False) for row in ids]
    text = tokenizer()
    rollout = collate([prompt(1)] * 3, completions, text, temperature=1.0, device=CPU)
    assert rollout.response_token_ids() == ids
    assert rollout.responses == ["abab", "aba", ""]
    assert text.encode("abab") == [3, 3], "the trap: text does not encode to what was sampled"


def test_masks_come_from_lengths_when_the_pad_token_is_eos():
    rows = [([EOS, 4, EOS], [EOS]), ([7], [5, EOS, 3]), ([EOS, EOS], [2, 2])]
    tokens = make_rollout(rows).tokens
    assert tokens.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert tokens.response_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    for i, (prompt_ids, response_ids) in enumerate(rows):
        assert tokens.prompt_ids[i][tokens.prompt_mask[i]].tolist() == prompt_ids
        assert tokens.response_ids[i][tokens.response_mask[i]].tolist() == response_ids


def test_the_real_prompt_stands_on_the_right_and_the_real_response_on_the_left():
    ids, mask = left_pad([[5, 6, 7], [8]], CPU)
    assert ids[1].tolist() == [0, 0, 8]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_rows_are_trimmed_to_their_own_longest_prompt_and_response():
    tokens = make_rollout(RAGGED).tokens
    for wanted in ([1], [0, 3], [2, 0], [3, 1, 2, 0]):
        part = tokens.rows(torch.tensor(wanted))
        assert part.prompt_ids.shape == (len(wanted), max(len(RAGGED[i][0]) for i in wanted))
        assert part.response_ids.shape == (len(wanted), max(len(RAGGED[i][1]) for i in wanted))
        for row, i in enumerate(wanted):
            assert part.prompt_ids[row][part.prompt_mask[row]].tolist() == RAGGED[i][0]
            assert part.response_ids[row][part.response_mask[row]].tolist() == RAGGED[i][1]


def test_a_sampled_stop_decides_whether_a_response_finished_not_an_eos_in_its_prompt():
    rollout = make_rollout([([EOS, 3, EOS], [4, 5]), ([3], [4, EOS])])
    assert rollout.finished.tolist() == [False, True]


def test_the_engines_log_probs_are_kept_or_absent_as_a_whole():
    rollout = make_rollout([([1], [4, 5]), ([3], [4])], logprobs=[[-0.5, -1.5], [-2.5]])
    assert rollout.behavior_logprobs.tolist() == [[-0.5, -1.5], [-2.5, 0.0]]
    assert make_rollout(RAGGED).behavior_logprobs is None


def test_stop_tokens_are_a_set_from_tokenizer_model_and_settings():
    text = tokenizer()
    of_model = SimpleNamespace(eos_token_id=[5, 7])
    assert stop_token_ids(text, of_model, at_eos=True, extra=["ab", 11]) == {0, 5, 7, 3, 11}
    assert stop_token_ids(text, SimpleNamespace(eos_token_id=4), at_eos=True, extra=()) == {0, 4}
    assert stop_token_ids(text, SimpleNamespace(eos_token_id=None), at_eos=True, extra=()) == {0}
    assert stop_token_ids(text, of_model, at_eos=False, extra=[2]) == {2}
    with pytest.raises(ConfigError, match=r"'aba' is 2 tokens .* must be one"):
        stop_token_ids(text, None, at_eos=True, extra=["aba"])


def test_prompts_and_responses_of_one_token_are_the_smallest_batch():
    tokens = make_rollout([([4], [2])]).tokens
    assert tokens.prompt_ids.shape == tokens.response_ids.shape == (1, 1)

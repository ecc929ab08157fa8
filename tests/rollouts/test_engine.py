"""The Hugging Face engine samples from the very policy that is trained."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest, norm

from klippo.config.schema import RunConfig
from klippo.ranks import Ranks
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling, draw, draw_limits, response_seeds, truncate, uniforms
from klippo.rollouts.settings import RolloutSettings
from klippo.rollouts.sources import OnlineSource, Sampler
from klippo.tensors.estimators import k1, masked_sum
from tests.policy.test_logprobs import UNUSUAL_HEADS
from tests.tolerance import FLOAT64, NoFloat32
from tests.toys import (
    CPU,
    EOS,
    FAMILIES,
    NO_TOKENIZER,
    RAGGED,
    VOCABULARY,
    dense_logprobs,
    disturb,
    gpt2,
    llama,
    load,
    prompt,
)

PROMPTS = [prompt(*ids, id=i) for i, (ids, _) in enumerate(RAGGED)]
GREEDY = Sampling(temperature=0.0)


def seeds(num, seed=0):
    return response_seeds(seed, range(num))


def engine(model, sampling=Sampling(), stops=(), **options):  # noqa: B008
    return HFEngine(model, stop_ids=frozenset(stops), sampling=sampling, **options)


def online(sampler, settings, prompts=PROMPTS, **options):
    options = {"seed": 0} | options
    responses = Sampler(engine=sampler, tokenizer=NO_TOKENIZER, settings=settings, device=CPU)
    return OnlineSource(responses, lambda: prompts, **options)


def greedy_by_hand(model, prompt_ids, limit, stops):
    """The most likely continuation, one full forward pass per token."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(limit):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("architecture", UNUSUAL_HEADS)
def test_greedy_decoding_of_a_ragged_batch_is_that_of_each_prompt_alone(architecture):
    # left padding, cache, rows that leave, several stop tokens, own limits
    torch.manual_seed(1)
    model = UNUSUAL_HEADS[architecture]().eval()
    limits = [9, 4, 12, 1]
    free = [greedy_by_hand(model, p.token_ids, n, ()) for p, n in zip(PROMPTS, limits, strict=True)]
    stops = {free[0][3], free[2][-2]}
    completions = engine(model, GREEDY, stops).generate(PROMPTS, limits, seeds(4))
    for one, limit, completion in zip(PROMPTS, limits, completions, strict=True):
        expected = greedy_by_hand(model, one.token_ids, limit, stops)
        assert completion.token_ids == expected
        assert completion.finished is (expected[-1] in stops)
    assert any(c.finished for c in completions)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_hugging_faces_generate_with_left_padding(family):
    model = FAMILIES[family]()
    width = max(len(p.token_ids) for p in PROMPTS)
    pads = [width - len(p.token_ids) for p in PROMPTS]
    ids = torch.tensor([[7] * pad + p.token_ids for pad, p in zip(pads, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    theirs = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=None,
        pad_token_id=7,
    )[:, width:]  # fmt: skip
    ours = engine(model, GREEDY).generate(PROMPTS, [8] * len(PROMPTS), seeds(len(PROMPTS)))
    assert [c.token_ids for c in ours] == theirs.tolist()


def test_finished_rows_leave_the_batch():  # a short response costs its own tokens alone
    model = gpt2()
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    limits = [1, 5, 2, 3]
    engine(model).generate(PROMPTS, limits, seeds(4))
    assert rows == [4, 3, 2, 1, 1]
    rows.clear()
    completions = engine(model, stops=range(0, VOCABULARY, 2)).generate(PROMPTS, [12] * 4, seeds(4))
    lengths = [len(c.token_ids) for c in completions]
    assert rows == [sum(length > t for length in lengths) for t in range(max(lengths))]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_completions_come_back_in_the_order_of_the_prompts(batch_size):
    model, limits = llama(), [3, 5, 2, 4]
    completions = engine(model, GREEDY, batch_size=batch_size).generate(PROMPTS, limits, seeds(4))
    for one, limit, completion in zip(PROMPTS, limits, completions, strict=True):
        assert completion.token_ids == greedy_by_hand(model, one.token_ids, limit, ())


def test_every_response_keeps_its_own_random_limit():
    limits = draw_limits([2, 6], seeds(300))
    assert set(limits) == {2, 3, 4, 5, 6}
    assert draw_limits(7, seeds(3)) == [7, 7, 7]
    many = PROMPTS * 10
    limits = limits[: len(many)]
    completions = engine(gpt2(), stops=[EOS]).generate(many, limits, seeds(len(many)))
    for limit, completion in zip(limits, completions, strict=True):
        assert 1 <= len(completion.token_ids) <= limit
        assert EOS not in completion.token_ids[:-1]
        assert completion.finished is (completion.token_ids[-1] == EOS)
        assert completion.finished or len(completion.token_ids) == limit


@pytest.mark.parametrize("architecture", UNUSUAL_HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_are_those_of_the_training_forward(architecture, temperature):
    # Gemma 2 slides its window past the cache
    torch.manual_seed(2)
    model = UNUSUAL_HEADS[architecture]().double().eval()
    policy = load(model).policy
    sampler = engine(
        policy.lm.model, Sampling(temperature=temperature), [EOS], record_logprobs=True
    )
    with torch.no_grad(), NoFloat32():
        completions = sampler.generate(PROMPTS * 3, [14, 6, 9, 3] * 3, seeds(12))
        rollout = collate(
            PROMPTS * 3, completions, NO_TOKENIZER, temperature=temperature, device=CPU
        )
        trained = policy(rollout.tokens, temperature).logprobs
    torch.testing.assert_close(rollout.behavior_logprobs, trained, **FLOAT64)
    assert rollout.response_token_ids() == [c.token_ids for c in completions]


def test_lora_policies_are_sampled_with_their_adapter():
    policy = load(llama(), tuning="lora").policy
    disturb(policy.trainable()[0], scale=0.4)
    sampler = engine(policy.lm.model, record_logprobs=True)
    with torch.no_grad(), NoFloat32():
        completions = sampler.generate(PROMPTS, [6] * 4, seeds(4))
        rollout = collate(PROMPTS, completions, NO_TOKENIZER, temperature=1.0, device=CPU)
        trained = policy(rollout.tokens, 1.0).logprobs
    torch.testing.assert_close(rollout.behavior_logprobs, trained, **FLOAT64)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_frequencies_are_the_tempered_softmax(temperature):
    model, number = gpt2(), 4000
    sampled = engine(model, Sampling(temperature=temperature)).generate(
        [PROMPTS[0]] * number, [1] * number, seeds(number)
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in sampled]), minlength=VOCABULARY)
    with torch.no_grad():
        logp = dense_logprobs(model, PROMPTS[0].token_ids, [0], temperature)[0]
    expected = logp.double().exp() * number
    common = expected >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    scale = sum(observed) / sum(wanted)
    assert chisquare(observed, [w * scale for w in wanted]).pvalue > 1e-3


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((2000, 4), -math.inf, dtype=torch.float64)
    logits[:, 1:3] = 0.0
    drawn, logprobs = draw(logits, Sampling(), uniforms(seeds(2000), 1)[:, 0])
    assert set(drawn.tolist()) == {1, 2}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(2)))


def test_the_smallest_random_number_draws_the_first_possible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0], [0.0, -math.inf, 0.0]])
    assert draw(logits, Sampling(), torch.zeros(2).double())[0].tolist() == [1, 0]


def test_the_same_seed_draws_the_same_responses():
    first, again, other = (
        engine(gpt2()).generate(PROMPTS, [8] * 4, seeds(4, seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_a_response_follows_from_its_seed_whatever_is_sampled_beside_it(batch_size):
    model, limits, own = llama(), [9, 4, 12, 5], seeds(4)
    sampler = engine(model, stops=[EOS], batch_size=batch_size)
    together = sampler.generate(PROMPTS, limits, own)
    for order in ([2], [3, 0], [1, 3, 2, 0]):
        part = sampler.generate(
            [PROMPTS[i] for i in order], [limits[i] for i in order], [own[i] for i in order]
        )
        assert part == [together[i] for i in order]
    assert together == engine(model, stops=[EOS]).generate(PROMPTS, limits, own)


def test_random_numbers_are_uniform_and_differ_between_responses_and_tokens():
    numbers = uniforms(seeds(200), 50)
    assert numbers.dtype == torch.float64
    assert len(numbers.unique()) == 200 * 50
    assert kstest(numbers.flatten(), "uniform").pvalue > 1e-3
    assert torch.equal(numbers[:, :7], uniforms(seeds(200), 7)), "a longer limit changes nothing"


def test_several_processes_sample_what_one_samples():
    settings = RolloutSettings(response_length=[2, 9])
    alone = online(engine(gpt2(), stops=[EOS]), settings)
    shares = [
        online(engine(gpt2(), stops=[EOS]), settings, PROMPTS[2 * rank :][:2], ranks=Ranks(rank, 2))
        for rank in (0, 1)
    ]
    for _ in range(3):
        expected = alone.next().response_token_ids()
        parts = [share.next().response_token_ids() for share in shares]
        assert [row for part in parts for row in part] == expected
    assert alone.state_dict() == shares[1].state_dict() == {"num_drawn": 12}


def test_sampling_goes_on_from_a_count():
    settings = RolloutSettings(response_length=[2, 9])
    first, second = (online(engine(gpt2()), settings) for _ in range(2))
    first.next()
    second.load_state_dict(first.state_dict())
    assert first.next().response_token_ids() == second.next().response_token_ids()


def flatten(policy):
    """Halve the logits: the policy becomes less certain than its reference."""
    with torch.no_grad():
        policy.lm.trunk.ln_f.weight *= 0.5
        policy.lm.trunk.ln_f.bias *= 0.5


def sequence_kl(change, sampling):
    """k1 and exact KL per sequence of sampled responses, (B,) each, after a change."""
    loaded = load(gpt2())
    change(loaded.policy)
    settings = RolloutSettings(response_length=[4, 8], temperature=0.8)
    sampler = engine(loaded.policy.lm.model, sampling, [EOS])
    rollout = online(sampler, settings, PROMPTS * 100, seed=6).next()
    with torch.no_grad():
        logprobs = loaded.policy(rollout.tokens, 0.8).logprobs
    ref = loaded.reference.logprobs(rollout.tokens, 0.8)
    exact = loaded.reference.kl_from(loaded.policy.lm, rollout.tokens, 0.8)
    mask = rollout.tokens.response_mask
    return masked_sum(k1(logprobs, ref), mask, 1), masked_sum(exact, mask, 1)


def mean_and_error(x):
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("change", [flatten, lambda policy: disturb(policy.lm.parameters(), 0.05)])
def test_sampled_responses_do_not_farm_negative_kl(change):
    sampled, exact = sequence_kl(change, Sampling(temperature=0.8))
    mean, error = mean_and_error(sampled)
    assert mean > -3 * error
    assert float(exact.mean()) > 0.01
    gap, error = mean_and_error(sampled - exact)
    assert abs(gap) < norm.isf(0.0005) * error, "k1 and the exact sum estimate the same KL"
    assert float(exact.std()) < float(sampled.std()), "the exact sum has the lower variance"


def test_truncated_sampling_would_farm_negative_kl():  # why it is refused
    mean, error = mean_and_error(sequence_kl(flatten, Sampling(temperature=0.8, top_k=2))[0])
    assert mean < -3 * error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 50}, "rollout.top_k=50: training needs 0, because log-probs"),
        ({"top_p": 0.9}, "rollout.top_p=0.9: training needs 1, because log-probs"),
        ({"min_response_length": 4}, "negative KL; for longer responses add a `length` reward"),
    ],
)
def test_truncated_sampling_is_refused_with_its_reason(setting, message):
    with pytest.raises(ValueError, match="untruncated policy") as refusal:
        RunConfig(
            policy={"model": "toy"}, data={"train": "toy"},
            reward={"kind": "function", "function": "toy:score"}, rollout=setting,
        )  # fmt: skip
    assert message in str(refusal.value)


def test_top_k_and_top_p_keep_what_their_names_say():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    logits = probabilities.log()

    def kept(sampling):
        return truncate(logits, sampling)[0].isfinite().tolist()

    assert kept(Sampling(top_k=1)) == [True, False, False, False]
    assert kept(Sampling(top_k=3)) == [True, True, True, False]
    assert kept(Sampling(top_p=0.7)) == [True, True, False, False]
    assert kept(Sampling()) == [True] * 4
    half = truncate(logits, Sampling(temperature=2.0)).softmax(-1)
    torch.testing.assert_close(half, (probabilities.sqrt() / probabilities.sqrt().sum()))

"""What the comparisons rest on: operations counted, models alike, time given to the right phase."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = (
    "engines",
    "ensemble_scoring",
    "growth",
    "klippo_ppo",
    "lean_passes",
    "lean_update",
    "memory_estimate",
    "ppo_vs_trl",
    "trl_ppo",
    "update_floor",
    "w3",
)


def llama(vocabulary=100):
    import workload as shared
    from workload import Shape, Workload

    shape = Shape(
        kind="llama", num_layers=2, width=16, num_heads=4, context=64, vocabulary=vocabulary
    )
    return shared.build_policy(Workload(shape=shape), shared.word_tokenizer(vocabulary))


def test_operations_of_full_fine_tuning_equal_a_count_by_hand():
    from flops import Sequences, operations

    model = llama()
    sequences = Sequences(number=3, prompt_length=5, response_length=4)

    # A block: queries and output 16x16, keys and values 16x4, three of 16x56. 3 sequences of 8.
    block = 2 * 24 * (2 * 16 * 16 + 2 * 16 * 4 + 3 * 16 * 56)
    head = 2 * 12 * 16 * 100
    assert operations(sequences.policy_products(model)) == 3 * (2 * block + head)
    # Queries with keys, attention with values: 2 * 8 * 8 * 16 each, for 3 sequences in 2 layers.
    assert sequences.attention(model.config) == 3 * (2 * 2 * 3 * 8 * 8 * 16 * 2)


def test_frozen_weights_cost_two_products_and_adapters_three():
    from flops import Sequences, operations
    from peft import LoraConfig, get_peft_model

    targets = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), targets).get_base_model()
    sequences = Sequences(number=3, prompt_length=5, response_length=4)

    block = 2 * 24 * (2 * 16 * 16 + 2 * 16 * 4 + 3 * 16 * 56)
    head = 2 * 12 * 16 * 100
    adapter = 2 * 24 * (16 * 2 + 2 * 16)
    expected = 2 * (2 * block + head) + 3 * 2 * adapter
    assert operations(sequences.policy_products(model)) == expected


def test_gpt2_looks_words_and_positions_up_and_multiplies_with_neither():
    import workload as shared
    from flops import Sequences, operations
    from workload import Shape, Workload

    shape = Shape(num_layers=1, width=8, num_heads=2, context=64, vocabulary=50)
    model = shared.build_policy(Workload(shape=shape), shared.word_tokenizer(50))
    sequences = Sequences(number=2, prompt_length=3, response_length=2)

    expected = 3 * (2 * 8 * (12 * 8 * 8) + 2 * 4 * 8 * 50)  # 12 d^2 weights a block; tied head
    assert operations(sequences.policy_products(model)) == expected


def test_rate_of_products_is_positive_and_below_what_no_core_can_do():
    from flops import Product, rates

    of_processor, of_wall = rates([Product(64, 64, 64, 1, 3)], seconds=0.02)

    assert 0 < of_processor < 1e6
    assert 0 < of_wall < 1e6


def test_w3_has_the_size_of_llama_3_8b():
    import workload as shared
    from transformers import AutoModelForCausalLM

    class Words:
        bos_token_id, eos_token_id, pad_token_id = 2, 3, 0

        def __len__(self):
            return shared.W3.shape.vocabulary

    with torch.device("meta"):
        config = shared.model_config(shared.W3.shape, Words())
        model = AutoModelForCausalLM.from_config(config)

    assert shared.num_parameters(model) == 8_030_261_248  # as its checkpoint says


def test_word_tokenizer_reads_its_own_text_back():
    import workload as shared
    from workload import W1, Shape, replace

    tokenizer = shared.word_tokenizer(40)
    work = replace(W1, shape=Shape(vocabulary=40), prompt_length=7)
    texts = shared.prompts_for(work, tokenizer)

    ids = tokenizer(texts)["input_ids"]
    assert {len(one) for one in ids} == {7}
    response = [4, 39, 17]
    assert tokenizer(texts[0] + tokenizer.decode(response))["input_ids"] == ids[0] + response


def test_clock_gives_calls_without_gradients_to_their_phase_and_the_rest_to_the_update(monkeypatch):
    import trl_ppo

    time = 0.0
    monkeypatch.setattr(trl_ppo.time, "perf_counter", lambda: time)

    def lasting(seconds):
        def work(_):
            nonlocal time
            time += seconds

        return work

    clock = trl_ppo.Clock("cpu")
    sample = clock.timed(lambda _: "generate", lasting(5))
    read = clock.timed(lambda model: "score" if model == "reward" else "forward", lasting(2))
    clock.start()
    with torch.no_grad():
        sample("policy"), read("reward"), read("value")
    read("policy")  # with gradients: of the update
    lasting(1)(None)
    clock.end_update()

    assert clock.seconds == [12]
    assert dict(clock.phases) == {"generate": [5], "forward": [2], "score": [2], "update": [3]}


def test_growth_says_how_many_times_the_base_each_row_takes():
    from sections import growth

    def row(seconds, memory):
        phases = dict.fromkeys(growth.PHASES, seconds / 4)
        return {"median_s": seconds, "peak_rss_gb": memory, "phase_medians_s": phases}

    result = {
        "values": {"batch_size": [64]},
        "rounds": [
            {"base": row(1.0, 0.5), "batch_size=64": row(2.0, 0.6)},
            {"base": row(2.0, 0.5), "batch_size=64": row(3.0, 0.6)},
            {"base": row(1.0, 0.5), "batch_size=64": row(1.8, 0.6)},
        ],
    }

    base, batch = growth.rows_of(result)

    assert base == "| as above | 1.00 | 1 | 0.25 | 0.25 | 0.25 | 0.25 | 0.50 | 1 |"
    assert batch.startswith("| batch 64 | 2.00 | **1.80** (2.00, 1.50, 1.80) | 0.50 |")
    assert batch.endswith("| 0.60 | 1.20 |")


@pytest.mark.parametrize(("ratio", "verdict"), [(1.25, "met for W1"), (1.31, "met in no case")])
def test_page_says_whether_five_members_meet_the_aim(ratio, verdict):
    from sections import growth

    case = {"name": "W1", "ratios": [ratio], "one_s": [1.0], "five_s": [ratio]}
    case |= {"one_score_s": [0.1], "five_score_s": [0.4]}

    assert verdict in growth.ensemble_lines([case])[0]


def test_every_script_explains_itself():
    """All of them in one process: a start of Python with PyTorch for each would take a minute."""
    code = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
    else:
        raise AssertionError(f"{name} did not stop at --help")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *SCRIPTS], cwd=BENCHMARKS, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage:") == len(SCRIPTS)

"""TRL's arm: its last release with PPO (1.12.0) on the shared workload; prints one JSON line.

    python benchmarks/trl_ppo.py --updates 4

TRL is looked for in build/trl112, where ppo_vs_trl.py puts it without touching the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import workload as shared  # noqa: E402
from prepare_smollm import BUILD, SMOLLM  # noqa: E402
from workload import W1, Workload  # noqa: E402

TRL_VERSION = "1.12.0"
TRL_FOLDER = BUILD / "trl112"


def run(workload: Workload, tokenizer_folder: Path, *, updates: int) -> dict[str, Any]:
    """Train `updates` PPO steps."""
    sys.path.insert(0, str(TRL_FOLDER))
    import trl
    from datasets import Dataset
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if trl.__version__ != TRL_VERSION:
        sys.exit(f"this arm needs trl=={TRL_VERSION}, and found {trl.__version__}")
    torch.set_num_threads(workload.num_threads)
    tokenizer = shared.load_tokenizer(tokenizer_folder)
    policy = shared.build_policy(workload, tokenizer)
    reference = shared.build_policy(workload, tokenizer)
    reward_model = shared.build_scorer(workload, tokenizer, seed=1)
    value_model = shared.build_scorer(workload, tokenizer, seed=2)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in shared.prompts()]

    stamps: list[float] = []
    generation_seconds: list[float] = []
    lengths: set[int] = set()
    num_optimizer_steps = 0

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    def count_step(*_: Any) -> None:
        nonlocal num_optimizer_steps
        num_optimizer_steps += 1

    plain_generation = ppo_trainer.batch_generation

    def timed_generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        start = time.perf_counter()
        generated, logits = plain_generation(model, queries, *rest)
        generation_seconds.append(time.perf_counter() - start)
        lengths.add(generated.shape[1] - queries.shape[1])
        return generated, logits

    ppo_trainer.batch_generation = timed_generation
    register_optimizer_step_post_hook(count_step)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PPOTrainer(
            args=settings(PPOConfig, workload, scratch, updates),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        )
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        cpu = time.process_time() - cpu_start
    seconds = [b - a for a, b in zip([start, *stamps], stamps, strict=False)]
    rest = [whole - part for whole, part in zip(seconds, generation_seconds, strict=True)]
    return shared.report(
        f"trl {TRL_VERSION}",
        workload,
        seconds,
        {"generate": generation_seconds, "score and update": rest},
        vocabulary=len(tokenizer),
        cpu_s_per_update=round(cpu / updates, 3),
        response_length=sorted(lengths),
        optimizer_steps_per_update=[num_optimizer_steps / updates],
        parameters_policy_and_critic=shared.num_parameters(policy, value_model),
    )


def settings(config_class: Any, workload: Workload, output_dir: str, updates: int) -> Any:
    """The workload as TRL's config. No stop token: every response is of full length."""
    return config_class(
        output_dir=output_dir,
        per_device_train_batch_size=workload.batch_size // workload.num_minibatches,
        gradient_accumulation_steps=workload.num_minibatches,
        num_mini_batches=workload.num_minibatches,
        total_episodes=workload.batch_size * updates,
        num_ppo_epochs=workload.num_epochs,
        response_length=workload.response_length,
        stop_token=None,
        temperature=1.0,
        learning_rate=workload.learning_rate,
        kl_coef=workload.kl_coef,
        vf_coef=workload.value_coef,
        cliprange=workload.clip_range,
        gamma=1.0,
        lam=workload.gae_lambda,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        num_sample_generations=0,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        local_rollout_forward_batch_size=workload.batch_size,
        seed=workload.seed,
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--tokenizer", type=Path, default=SMOLLM)
    arguments = parser.parse_args()
    shared.print_result(run(W1, arguments.tokenizer, updates=arguments.updates))


if __name__ == "__main__":
    main()

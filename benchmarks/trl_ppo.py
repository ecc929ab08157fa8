"""TRL's arm: its last release with PPO (1.12.0) on the shared workload; prints one JSON line.

    python benchmarks/trl_ppo.py --workload w1 --updates 4

TRL is looked for in build/trl112, where ppo_vs_trl.py puts it without touching the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import flops  # noqa: E402
import measuring  # noqa: E402
import torch  # noqa: E402
import workload as shared  # noqa: E402
from prepare_smollm import BUILD  # noqa: E402
from workload import WORKLOADS, Workload  # noqa: E402

TRL_VERSION = "1.12.0"
TRL_FOLDER = BUILD / "trl112"


class Clock:
    """Seconds of every update and of its phases, from calls of TRL's functions.

    The update is what is left of the time when sampling, passes that need no gradient and scores
    are taken away: TRL has no function for it that could be watched.
    """

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.phases: dict[str, list[float]] = defaultdict(list)
        self._device = device
        self._of_update: dict[str, float] = defaultdict(float)
        self._start = 0.0

    def start(self) -> None:
        self._start = self._now()

    def end_update(self, *_: Any, **__: Any) -> None:
        """TRL calls this after each update."""
        now = self._now()
        whole = now - self._start
        self.seconds.append(whole)
        for name in ("generate", "forward", "score"):
            self.phases[name].append(self._of_update[name])
        self.phases["update"].append(whole - sum(self._of_update.values()))
        self._of_update.clear()
        self._start = now

    def timed(self, phase_of: Callable[[Any], str], function: Callable[..., Any]) -> Any:
        """The function, whose calls without gradients count for a phase; it gets the first
        argument."""

        def run(first: Any, *rest: Any) -> Any:
            if torch.is_grad_enabled():
                return function(first, *rest)
            start = self._now()
            result = function(first, *rest)
            self._of_update[phase_of(first)] += self._now() - start
            return result

        return run

    def _now(self) -> float:
        flops.synchronize(self._device)
        return time.perf_counter()


def run(workload: Workload, *, updates: int) -> dict[str, Any]:
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
    tokenizer = shared.tokenizer_for(workload)
    prompts = shared.prompts_for(workload, tokenizer)
    policy = shared.build_policy(workload, tokenizer)
    reward_model = shared.build_scorer(workload, tokenizer, seed=1)
    value_model = shared.build_scorer(workload, tokenizer, seed=2)
    lora = lora_config(workload)  # with adapters the base model is the reference
    reference = shared.build_policy(workload, tokenizer) if lora is None else None
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in prompts])

    lengths: set[int] = set()
    num_optimizer_steps = 0
    clock = Clock(workload.device)

    def count_step(*_: Any) -> None:
        nonlocal num_optimizer_steps
        num_optimizer_steps += 1

    plain_generation = ppo_trainer.batch_generation

    def generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        generated, logits = plain_generation(model, queries, *rest)
        lengths.add(generated.shape[1] - queries.shape[1])
        return generated, logits

    ppo_trainer.batch_generation = clock.timed(lambda _: "generate", generation)
    ppo_trainer.forward = clock.timed(lambda _: "forward", ppo_trainer.forward)
    ppo_trainer.selective_log_softmax = clock.timed(
        lambda _: "forward", ppo_trainer.selective_log_softmax
    )
    ppo_trainer.get_reward = clock.timed(
        lambda model: "score" if model is reward_model else "forward", ppo_trainer.get_reward
    )
    register_optimizer_step_post_hook(count_step)
    callback = TrainerCallback()
    callback.on_step_end = clock.end_update
    measuring.reset_gpu_peak(workload)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PPOTrainer(
            args=settings(PPOConfig, workload, scratch, updates),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[callback],
            peft_config=lora,
        )
        clock.start()
        cpu_start = time.process_time()
        trainer.train()
        cpu = time.process_time() - cpu_start
    result = measuring.report(
        f"trl {TRL_VERSION}",
        workload,
        clock.seconds,
        clock.phases,
        vocabulary=len(tokenizer),
        num_threads=torch.get_num_threads(),
        cpu_s_per_update=round(cpu / updates, 3),
        response_length=sorted(lengths),
        optimizer_steps_per_update=[num_optimizer_steps / updates],
        parameters_policy_and_critic=shared.num_parameters(trainer.policy_model, value_model),
    )
    model = policy if lora is None else trainer.policy_model.get_base_model()
    return result | flops.of_update(workload, prompts, tokenizer, model, value_model.base_model)


def lora_config(workload: Workload) -> Any | None:
    """The adapters that Klippo's arm trains, too."""
    from peft import LoraConfig

    if workload.lora_rank is None:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=workload.lora_rank,
        lora_alpha=shared.LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
    )


def settings(config_class: Any, workload: Workload, output_dir: str, updates: int) -> Any:
    """The workload as TRL's config. No stop token: every response is of full length."""
    minibatch = workload.batch_size // workload.num_minibatches
    micro = workload.micro_batch_size or minibatch
    return config_class(
        output_dir=output_dir,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=workload.batch_size // micro,
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
        use_cpu=workload.device == "cpu",
        local_rollout_forward_batch_size=workload.batch_size,
        seed=workload.seed,
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="w1")
    parser.add_argument("--updates", type=int, default=4)
    arguments = parser.parse_args()
    measuring.print_result(run(WORKLOADS[arguments.workload], updates=arguments.updates))


if __name__ == "__main__":
    main()

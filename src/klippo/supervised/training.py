"""What TRL's trainers share here: how one is made and run, its silence, and the line per step."""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from klippo.errors import DivergedError, PreflightError
from klippo.hub import find_file, load_tokenizer, no_progress_bars
from klippo.policy.adapters import finding_layers
from klippo.policy.settings import LoraSettings
from klippo.supervised.settings import ModelSettings, TrainingSettings

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, all steps and TRL's figures since the last call."""
MAX_REPORTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a trainer trains, whatever it trains."""

    settings: TrainingSettings
    seed: int
    """Of the order of the data."""
    device: torch.device


def make_trainer(
    trainer: Any,
    config: Any,
    model: Any,
    tokenizer: Any,
    columns: Mapping[str, Sequence[Any]],
    training: Training,
    *,
    options: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Any:
    """One of TRL's trainers, and its config with `options`, on columns of token ids."""
    from datasets import Dataset

    num_examples = len(next(iter(columns.values())))
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(training, num_examples, folder) | dict(options or {})
        return trainer(
            model=model,
            args=one_device(config(**arguments)),
            train_dataset=Dataset.from_dict(dict(columns)),
            processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
            **parts,
        )


def train_causal(
    trainer: Any,
    config: Any,
    model: Any,
    tokenizer: Any,
    columns: Mapping[str, Sequence[Any]],
    training: Training,
    report: Report,
    *,
    options: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Any:
    """Train a causal LM (or PeftModel) in place and return it, its own padding ids put back.

    Raises DivergedError when training fails.
    """
    text_config = model.config.get_text_config()
    own_pads = (text_config.pad_token_id, model.generation_config.pad_token_id)
    with quiet_trl():
        made = make_trainer(
            trainer, config, model, tokenizer, columns, training, options=options, **parts
        )
        run_trainer(made, report)
        trained = unwrapped(made)
    text_config.pad_token_id, trained.generation_config.pad_token_id = own_pads
    return trained


def unwrapped(trainer: Any) -> Any:
    """The trainer's model as it was given to it, ready to be read."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True
    return model.eval()


def trainer_arguments(training: Training, num_examples: int, folder: str) -> dict[str, Any]:
    """Arguments that TRL's SFTConfig, RewardConfig and DPOConfig take alike.

    `folder` is one that TRL wants and writes nothing into: no checkpoints, trackers, bars or cards.
    """
    settings = training.settings
    micro = settings.micro_batch_size or settings.batch_size
    num_steps = settings.num_epochs * math.ceil(num_examples / settings.batch_size)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro,
        "num_train_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": math.ceil(settings.warmup_fraction * num_steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "bf16": settings.autocast,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": training.device.type == "cpu",
        "seed": training.seed,
        "data_seed": training.seed,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": max(num_steps // MAX_REPORTS, 1),
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": training.device.type == "cuda",
    }


def run_trainer(trainer: Any, report: Report) -> None:
    """Train; every logged step goes to `report`.

    Raises DivergedError when the loss is no longer a finite number.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Line(TrainerCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            logs: dict[str, float] = kwargs["logs"]
            loss = logs.get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {state.global_step}; lower the learning rate, or "
                    "set dtype: float32"
                )
            report(state.global_step, state.max_steps, logs)

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Line())
    trainer.train()


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Keep bars, advice and deprecation talk of the libraries off the user's screen."""
    import datasets
    from transformers.utils import logging as transformers_logging

    shown = not datasets.are_progress_bars_disabled()
    transformers_logging.get_verbosity()  # sets its logger up, which would undo our level later
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with no_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def one_device(arguments: Any) -> Any:
    """TRL's arguments, held to one GPU: it refuses a process that sees several."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def check_one_process(command: str) -> None:
    """Raises PreflightError under torchrun or accelerate launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PreflightError(
            f"klippo {command} runs in one process, and WORLD_SIZE={os.environ['WORLD_SIZE']}; "
            "start it without torchrun or accelerate launch (several members can be trained at "
            "once by commands with other seeds)"
        )


def load_own_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer. Raises PreflightError where there is none."""
    return load_tokenizer(settings.name, settings.revision)


def refuse_adapter_folder(name: str, revision: str | None, remedy: str) -> None:
    """Raises PreflightError for a folder that holds an adapter alone."""
    if find_file(name, "adapter_config.json", revision) is not None:
        raise PreflightError(f"model.name={name} is a LoRA adapter, not a model; {remedy}")


def add_lora(model: Any, settings: LoraSettings, task: str) -> Any:
    """The model with a fresh LoRA adapter; for SEQ_CLS the score head trains in full beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        task_type=task,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with finding_layers("model.lora", settings.target_modules):
        return get_peft_model(model, config)

"""What the trainings with TRL share: preparation, the trainer, and what a person sees of it."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from klippo.config.schema import WholeConfig
from klippo.errors import ConfigError, DivergedError, PreflightError
from klippo.hub import find_file, no_progress_bars
from klippo.ranks import choose_device
from klippo.runs.folder import RunFolder, writing
from klippo.runs.progress import LiveLine, clock
from klippo.supervised.settings import TrainingSettings
from klippo.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, all steps and TRL's figures since the last call."""
MAX_REPORTS = 40


@dataclass(frozen=True, slots=True)
class Training:
    """How to train, whatever the loss; `seed` is that of the order of the data."""

    settings: TrainingSettings
    seed: int
    device: torch.device
    report: Report


def prepare(command: str, config: WholeConfig) -> torch.device:
    """The device to train on. Raises PreflightError under torchrun or accelerate launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PreflightError(
            f"klippo {command} runs in one process, and WORLD_SIZE={os.environ['WORLD_SIZE']}; "
            "start it without torchrun or accelerate launch (several members can be trained at "
            "once by commands with other seeds)"
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return choose_device(config.device)


def holds_result(folder: Path, files: Sequence[str], kind: str) -> bool:
    """Whether the folder holds a finished `kind`, known by its `files`.

    Raises ConfigError if it holds anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not all((folder / name).is_file() for name in files):
        raise ConfigError(
            f"output_dir={folder} exists and is not a {kind} (it lacks "
            f"{' or '.join(files)}), so it is left alone, also by --overwrite; choose another "
            "output_dir"
        )
    return True


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is complete."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder.parent).new_directory(folder.name) as building:
        yield building


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model (or adapter) and its tokenizer as from_pretrained reads them."""
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody has filled in


def refuse_adapter_folder(name: str, revision: str | None, remedy: str) -> None:
    """Raises PreflightError for a folder that holds nothing but an adapter."""
    if find_file(name, "adapter_config.json", revision) is not None:
        raise PreflightError(f"model.name={name} is a LoRA adapter, not a model; {remedy}")


def make_trainer(
    trainer: type[Trainer],
    config: Any,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    columns: Mapping[str, Sequence[Any]],
    training: Training,
    *,
    options: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Trainer:
    """One of TRL's trainers on columns of token ids, and its config with `options`.

    It writes no checkpoints, tracks nowhere and shows no bars.
    """
    from datasets import Dataset

    settings, num_examples = training.settings, len(next(iter(columns.values())))
    micro = settings.micro_batch_size or settings.batch_size
    num_steps = settings.num_epochs * math.ceil(num_examples / settings.batch_size)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    common = {
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
    with tempfile.TemporaryDirectory() as folder:  # TRL wants one, and writes nothing into it
        arguments = config(output_dir=folder, **common, **(options or {}))
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # TRL refuses a process that sees several
        return trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(dict(columns)),
            processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
            **parts,
        )


def run_trainer(trainer: Trainer, report: Report) -> PreTrainedModel:
    """Train; every logged step goes to `report`. Returns the trained model in evaluation mode.

    Raises DivergedError when the loss is no longer a finite number.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            loss = kwargs["logs"].get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {state.global_step}; lower the learning rate, or "
                    "set dtype: float32"
                )
            report(state.global_step, state.max_steps, kwargs["logs"])

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Reporter())
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True
    return model.eval()


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Silence the bars, advice and deprecation warnings of the libraries."""
    import datasets

    had_bars, was_off = not datasets.are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with no_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(was_off)
        if had_bars:
            datasets.enable_progress_bars()


class TrainingLine(LiveLine):
    """Shows the newest step of a training: `sft: step 20/94  loss 0.61  left 0:12`."""

    def __init__(self, console: Console, title: str, *, quiet: bool = False) -> None:
        super().__init__(console, num_lines=8, quiet=quiet)
        self._title = title

    def step(self, step: int, num_steps: int, figures: Mapping[str, float]) -> None:
        """Show that `step` of `num_steps` are done, with TRL's figures."""
        parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", f"loss {figures['loss']:.3f}"]
        accuracy = figures.get("accuracy", figures.get("rewards/accuracies"))  # of pairs
        if accuracy is not None:
            parts.append(f"accuracy {accuracy:.2f}")
        parts.append(f"left {clock(self.seconds_left(step, num_steps))}")
        self.show(f"{self._title}: {'  '.join(parts)}", step, num_steps)

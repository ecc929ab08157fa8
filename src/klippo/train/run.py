"""`klippo train`."""

from pathlib import Path

from klippo.config.load import LoadedConfig
from klippo.errors import RewardError
from klippo.lab.gold_eval import gold_missing
from klippo.ranks import Ranks, choose_device
from klippo.train.resume import find_start
from klippo.train.trainer import PPOTrainer


def train(
    loaded: LoadedConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    yes: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Run PPO as the config says; returns the exit code. `yes` accepts what judges may cost."""
    config = loaded.config
    ranks = Ranks.from_environment(choose_device(config.device), config.peer_timeout_s)
    folder = Path(config.output_dir)
    ranks.on_main(lambda: find_start(folder, config, overwrite=overwrite, resume=resume))
    outcome = PPOTrainer(
        loaded,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
        trust_remote_code=trust_remote_code,
        confirm_cost=not yes,
    ).train()
    if outcome.gold_problem is not None:
        command = gold_missing(outcome.output_dir, outcome.gold_problem)["command"]
        raise RewardError(
            "The run is done and its model is saved, but its samples have no gold scores: "
            f"{outcome.gold_problem}\nThis adds them: {command}"
        )
    return 0

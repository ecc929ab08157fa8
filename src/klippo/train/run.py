"""The stage behind `klippo train`."""

from pathlib import Path

from klippo.config.load import LoadedConfig
from klippo.config.trust import trust_code
from klippo.data.rows import load_rows
from klippo.errors import RewardError
from klippo.lab.gold_eval import gold_missing
from klippo.ranks import Ranks, choose_device
from klippo.train.dry_run import agree_to_cost
from klippo.train.launch import choose_sharding
from klippo.train.memory_check import check_memory
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
    """Run PPO as the config says; returns the exit code. `yes` agrees to what judges may cost."""
    config = loaded.config
    trust_code(config, trust_remote_code)
    device = choose_device(config.device)
    ranks = Ranks.from_environment(device, config.peer_timeout_s)
    choose_sharding(config, ranks)
    folder = Path(config.output_dir)
    ranks.on_main(lambda: find_start(folder, config, overwrite=overwrite, resume=resume))
    data = load_rows(config.data, config.seed)
    ranks.on_main(lambda: agree_to_cost(config, data, yes=yes))
    ranks.on_main(lambda: check_memory(config, data, device))
    outcome = PPOTrainer(
        loaded,
        data=data,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
        trust_remote_code=trust_remote_code,
    ).train()
    if outcome.gold_problem is not None:
        command = gold_missing(outcome.output_dir, outcome.gold_problem)["command"]
        raise RewardError(
            "The run is done and its model is saved, but its samples have no gold scores: "
            f"{outcome.gold_problem}\nThis adds them: {command}"
        )
    return 0

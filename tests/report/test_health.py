"""The report names the health checks that fired."""

from pathlib import Path

from klippo.ppo.health import CAUSES
from klippo.ppo.settings import HealthSettings
from tests.report.conftest import metric_lines

FIRED = {
    "kl_explosion": {
        "action": "warn", "first_step": 3, "last_step": 9, "num_steps": 4,
        "diagnosis": "the policy moved by 8.31 nats per token <b>\u202e",
    },
    "loss_not_finite": {
        "action": "stop", "first_step": 10, "last_step": 10, "num_steps": 1,
        "diagnosis": "the loss of 4 minibatches was NaN or infinite",
    },
}  # fmt: skip


def test_each_rail_stands_with_its_steps_and_diagnosis(make_run, page_of):
    run = make_run(health=FIRED, state="failed", stopped_by="loss_not_finite")
    page = page_of(run)
    for told in (
        "What the health checks said",
        "kl_explosion 4 steps from 3 to 9 warned the policy moved by 8.31 nats per token",
        "<b>⟨U+202E⟩",
        "loss_not_finite step 10 ended the run the loss of 4 minibatches was NaN",
        "Health checks kl_explosion (4 steps from 3 to 9); loss_not_finite (step 10)",
    ):
        assert told in page.text, told
    card = (run / "MODEL_CARD.md").read_text()
    assert "- Health check loss\\_not\\_finite (step 10; ended the run): the loss of 4" in card


def test_a_quiet_run_says_so_and_an_old_one_says_nothing(make_run, page_of):
    quiet = [line | {"response/repeated_share": 0.0} for line in metric_lines(3)]
    assert "Health checks none fired" in page_of(make_run("quiet", metrics=quiet)).text
    assert "Health checks" not in page_of(make_run("old")).text


def test_a_status_that_was_tampered_with_does_no_harm(make_run, page_of):
    strange = {"a": 3, "b": {"action": ["x"], "num_steps": "many"}}
    assert "b many steps from None to None not recorded" in page_of(make_run(health=strange)).text
    assert "health checks said" not in page_of(make_run("other", health=[1])).text


def test_every_rail_and_setting_is_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs/health.md").read_text(encoding="utf-8")
    defaults = HealthSettings().model_dump()
    for name in CAUSES:
        (line,) = [line for line in docs.splitlines() if line.startswith(f"| `{name}`")]
        assert line.split("|")[3].strip() == defaults[name]
    for name, value in defaults.items():
        if name not in CAUSES:
            assert f"`{name}` ({value:g}" in docs, name

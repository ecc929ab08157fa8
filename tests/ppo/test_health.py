"""Each health check on metrics made by hand."""

import json
import math

import pytest
from pydantic import ValidationError

from klippo.ppo.health import CAUSES, HealthMonitor
from klippo.ppo.settings import HealthSettings, PPOSettings

HEALTHY = {
    "kl/sequence_nats": 2.0,
    "policy/entropy_nats": 3.0,
    "response/length_tokens": 20.0,
    "response/repeated_share": 0.02,
    "reward/score_mean": 0.5,
    "reward/score_sd": 1.0,
    "reward/scored_share": 1.0,
    "reward/num_not_finite": 0.0,
    "value/explained_variance": 0.6,
    "value/mean_squared_error": 0.4,
    "value/mean_squared_return": 1.0,
}
UPDATE = {
    "policy/largest_ratio_mean": 1.01,
    "policy/largest_update_kl_nats_per_token": 0.01,
    "update/num_losses_not_finite": 0.0,
    "update/num_gradients_not_finite": 0.0,
    "update/num_ratio_skips": 0.0,
}


def checks(**settings):
    return HealthMonitor(HealthSettings(**settings), PPOSettings(batch_size=16))


def fire(one, step, **changes):
    """What fires in a step that is healthy but for `changes`."""
    row = HEALTHY | UPDATE | {key.replace("__", "/"): value for key, value in changes.items()}
    alarms = one.check_rollout(step, {key: row[key] for key in row if key not in UPDATE})
    return alarms + one.check_update(step, row)


def after(number, one=None, **changes):
    """Checks that have seen so many steps without an alarm."""
    one = one or checks()
    for step in range(number):
        assert fire(one, step, **changes) == []
    return one


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("reward_not_finite", {"reward__num_not_finite": 2.0}, "2 rewards of the batch were NaN"),
        ("loss_not_finite", {"update__num_losses_not_finite": 1.0}, "the loss of 1 minibatches"),
        ("gradient_not_finite", {"update__num_gradients_not_finite": 3.0}, "a gradient of 3"),
        (
            "ratio_explosion",
            {"update__num_ratio_skips": 1.0, "policy__largest_ratio_mean": 12.3},
            "exceeded ppo.ratio_threshold=10 (largest 12.3)",
        ),
        (
            "kl_explosion",
            {"policy__largest_update_kl_nats_per_token": 0.51},
            "the policy moved by 0.51 nats per token, more than max_kl_jump=0.5",
        ),
        # 2 / 20 nats per token before, 30 / 20 now
        ("kl_explosion", {"kl/sequence_nats": 30.0}, "is 1.5 nats per token, 1.4 more than a step"),
        ("kl_explosion", {"kl/sequence_nats": math.nan}, "is nan nats per token"),
        ("entropy_collapse", {"policy__entropy_nats": 0.29}, "is 0.29 nats per token and was 3 at"),
        ("value_failure", {"value__mean_squared_error": 4.1}, "values is 4.1; that of 0 is 1 "),
        (
            "value_failure",
            {"value__mean_squared_error": math.inf},
            "the values are NaN or infinite",
        ),
        ("value_failure", {"value__explained_variance": -1.1}, "variance is -1.10, below -1"),
        ("value_failure", {"value__explained_variance": 0.0}, "is 0.00 and was 0.60 of late"),
        ("reward_saturation", {"reward__score_sd": 0.09}, "scores is 0.09 and was 1 at the start"),
        ("reward_saturation", {"reward__score_sd": 0.0}, "all 16 scores of the batch are 0.5"),
        ("length_drift", {"response__length_tokens": 61.0}, "have 61.0 tokens and had 20.0 at"),
        ("length_drift", {"response__length_tokens": 6.5}, "have 6.5 tokens and had 20.0 at"),
        ("repetition", {"response__repeated_share": 0.51}, "51% of the trigrams"),
    ],
)
def test_a_fault_fires_the_check_of_its_name_in_the_same_step(name, changes, words):
    one = after(5)
    changes = {key.replace("/", "__"): value for key, value in changes.items()}
    alarms = fire(one, 5, **changes)
    assert [alarm.check for alarm in alarms] == [name]
    assert words in alarms[0].diagnosis
    assert alarms[0].is_new
    assert one.fired()[name]["first_step"] == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"policy__largest_update_kl_nats_per_token": 0.49, "policy__largest_ratio_mean": 9.9},
        {"kl__sequence_nats": 11.9},
        {"policy__entropy_nats": 0.31},
        {"value__mean_squared_error": 3.9, "value__explained_variance": 0.1},
        {"reward__score_sd": 0.11},
        {"response__length_tokens": 59.0, "response__repeated_share": 0.49},
        {"response__length_tokens": 7.0},
        {"reward__score_sd": 0.0, "reward__scored_share": 1 / 16},  # one score has no spread
    ],
)
def test_what_is_just_inside_its_bound_is_quiet(changes):
    assert fire(after(5), 5, **changes) == []


def test_a_critic_that_starts_at_zero_is_no_failure_and_one_that_stays_bad_is():
    new = {"value__explained_variance": 0.0, "value__mean_squared_error": 1.0}
    one = after(12, **new)
    alarms = [fire(one, step, value__explained_variance=-0.5) for step in range(12, 18)]
    assert [len(found) for found in alarms] == [0, 0, 0, 0, 1, 1]  # 5 of 10 at -0.5: mean -0.25
    assert "explained variance is -0.25 on average of late" in alarms[4][0].diagnosis


def test_repetition_fires_at_the_first_step_too():
    (alarm,) = fire(checks(), 0, response__repeated_share=0.6)
    assert "60% of the trigrams" in alarm.diagnosis
    assert "and 0% at the start" in alarm.diagnosis


def test_a_batch_without_reward_does_not_condemn_the_critic():
    """The scale is that of the largest returns so far, not those of a batch where all is 0."""
    quiet = {"value__mean_squared_return": 0.0, "value__mean_squared_error": 0.3}
    assert fire(after(5), 5, **quiet) == []
    assert fire(checks(), 0, **quiet) == []


def test_responses_of_others_have_no_update_kl_and_no_critic_is_no_broken_one():
    given = {
        key: value for key, value in (HEALTHY | UPDATE).items() if key[:5] not in ("rewar", "value")
    }
    one = checks()
    far = given | {"policy/largest_update_kl_nats_per_token": 5.0, "value/explained_variance": -3.0}
    assert one.check_rollout(0, far) == []
    assert one.check_update(0, far) == []


def test_a_check_that_keeps_firing_is_news_once_and_again_after_a_rest():
    one = after(3)
    news = [
        [alarm.is_new for alarm in fire(one, 3 + i, policy__entropy_nats=entropy)]
        for i, entropy in enumerate([0.1, 0.1, 3.0, 0.1])
    ]
    assert news == [[True], [False], [], [True]]
    record = one.fired()["entropy_collapse"]
    assert (record["first_step"], record["last_step"], record["num_steps"]) == (3, 6, 3)


def test_a_step_with_an_alarm_is_not_how_the_run_began():
    one = after(1)
    for step in range(1, 4):
        (alarm,) = fire(one, step, policy__entropy_nats=0.1)
        assert "was 3 at the start" in alarm.diagnosis


def test_checks_that_resumed_from_their_state_say_what_the_others_say():
    one = after(4)
    fire(one, 4, policy__entropy_nats=0.1)
    other = checks()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step, entropy in enumerate([0.2, 3.0, 0.1, math.nan], start=5):
        same = {"policy__entropy_nats": entropy, "response__length_tokens": 20.0 * step}
        assert fire(one, step, **same) == fire(other, step, **same)
    assert one.state_dict() == other.state_dict()


def test_off_is_quiet_and_stop_says_so():
    assert fire(after(3, checks(entropy_collapse="off")), 3, policy__entropy_nats=0.1) == []
    (alarm,) = fire(after(3, checks(entropy_collapse="stop")), 3, policy__entropy_nats=0.1)
    assert alarm.stops


def test_every_check_has_its_action_and_names_settings_to_change():
    assert set(HealthSettings.model_fields) >= set(CAUSES)
    assert len(CAUSES) == 10
    for cause, remedy in CAUSES.values():
        assert cause
        assert remedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_collapse": "skip"}, "entropy_collapse=skip: this check sees what updates have"),
        ({"loss_not_finite": "warn"}, "loss_not_finite=warn: what this check finds would spoil"),
        ({"ratio_explosion": "off"}, "ratio_explosion=off: what this check finds would spoil"),
        ({"length_drift": "halt"}, "Input should be 'off', 'warn' or 'stop'"),
    ],
)
def test_an_action_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        HealthSettings(**settings)

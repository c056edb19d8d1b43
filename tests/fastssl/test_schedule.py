"""Durations and learning rates: golden values of the published recipes, and the edges."""

import math

import pytest

from fastssl.schedule import Clock, learning_rate
from fastssl.settings import OptimConfig

IMAGENET = Clock(steps_per_epoch=5004, batch_size=256)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("200ep", 1_000_800),
        ("0.5ep", 2502),
        ("5000steps", 5000),
        ("1step", 1),
        ("10kimages", 40),
        ("1Mimages", 3907),
        ("0steps", 0),
    ],
)
def test_every_duration_becomes_steps(text, steps):
    assert IMAGENET.steps(text, "run.duration") == steps


@pytest.mark.parametrize("text", ["200", "ten epochs", "-1ep", "", "5 parsecs"])
def test_a_bad_duration_names_key_and_remedy(text):
    with pytest.raises(ValueError, match=r"run\.duration is .* but must be a duration such as 200ep"):
        IMAGENET.steps(text, "run.duration")


def test_a_period_of_no_steps_is_refused_and_never_is_zero():
    assert IMAGENET.every("never", "knn.every") == 0
    with pytest.raises(ValueError, match=r"knn\.every"):
        IMAGENET.every("0ep", "knn.every")


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.03), (1, 0.0299981495), (100, 0.015), (199, 1.85051e-6)])
def test_moco_v2_cosine_has_the_published_value_at_each_epoch(epoch, lr):
    schedule = learning_rate(OptimConfig(lr=0.03), IMAGENET, 200 * 5004)
    assert schedule(epoch * 5004) == pytest.approx(lr, rel=2e-6)
    assert schedule(epoch * 5004 + 5003) == schedule(epoch * 5004)


def test_moco_v1_steps_fall_at_epochs_120_and_160():
    config = OptimConfig(lr=0.03, schedule="step", milestones=("120ep", "160ep"))
    schedule = learning_rate(config, IMAGENET, 200 * 5004)
    at = [schedule(e * 5004) for e in (119, 120, 159, 160, 199)]
    assert at == pytest.approx([0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_warmup_ends_at_the_peak_and_cosine_ends_at_the_final_value():
    config = OptimConfig(lr=1.0, warmup="10steps", warmup_lr=0.1, final_lr=0.1, schedule_per="step")
    schedule = learning_rate(config, Clock(100, 256), 100)
    assert [schedule(0), schedule(9), schedule(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert schedule(99) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_linear_scaling_multiplies_by_batch_over_256():
    clock = Clock(10, 1024)
    assert learning_rate(OptimConfig(lr=0.03, lr_scaling="linear"), clock, 10)(0) == pytest.approx(0.12)
    assert learning_rate(OptimConfig(lr=0.03), clock, 10)(0) == pytest.approx(0.03)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optim\.warmup is '2ep'"):
        learning_rate(OptimConfig(warmup="2ep"), Clock(10, 256), 20)

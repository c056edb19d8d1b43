"""The watch for runs that learn nothing: what it says, when, and that it keeps quiet in healthy runs."""

import math

import pytest
import torch

from fastssl.health import PATIENCE_STEPS, SIGNS, HealthWatch
from fastssl.log import RunLog
from fastssl.losses import feature_std
from fastssl.methods import Output

BAD = {"feature_std": 0.02, "prototype_entropy": 0.2, "loss": math.log(3000), "negative_similarity": 0.97}
GOOD = {"feature_std": 0.8, "prototype_entropy": 0.97, "loss": 6.0, "negative_similarity": 0.1}


def looks(means_at, steps, every=50):
    watch = HealthWatch(math.log(3000))
    return [(step, s) for step in range(0, steps + 1, every) for s in watch.look(step, means_at(step))]


@pytest.mark.parametrize("sign", [sign.value for sign in SIGNS])
def test_a_sign_that_stays_bad_is_said_once_with_its_value_and_a_remedy(sign):
    said = looks(lambda step: {**GOOD, sign: BAD[sign]}, 5 * PATIENCE_STEPS)
    assert len(said) == 1
    step, sentence = said[0]
    assert step == PATIENCE_STEPS
    assert f"{BAD[sign]:.3f}"[:4] in sentence
    assert "method." in sentence or "optim." in sentence


def test_healthy_numbers_and_bad_beginnings_are_not_talked_about():
    assert looks(lambda step: GOOD, 5 * PATIENCE_STEPS) == []
    assert looks(lambda step: BAD if step < PATIENCE_STEPS else GOOD, 5 * PATIENCE_STEPS) == []


def test_a_look_that_is_good_starts_the_patience_again():
    assert looks(lambda step: GOOD if step % PATIENCE_STEPS == 0 else BAD, 5 * PATIENCE_STEPS) == []


def test_a_method_without_chance_level_or_sign_is_left_alone():
    watch = HealthWatch(None)
    assert [s for step in (0, 10 * PATIENCE_STEPS) for s in watch.look(step, {"loss": 1e9})] == []


def test_the_log_says_it_to_the_reader(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10 * PATIENCE_STEPS, 8, PATIENCE_STEPS // 2, chance=2.0)
    for step in range(2 * PATIENCE_STEPS):
        log.step(step, Output(torch.tensor(2.0), {"feature_std": torch.tensor(0.9)}), 0.1, 0.0)
    log.close()
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert f"for {PATIENCE_STEPS} steps, the loss stays at 2.000, which is chance level" in err


def test_feature_std_is_one_for_spread_and_zero_for_collapsed_features():
    spread = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert feature_std(spread).item() == pytest.approx(1.0, abs=0.01)
    assert feature_std(spread[:1].expand(32, 64)).item() == pytest.approx(0.0, abs=1e-6)

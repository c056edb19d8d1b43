"""metrics.jsonl across lives of a run, and what the log says where."""

import json

import pytest
import torch

from fastssl.log import RunLog, read_metrics
from fastssl.methods import Output


def output(loss):
    return Output(torch.tensor(loss), {"contrast_top1": torch.tensor(0.5)})


def steps(log, first, last, loss=2.0):
    for step in range(first, last):
        log.step(step, output(loss), lr=0.1, waited_s=0.0)


def test_lines_behind_the_resumed_step_are_removed(tmp_path):
    log = RunLog(tmp_path, 0, 8, batch_size=4, every=2)
    steps(log, 0, 6, loss=1.0)
    log.close()
    log = RunLog(tmp_path, 2, 8, batch_size=4, every=2)
    steps(log, 2, 8, loss=3.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(2, 1.0), (4, 3.0), (6, 3.0), (8, 3.0)]


def test_a_line_that_a_crash_cut_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_the_loss_of_a_line_is_the_mean_since_the_last(tmp_path):
    log = RunLog(tmp_path, 0, 2, batch_size=4, every=2)
    log.step(0, output(1.0), 0.1, 0.0)
    log.step(1, output(2.0), 0.1, 0.0)
    log.close()
    (line,) = read_metrics(tmp_path)
    assert (line["loss"], line["images"], line["contrast_top1"]) == (1.5, 8, 0.5)


def test_time_in_a_pause_is_left_out_of_the_rates(tmp_path):
    import time

    log = RunLog(tmp_path, 0, 1, batch_size=4, every=1)
    with log.pause():
        time.sleep(0.5)
    log.step(0, output(1.0), 0.1, 0.0)
    log.close()
    assert read_metrics(tmp_path)[0]["step_s"] < 0.4


def test_rejected_steps_are_counted_and_in_no_mean(tmp_path):
    log = RunLog(tmp_path, 0, 6, batch_size=4, every=3)
    for step, loss in enumerate((1.0, float("nan"), 2.0, float("nan"), float("inf"), 3.0)):
        log.step(step, output(loss), 0.1, 0.0, rejected=torch.tensor(step in (1, 3, 4, 5)))
    log.close()
    some, none = read_metrics(tmp_path)
    assert (some["loss"], some["contrast_top1"]) == pytest.approx((1.5, 0.5), rel=1e-6)  # sums are float32
    assert some["rejected_steps"] == 1.0
    assert none["rejected_steps"] == 3.0
    assert not {"loss", "contrast_top1"} & none.keys()


def test_without_a_terminal_lines_are_few_and_the_last_is_there(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 20, batch_size=4, every=1)
    steps(log, 0, 20)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "20/20"]
    assert "images/s" in lines[0]
    assert "ETA" in lines[0]

"""Bad samples that reach a training run: it goes on, names them, and stops when there are too many."""

import pytest

from fastssl import checkpoint, config, train
from fastssl.log import read_metrics
from shard_tools import exit_codes
from tests.fastssl.runs import assert_same_state, finish, settings, start
from tests.shards import write_split


def shards_with(folder, tiny_files, bad):
    files = [
        ("jpg", payload[:200]) if i in bad else (suffix, payload) for i, (suffix, payload) in enumerate(tiny_files)
    ]
    write_split(folder, files, [i % 4 for i in range(len(files))])
    return folder


def run(*arguments):
    return train.run(config.load(settings(*arguments)))


def test_a_bad_sample_is_named_counted_and_does_not_stop_the_run(tiny_files, tmp_path, capsys):
    shards = shards_with(tmp_path / "shards", tiny_files, {12})
    assert run(shards, tmp_path / "run") == 0
    err = capsys.readouterr().err
    assert err.count("warning: train-000000.tar:000000012.jpg cannot be decoded") == 1
    assert "another one took its place" in err
    (listed,) = (tmp_path / "run" / "bad-samples-rank-0.txt").read_text().splitlines()
    assert listed.startswith("train-000000.tar:000000012.jpg")
    assert sum(line["replaced_samples"] for line in read_metrics(tmp_path / "run")) in (1, 2)  # once an epoch


def test_a_run_with_bad_samples_resumes_to_the_same_bits(tiny_files, tmp_path):
    shards = shards_with(tmp_path / "shards", tiny_files, {12})
    assert run(shards, tmp_path / "once") == 0
    assert run(shards, tmp_path / "pieces", "run.stop_after=5steps") == 0
    assert run(shards, tmp_path / "pieces") == 0
    assert_same_state(tmp_path / "once", tmp_path / "pieces")


def test_too_many_bad_samples_save_and_stop_the_run(tiny_files, tmp_path, capsys):
    shards = shards_with(tmp_path / "shards", tiny_files, set(range(0, 61, 6)))
    assert run(shards, tmp_path / "run", "loader.max_bad=0.05") == exit_codes.TOO_MANY_BAD == 3
    err = capsys.readouterr().err
    assert "error: more than 5.00% of the samples" in err
    assert "loader.max_bad" in err
    stopped = checkpoint.newest(tmp_path / "run")
    assert 0 < int(stopped.name.removeprefix("step-")) < 12
    assert run(shards, tmp_path / "run", "loader.max_bad=0.5") == 0
    assert checkpoint.newest(tmp_path / "run").name == "step-00000012"


def test_a_run_told_to_fail_does(tiny_files, tmp_path):
    shards = shards_with(tmp_path / "shards", tiny_files, {12})
    from pipelines.backends import DecodeError

    with pytest.raises(DecodeError, match=r"000000012\.jpg cannot be decoded"):
        run(shards, tmp_path / "run", "loader.on_bad=fail")


@pytest.mark.dist
def test_all_ranks_stop_together_with_one_message(tiny_files, tmp_path):
    shards = shards_with(tmp_path / "shards", tiny_files, set(range(0, 61, 6)))
    arguments = [*settings(shards, tmp_path / "run"), "loader.max_bad=0.05", "method.split_groups=1"]
    code, _, err = finish(start("fastssl.train", arguments, ranks=2))
    assert code != 0
    assert err.count("error: more than 5.00% of the samples") == 1
    assert "exitcode  : 3" in err
    assert checkpoint.newest(tmp_path / "run") is not None

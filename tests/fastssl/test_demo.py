"""The demo from end to end, with a training too short to be good."""

import json

from PIL import Image

from fastssl import demo


def test_the_demo_packs_trains_evaluates_and_reports(tmp_path, capfd):
    short = ["run.duration=12steps", "optim.warmup=2steps", "run.batch_size=32", "run.log_every=2"]
    assert demo.main([str(tmp_path), *short]) == 0
    out = capfd.readouterr().out
    for part in ("trained", "random init", "raw pixels", "images/s", "waiting for data", "loss curve"):
        assert part in out
    for picture in ("views.png", "loss.png"):
        image = Image.open(tmp_path / picture)
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10, "not a blank picture"
    results = sorted(p.name for p in (tmp_path / "evaluation").glob("*.json"))
    assert results == [f"{e}-{s}.json" for e in ("knn", "linear") for s in ("random-init", "raw-pixels", "trained")]
    trained = json.loads((tmp_path / "evaluation" / "knn-trained.json").read_text())
    assert 0.1 < trained["metrics"]["knn/top1"] <= 1.0

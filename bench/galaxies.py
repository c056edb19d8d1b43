"""Is a mirrored galaxy found again? Similarity placement of the autoencoder against MoCo with a decoder.

    shard_tools simulate galaxies train.h5 --num 3000 --size 96 --seed 0
    shard_tools simulate galaxies test.h5 --num 800 --size 96 --seed 1
    shard_tools pack hdf5 train.h5 SHARDS; shard_tools pack hdf5 test.h5 SHARDS --split test
    python -m bench.galaxies SHARDS runs/galaxies --epochs 20

Runs that are there already are not repeated. Writes OUT/galaxies.json, OUT/placement-*.png and OUT/reconstructions.png,
and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.learning import call, conditions

SUBJECTS = {
    "random init": ("random", "galaxies_cpu"),
    "autoencoder": ("galaxies_cpu_autoencoder", "galaxies_cpu_autoencoder"),
    "MoCo with a decoder": ("galaxies_cpu", "galaxies_cpu"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args(argv)
    shared = ["run.device=cpu", f"data.root={arguments.shards}"]
    for recipe in ("galaxies_cpu", "galaxies_cpu_autoencoder"):
        folder = arguments.out / recipe
        train = [f"recipe={recipe}", f"run.dir={folder}", f"run.duration={arguments.epochs}ep", "run.save_every=5ep"]
        call("fastssl.train", *train, "run.threads=1", *shared)
    results = {name: place(name, arguments.out, shared) for name in SUBJECTS}
    drawn = [f"checkpoint={arguments.out / 'galaxies_cpu'}", f"data.root={arguments.shards}", "data.split=test"]
    call("fastssl.show_reconstructions", *drawn, f"views.out={arguments.out / 'reconstructions.png'}")
    document = {**conditions(), "epochs": arguments.epochs, "placement": results}
    (arguments.out / "galaxies.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))
    return 0


def place(name: str, out: Path, shared: Sequence[str]) -> dict[str, float]:
    """Placement over the three mirrorings, of one subject on the test split; its histogram lies beside the JSON."""
    checkpoint, like = SUBJECTS[name]
    subject = (
        ["checkpoint=random", f"like={out / like}"] if checkpoint == "random" else [f"checkpoint={out / checkpoint}"]
    )
    result = out / f"placement-{checkpoint}.json"
    call("fastssl.evaluate", "evaluator=placement", *subject, "data.split=test", f"eval.out={result}", *shared)
    return json.loads(result.read_text())["mirrorings"]["all"]


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| | mirrored copy in first place | median place | mean place | mean 1/place |", "|---|---|---|---|---|"]
    lines += [
        f"| {n} | {r['first']:.1%} | {r['median']:g} | {r['mean']:.1f} | {r['mrr']:.3f} |" for n, r in results.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""What all peers share: their arguments, the clock, and the lines of JSON that the runner reads.

A peer is a program, `python -m bench.peers.NAME --folder IMAGEFOLDER --views moco_v2 ...`. It prints one line when the
first batch is there, {"first_batch_at": unix seconds}, and one line a round: images_per_s, cpu_ms_per_image (user and
system time of all its processes), images, seconds. With --fidelity it prints one line, {"errors": {operation: mean
absolute difference from Pillow, 0-255}}, and with --describe {"differs", "output"}. Nothing of fastssl is imported.
Linux only: the time of live worker processes is read from /proc.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.peers.views import VIEWS


def main(
    batches: Callable[[argparse.Namespace], Iterator[Any]],
    output: str,
    decode: Callable[[Path], Any] | None = None,
    operations: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    own: argparse.ArgumentParser | None = None,
) -> None:
    """The program of a peer.

    batches     options -> an endless iterator whose every item stands for options.batch images
    output      what a batch is made of, in words
    decode, operations      as `fidelity.errors` takes them; None where a peer has nothing to compare
    own         arguments of the peer's own
    """
    document = sys.modules["__main__"].__doc__ or ""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[own] if own else []
    )
    parser.add_argument("--folder", type=Path, help="one sub-folder of images a class")
    parser.add_argument("--shards", type=Path, help="folder of shards that shard_tools packed")
    parser.add_argument("--views", choices=VIEWS, default="moco_v2")
    parser.add_argument("--workers", type=int, default=2, help="threads or worker processes")
    parser.add_argument("--batch", type=int, default=64, help="images a batch")
    parser.add_argument("--warmup", type=int, default=2, help="batches of every worker that do not count")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round; it ends with a batch of every worker")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--fidelity", action="store_true", help="pixels against Pillow's instead of speed")
    parser.add_argument("--describe", action="store_true", help="what the peer does differently, and its output")
    options = parser.parse_args()
    if options.describe:
        differs = " ".join(document.partition("Differs:")[2].split())
        _print({"differs": differs or "in nothing", "output": output})
    elif options.fidelity:
        from bench.peers.fidelity import errors

        _print({"errors": errors(options.folder, decode, operations or {}) if decode else {}})
    else:
        measure(batches(options), options)


def measure(source: Iterator[Any], options: argparse.Namespace) -> None:
    """Print the lines of the first batch and of each round."""
    next(source)
    _print({"first_batch_at": time.time()})
    for _ in range(options.warmup * options.workers - 1):
        next(source)
    for _ in range(options.rounds):
        batches, began, cpu_began = 0, time.perf_counter(), cpu_s(os.getpid())
        # Workers that began together deliver together: a round that ends amid them would lack what they have all but
        # done, several percent of a short round.
        while (seconds := time.perf_counter() - began) < options.seconds or batches % options.workers:
            next(source)
            batches += 1
        cpu_ms, images = 1000 * (cpu_s(os.getpid()) - cpu_began), batches * options.batch
        rates = {"images_per_s": images / seconds, "cpu_ms_per_image": cpu_ms / images}
        _print({**rates, "images": images, "seconds": seconds})
    source.close()  # type: ignore[attr-defined]  # a generator: its threads and processes end here


def cpu_s(pid: int) -> float:
    """User and system time of a process and of all below it that live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)
    return own + sum(cpu_s(int(child)) for child in children.split())


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)

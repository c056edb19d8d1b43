"""Nothing that is read runs code, leaves its folder, or takes more than is stated: each kind of input, by its command.

Each trial is a process of its own (see trial.py). From outside is checked that it ended with a code of its own choice,
with one sentence and no traceback; that the canary is not there, nor anything else beside the folder that it was asked
to write to; that nothing printed would steer a terminal; that it took little more time and memory than honest input.
"""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shard_tools import exit_codes
from tests.faults.hostile import Kind, Place, Trial, settings, shards, sources, text, weights
from tests.faults.record import times
from tests.faults.trial import REPOSITORY, Outcome, Trials

SECONDS = 20.0  # a trial that takes longer is killed, and fails
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what a terminal obeys
_REFUSALS = {exit_codes.BAD_INPUT, exit_codes.DAMAGED}
_VERSIONS = {"shard_tools": "shard_tools.cli", "fastssl": "fastssl.train"}
_SECRETS = ("t0ps3cret", "hunter2")

Builder = Callable[..., Kind]


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    with Trials() as running:
        yield running


@pytest.fixture
def refuses(trials: Trials, tmp_path: Path, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Tries all of a kind, and says of how many of them it was seen that they do no harm."""

    def check(build: Builder, *more: object) -> None:
        place = Place(tmp_path / "in", tmp_path / "canary", tmp_path / "out")
        folder, home = tmp_path / "here", tmp_path / "home"
        for made in (place.root, place.out, folder, home):
            made.mkdir()
        kind = build(place, *more)
        environment = {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        before = _tree(tmp_path, place.out)

        def run(trial: Trial) -> Outcome:
            everything = {**environment, **trial.environment}
            return trials.run(trial.module, trial.arguments, folder, SECONDS, everything)

        run(kind.honest)  # what is imported late is read from the disk once
        honest = run(kind.honest)
        assert honest.code == 0, honest.err
        bases = {_room(kind.honest): honest}  # processes of another room begin with other modules in memory
        for other in {_room(trial): trial for trial in kind.hostile}.values():
            if _room(other) not in bases:
                bases[_room(other)] = run(Trial("version", _VERSIONS[_room(other)], ("--version",)))
        faults, most = [], (0, 0.0)
        tried = kind.hostile[:: times(3, 1)]
        for trial in tried:
            outcome = run(trial)
            base = bases[_room(trial)]
            extra = (outcome.memory - base.memory, outcome.cpu_s - base.cpu_s)
            if extra[1] > kind.cpu_s:  # once more: others may have had the processor's caches
                outcome = run(trial)
                extra = (outcome.memory - base.memory, outcome.cpu_s - base.cpu_s)
            most = (max(most[0], extra[0]), max(most[1], extra[1]))
            found = [*_faults(trial, outcome), *_excess(kind, *extra), *_strangers(tmp_path, place, before)]
            faults += [f"{trial.name}: {fault}\n    {outcome.err[-600:]}" for fault in found]
        assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
        most_more = f"at most {max(0, most[0]) / 1e6:.0f} MB and {max(0, most[1]):.2f} s more than honest input"
        seen = f"{len(tried)} of {len(tried)} without harm, {most_more}"
        record_property("seen", seen)

    return check


def _room(trial: Trial) -> str:
    return "shard_tools" if trial.module.startswith("shard_tools") else "fastssl"


def _faults(trial: Trial, outcome: Outcome) -> Iterator[str]:
    if outcome.code < 0:
        yield f"ended by signal {-outcome.code} after {outcome.wall_s:.1f} s"
    elif outcome.code == 0 and not trial.may_pass:
        yield "was accepted"
    elif outcome.code not in (0, *_REFUSALS):
        yield f"ended with {outcome.code}"
    if "Traceback" in outcome.err:
        yield "has a traceback"
    if outcome.code in _REFUSALS and outcome.err.count("error: ") == 0:
        yield "says nothing"
    if outcome.code in _REFUSALS and len(outcome.err.splitlines()[-1]) > 6000:
        yield "says too much"
    if _STEERS.search(outcome.out + outcome.err):
        yield f"printed {_STEERS.findall(outcome.out + outcome.err)[:3]!r}"
    if any(secret in outcome.out + outcome.err for secret in _SECRETS):
        yield "printed a secret"


def _excess(kind: Kind, memory: int, cpu_s: float) -> Iterator[str]:
    if memory > kind.memory:
        yield f"took {memory / 1e6:.0f} MB more than honest input"
    if cpu_s > kind.cpu_s:
        yield f"took {cpu_s:.2f} s more than honest input"


def _tree(folder: Path, out: Path) -> set[str]:
    """Every path below `folder` but `out`; of links, what they point to does not count."""
    found = set()
    for path in folder.iterdir():
        if path != out:
            found.add(str(path))
            found.update(str(below) for below in path.rglob("*") if "/in/" not in str(below))
    return found


def _strangers(folder: Path, place: Place, before: set[str]) -> Iterator[str]:
    """What was made where nothing was to be made; it is removed, so that only one trial is blamed for it."""
    for path in sorted(_tree(folder, place.out) - before, reverse=True):
        yield f"made {path}"
        Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()


@pytest.mark.fault(
    "hostile tars: paths that leave, links, devices, claims of size, pickles, code",
    "refused, or read without harm",
    exit_code=2,
)
def test_tars(refuses):
    refuses(shards.tars)


@pytest.mark.fault(
    "hostile index.npy, labels.npy, .idx: pickled objects, code as header, 10^12 rows", "refused", exit_code=2
)
def test_indexes(refuses, tiny_shards):
    refuses(shards.indexes, tiny_shards)


@pytest.mark.fault(
    "hostile manifests: names that leave, nests, huge numbers, control characters",
    "refused, or printed escaped",
    exit_code=2,
)
def test_manifests(refuses, tiny_shards):
    refuses(shards.manifests, tiny_shards)


@pytest.mark.fault(
    "PostScript and pixel bombs called JPEG, wherever images are decoded", "no Ghostscript, no decoding", exit_code=2
)
def test_decoders(refuses, tiny_shards):
    refuses(shards.decoders, tiny_shards)


@pytest.mark.fault(
    "hostile lists of labels, classes, files, keys and splits", "refused, or taken as names", exit_code=2
)
def test_lists(refuses):
    refuses(text.lists)


@pytest.mark.fault(
    "overrides with _target_, resolvers, Hydra's own settings, paths, nests",
    "refused before anything is composed",
    exit_code=2,
)
def test_overrides(refuses, tiny_shards):
    refuses(settings.overrides, tiny_shards)


@pytest.mark.fault(
    "config files with tags, aliases, resolvers, _target_, Hydra's own settings",
    "refused before they are parsed",
    exit_code=2,
)
def test_config_files(refuses, tiny_shards):
    refuses(settings.config_files, REPOSITORY / "configs", tiny_shards)


@pytest.mark.fault(
    "weight files with code, bombs and false claims: .pt, .pth.tar, .safetensors, DCP folders",
    "refused before a tensor is made",
    exit_code=2,
)
def test_weights(refuses):
    refuses(weights.weights)


@pytest.mark.fault("checkpoints of our own format with code, hostile settings and names", "refused", exit_code=2)
def test_checkpoints(refuses):
    refuses(weights.checkpoints)


@pytest.mark.fault("CIFAR-10 batches whose pickles call, nest or claim", "refused; nothing is ever called", exit_code=2)
def test_cifar(refuses):
    refuses(sources.cifar)


@pytest.mark.fault("HDF5 files with links to other files, huge claims and chunks", "refused", exit_code=2)
def test_hdf5(refuses):
    refuses(sources.hdf5)


@pytest.mark.fault("FITS files with huge claims, gzip bombs, endless headers", "refused", exit_code=2)
def test_fits(refuses):
    refuses(sources.fits)


@pytest.mark.fault("VOC annotations with entities, nests and false numbers; lists that leave", "refused", exit_code=2)
def test_xml(refuses):
    refuses(sources.xml)


@pytest.mark.fault(
    "COCO annotations with paths that leave, false boxes, polygons and run lengths", "refused", exit_code=2
)
def test_coco(refuses):
    refuses(sources.coco)


@pytest.mark.fault("hostile tuned loader settings and benchmark records", "not used, or refused", exit_code=2)
def test_notes(refuses, tiny_shards):
    refuses(settings.notes, tiny_shards)


@pytest.mark.fault(
    "URLs of pipes, files and other protocols; redirects; braces; credentials in an address",
    "refused, no secret printed",
    exit_code=2,
)
def test_urls(refuses, redirects):
    refuses(text.urls, redirects)


@pytest.mark.fault("links and names that lead out of the folder to write to", "nothing is written outside", exit_code=2)
def test_paths(refuses, tiny_shards, tmp_path):
    refuses(text.paths, tiny_shards)
    victim = tmp_path / "in/victim"
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "kept"


@pytest.mark.fault(
    "file names that would steer a terminal, a shell or an option parser", "printed escaped, never run", exit_code=2
)
def test_names(refuses):
    refuses(text.names)


class _Redirects(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = self.path.split("/")[1].partition("?")[0]
        host = f"http://127.0.0.1:{self.server.server_address[1]}"
        targets = {
            "to-file": "file:///etc/passwd",
            "to-loop": f"{host}/to-loop/x",
            "to-other": "http://127.0.0.1:1/x",
            "to-data": "data:application/json,{}",
            "to-gopher": "gopher://127.0.0.1:1/x",
        }
        if where in targets:
            self.send_response(302)
            self.send_header("Location", targets[where])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = b"[" * 10**6 if where == "deep" else bytes(10**6)
        self.send_response(200)
        if where == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if where != "endless":
            self.send_header("Content-Length", {"huge": str(10**12), "liar": "10"}.get(where, str(len(body))))
        self.end_headers()
        if self.command == "GET":
            try:
                for _ in range(400 if where in ("endless", "huge") else 1):
                    self.wfile.write(body)
            except OSError:
                pass

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def redirects() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirects)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()

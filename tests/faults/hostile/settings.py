"""Overrides, config files, and what one run leaves for another one to read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.hostile import CALLS, ESCAPE, EVALUATE, LONG, TRAIN, Kind, Payload, Place, Trial, sparse_file
from tests.shard_tools.builders import plant


def overrides(place: Place, shards: Path) -> Kind:
    """Settings of the command line. Hydra's own groups and search path may not be touched, nor anything be called."""
    evil = plant(place.folder("configs"), {"evil.yaml": f"_target_: os.system\n_args_: [{place.shell!r}]\n".encode()})
    plant(place.root / "package", {"canary_maker/__init__.py": place.python.encode(), "canary_maker/x.yaml": b"a: 1"})
    path = {"PYTHONPATH": str(place.root / "package"), "SECRET_TOKEN": "t0ps3cret"}
    call = "{_target_: os.system, command: '" + place.shell + "'}"
    texts = [
        f"+x={call}",
        f"method={call}",
        f"+method.extra={call}",
        "+x={_target_: numpy.load, allow_pickle: true}",
        "+x={_target_: torch.load, weights_only: false}",
        "+x={_target_: torch.hub.load, source: local}",
        "+x={_target_: builtins.open, file: canary, mode: w}",
        "+x={_target_: pathlib.Path.write_text}",
        "+x={_partial_: true}",
        "+x={_args_: [1]}",
        "+x={_recursive_: true}",
        "+x={_convert_: all}",
        "+method._target_=os.system",
        "++run._target_=os.system",
        "+x._partial_=true",
        "run.dir=${oc.env:SECRET_TOKEN}",
        "run.dir=${oc.env:HOME}",
        "run.dir=${oc.decode:1}",
        f"run.dir=${{eval:{place.python}}}",
        "run.dir=${oc.create:{a: 1}}",
        "run.dir=${hydra:runtime.cwd}",
        "run.dir=${now:%Y}",
        "run.dir='${run.dir}'",
        "run.dir=\\${oc.env:HOME}",
        f"run.dir=!!python/object/apply:os.system ['{place.shell}']",
        "+x='!!python/name:os.system'",
        "hydra.run.dir=" + str(place.canary),
        "+hydra.run.dir=x",
        "++hydra.job.chdir=true",
        "hydra.output_subdir=" + str(place.canary),
        "hydra/launcher=joblib",
        "hydra/launcher=basic",
        "hydra/job_logging=none",
        "hydra/sweeper=basic",
        "+hydra/callbacks=x",
        f"+hydra.callbacks.x={call}",
        "hydra.mode=MULTIRUN",
        "~hydra",
        "~hydra.run",
        f"hydra.searchpath=[file://{evil}]",
        "hydra.searchpath=[pkg://canary_maker]",
        "hydra.searchpath=[pkg://os]",
        f"--config-path={evil}",
        f"--config-dir={evil}",
        "--config-name=evil",
        "--multirun",
        "-m",
        "--cfg=job",
        "--run",
        "--package=x",
        "--hydra-help",
        "--info=all",
        "--experimental-rerun=x",
        "--shell-completion=install=bash",
        f"recipe=../../{'../' * 12}{evil}/evil",
        f"recipe={evil}/evil",
        "recipe=../method/moco_v2",
        "method=../train",
        "recipe=file:///etc/passwd",
        f"+{evil}/evil@run=x",
        "method@_global_=moco_v1",
        "+recipe@_global_=demo",
        "method=[moco_v1,moco_v2]",
        "method=moco_v1,moco_v2",
        "defaults=[]",
        "+defaults=[evil]",
        "run.seed=1,2",
        "run.seed=range(1,1000000000)",
        "run.seed=choice(1,2)",
        "run.seed=glob(*)",
        "run.seed=interval(0,1)",
        "run.seed=sort(3,2,1)",
        "run.seed=shuffle(range(1,100000000))",
        "run.seed=int(" + "9" * 5000 + ")",
        "run.seed=" + "9" * 100_000,
        "run.seed=1e999",
        "run.seed=nan",
        "optim.lr=nan",
        "optim.lr=inf",
        "run.batch_size=-1",
        f"run.dir={LONG}\0",
        "run.dir=",
        "=x",
        "~",
        "+",
        "++",
        "@",
        "run.seed",
        "run..seed=1",
        "run.seed=[" * 50,
        "run.seed={a:" * 50,
        "run.seed=" + "[" * 20_000,
        "+x=" + "[" * 5_000 + "]" * 5_000,
        "+x=" + "{a:" * 5_000 + "1" + "}" * 5_000,
        "run.dir=" + "y" * 2**21,
        f"{ESCAPE}=1",
        f"run.seed={ESCAPE}",
        f"run.{ESCAPE}=1",
        "run.seed='\x07\x1b]52;c;x\x07'",
        "method.name=/canary",
        "method.name=../../canary",
        "method.name=**/x",
        f"method.name={ESCAPE}",
        "method.name=[a]",
        "encoder.name=timm/hf-hub:a/b",
        "encoder.name=timm/../x",
        "encoder.width=1e18",
        "views.query.size=1000000000",
        "views.query.count=1000000000000",
        "augment._target_=os.system",
    ]
    base = ("--print-config", f"data.root={shards}", f"run.dir={place.out}")
    # These are no harm where they are settings as any other; that none of them does any is what is tested.
    harmless = (
        "run.seed=sort",
        "run.seed=int(",
        "run.dir=",
        "encoder.",
        "views.",
        "+x='!!",
        "optim.lr=",
        "method.name=",
        "run.seed='",
    )
    hostile = [
        Trial(text[:60], TRAIN, (*base, text), text.startswith(harmless) and "${" not in text, path) for text in texts
    ]
    many = tuple(f"+x.a{i}=1" for i in range(20_000))
    hostile.append(Trial("20,000 overrides", TRAIN, (*base, *many), environment=path))
    hostile += [
        Trial(
            "evaluate: evaluator name",
            EVALUATE,
            ("evaluator.name=os.system", "checkpoint=random", f"data.root={shards}"),
            environment=path,
        ),
        Trial(
            "evaluate: _target_",
            EVALUATE,
            (f"+evaluator.x={call}", "checkpoint=random", f"data.root={shards}"),
            environment=path,
        ),
        Trial(
            "bench: searchpath",
            "fastssl.bench.main",
            ("mode=step", "hydra.searchpath=[pkg://canary_maker]"),
            environment=path,
        ),
        Trial(
            "detect: recipe above",
            "fastssl.detection.train",
            (f"detection={evil}/evil", "checkpoint=random"),
            environment=path,
        ),
        Trial(
            "views: hydra.run.dir",
            "fastssl.show_views",
            (f"hydra.run.dir={place.canary}", f"data.root={shards}"),
            environment=path,
        ),
    ]
    return Kind(Trial("honest", TRAIN, base), hostile)


def config_files(place: Place, configs: Path, shards: Path) -> Kind:
    """A recipe that somebody shared, put beside ours: a config file is data, too."""
    lol = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [" + ",".join([f"*{a}"] * 9) + "]\n" for a, b in zip("abcdefgh", "bcdefghi")
    )
    texts = {
        "_target_": f"# @package _global_\nrun: {{_target_: os.system, command: '{place.shell}'}}\n",
        "_target_ in a free group": f"# @package _global_\naugment: {{_target_: os.system, x: '{place.shell}'}}\n",
        "_partial_": "# @package _global_\naugment: {_partial_: true}\n",
        "python/object/apply": f"# @package _global_\nrun: !!python/object/apply:os.system ['{place.shell}']\n",
        "python/name": "# @package _global_\naugment: {x: !!python/name:os.system}\n",
        "python/module": "# @package _global_\naugment: {x: !!python/module:canary_maker}\n",
        "own tag": "# @package _global_\nrun: !shell touch\n",
        "environment": "# @package _global_\nrun: {dir: '${oc.env:SECRET_TOKEN}'}\n",
        "environment in a key's middle": "# @package _global_\nrun: {dir: 'a${oc.env:SECRET_TOKEN,x}b'}\n",
        "nested resolver": "# @package _global_\nrun: {dir: '${oc.env:${oc.env:NAME}}'}\n",
        "eval": f"# @package _global_\nrun: {{dir: \"${{eval:'{place.python}'}}\"}}\n",
        "decode": "# @package _global_\nrun: {seed: '${oc.decode:1}'}\n",
        "loop of references": "# @package _global_\nrun: {dir: '${run.dir}'}\n",
        "bomb of 131 bytes": "\n".join(lol.split("\n")[:4]),
        "bomb of 166 bytes": "\n".join(lol.split("\n")[:5]),
        "bomb of 236 bytes": "\n".join(lol.split("\n")[:7]),
        "bomb of 9 levels": lol,
        "merge bomb": "a: &a {x: 1}\n"
        + "".join(f"b{i}: &b{i} {{<<: [*" + (f"b{i - 1}" if i else "a") + ", *a]}\n" for i in range(200)),
        "loop of an alias": "a: &a [*a]\n",
        "references to references": "# @package _global_\naugment:\n"
        + "".join(f"  x{i}: [" + ",".join([f"'${{augment.x{i + 1}}}'"] * 4) + "]\n" for i in range(16))
        + "  x16: 1\n",
        "2 MiB": "# @package _global_\naugment: {x: '" + "y" * 2**21 + "'}\n",
        "deep lists": "a: " + "[" * 50_000,
        "deep groups": "a: " + "{a: " * 50_000,
        "10^6 digits": "run: {seed: " + "9" * 10**6 + "}\n",
        "sexagesimal": "run: {seed: " + "1:" * 3000 + "1}\n",
        "Hydra's own": f"# @package _global_\nhydra: {{run: {{dir: {place.canary}}}}}\n",
        "search path": "# @package _global_\nhydra: {searchpath: ['pkg://canary_maker']}\n",
        "callbacks": f"# @package _global_\nhydra: {{callbacks: {{x: {{_target_: os.system, x: '{place.shell}'}}}}}}\n",
        "default above": "defaults: [/../../../../../../../../etc/passwd]\n",
        "default of Hydra": "defaults: [{override /hydra/launcher: joblib}]\n",
        "not UTF-8": "\udcff\udcfe",
        "zero bytes": "a: \0\n",
        "control characters": f'# @package _global_\nrun: {{dir: "{ESCAPE}"}}\n',
        "escaped control characters": '# @package _global_\nrun: {"\\e[2J": 1}\n',
        "two documents": "a: 1\n---\nb: 2\n",
        "a list": "[1, 2]\n",
        "a number": "7\n",
    }
    package = place.root / "package"
    plant(package, {"canary_maker/__init__.py": place.python.encode()})
    environment = {"PYTHONPATH": str(package), "SECRET_TOKEN": "t0ps3cret", "NAME": "SECRET_TOKEN"}
    base = ("--print-config", f"data.root={shards}", f"run.dir={place.out}")
    hostile = []
    for number, (name, text) in enumerate(texts.items()):
        copy = place.root / f"configs-{number}"
        shutil.copytree(configs, copy)
        (copy / "recipe/shared.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        arguments = ("train", str(copy), *base[:2], *(() if "run:" in text else base[2:]), "recipe=shared")
        hostile.append(Trial(name, CALLS, arguments, environment=environment))
    return Kind(Trial("honest", CALLS, ("train", str(configs), *base)), hostile)


def notes(place: Place, shards: Path) -> Kind:
    """Loader settings found by tuning, benchmark records: JSON that one run leaves and another one reads."""
    from fastssl import tuned
    from fastssl.config import load

    base = ("--print-config", f"data.root={shards}", f"run.dir={place.out}")
    cfg = load(base[1:])
    good = {
        "format": tuned.FORMAT,
        "method": "moco_v2",
        "machine": tuned.this_machine(cfg),
        "views": tuned.views_digest(cfg),
        "backend": "exact",
        "threads": 1,
        "prefetch": 2,
        "objective": "train",
        "images_per_s": 1.0,
        "date": "2026-01-01",
    }
    hostile = []
    values: dict[str, Mapping[str, Any]] = {
        "backend code": {"backend": place.python},
        "backend a path": {"backend": "../../x"},
        "backend a list": {"backend": []},
        "10^9 threads": {"threads": 10**9},
        "-1 threads": {"threads": -1},
        "threads text": {"threads": "all"},
        "threads infinite": {"threads": float("inf")},
        "threads true": {"threads": True},
        "10^9 ahead": {"prefetch": 10**9},
        "ahead a list": {"prefetch": [1]},
        "date of control characters": {"date": ESCAPE + "\n"},
        "method a path": {"method": "../../canary"},
        "more keys": {"_target_": "os.system"},
        "machine a list": {"machine": [1]},
    }
    texts = {f"tuned: {name}": json.dumps({**good, **value}).encode() for name, value in values.items()}
    raw = {
        "deep": b"[" * 10**6,
        "10^6 digits": b'{"threads": ' + b"9" * 10**6 + b"}",
        "code": place.python.encode(),
        "a pickle": pickle.dumps(Payload(place.shell)),
        "not UTF-8": b"\xff\xfe",
        "YAML": f"!!python/object/apply:os.system ['{place.shell}']".encode(),
        "a list": b"[]",
        "empty": b"",
        "1 TiB of zeros": None,
    }
    texts |= {f"tuned: {name}": content for name, content in raw.items()}
    method = str(cfg.method["name"])
    for number, (name, content) in enumerate(texts.items()):
        folder = place.folder(f"tuned-{number}")
        _put(folder / f"{method}-x.json", content)
        hostile.append(Trial(name, TRAIN, base, may_pass=True, environment={"FASTSSL_TUNED": str(folder)}))
    from fastssl.bench.record import machine

    record = {
        "format": "fastssl-bench",
        "version": 1,
        "what": "w",
        "command": "c",
        "figures": {"a/images_per_s": {"unit": "images/s", "median": 1.0, "rounds": [1.0, 2.0, 3.0]}},
        "settings": {"mode": "step"},
        "versions": {},
        "machine": {**machine(), "gpu": None},
        "commit": "",
        "date": "",
        "note": "",
    }

    def figures(value: Any) -> dict[str, Any]:
        return {"figures": {"a/images_per_s": value}}

    inf = float("inf")
    changes: dict[str, tuple[Mapping[str, Any], bool]] = {
        "rounds empty": (figures({"unit": "images/s", "rounds": []}), False),
        "rounds text": (figures({"unit": "images/s", "rounds": ["a"]}), False),
        "rounds a string": (figures({"unit": "images/s", "rounds": "123"}), False),
        "rounds infinite": (figures({"unit": "images/s", "rounds": [inf, -inf, inf]}), False),
        "rounds NaN": (figures({"unit": "images/s", "rounds": [float("nan")] * 3}), False),
        "rounds a group": (figures({"unit": "images/s", "rounds": {"1": 1}}), False),
        "10^6 rounds": (figures({"unit": "images/s", "rounds": [1.0] * 10**6}), False),
        "unit a list": (figures({"unit": [], "rounds": [1.0] * 3}), False),
        "unit of control characters": (figures({"unit": ESCAPE, "rounds": [1.0] * 3}), True),
        "a figure of control characters": (
            {"figures": {ESCAPE + "[red]/x": {"unit": "images/s", "rounds": [1.0] * 3}}},
            True,
        ),
        "a figure of markup": ({"figures": {"[/]/images_per_s": {"unit": "images/s", "rounds": [1.0] * 3}}}, True),
        "settings text": ({"settings": place.python}, False),
        "settings a list": ({"settings": [1]}, False),
        "mode of control characters": ({"settings": {"mode": ESCAPE}}, False),
        "machine a list": ({"machine": [1]}, False),
        "cpu of control characters": ({"machine": {"cpu": ESCAPE}}, False),
        "versions a number": ({"versions": 7}, False),
        "more keys": ({"_target_": "os.system"}, False),
        "figures a list": ({"figures": [1]}, False),
        "version 10^9": ({"version": 10**9}, False),
        "what a list": ({"what": [1]}, True),
        "commit of control characters": ({"commit": ESCAPE}, True),
    }
    records = {
        f"record: {name}": (json.dumps({**record, **change}).encode(), may) for name, (change, may) in changes.items()
    }
    records |= {f"record: {name}": (content, False) for name, content in raw.items()}  # type: ignore[misc]
    for number, (name, (content, may)) in enumerate(records.items()):
        path = place.root / f"record-{number}.json"
        _put(path, content)
        hostile.append(Trial(name, CALLS, ("record", str(path)), may))
    return Kind(Trial("honest", TRAIN, base), hostile)


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        sparse_file(path)
    else:
        path.write_bytes(content)

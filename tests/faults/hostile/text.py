"""Lists, addresses and names: whatever is a line of text."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

from tests.faults.hostile import ESCAPE, EVALUATE, EXPORT, LONG, SHARDS, TRAIN, Kind, Place, Trial, tar
from tests.shard_tools.builders import class_tree, jpeg, plant


def lists(place: Place) -> Kind:
    """Ground truth, class names, lists of files, keys: whatever is a line of text."""
    imagenet = place.root / "imagenet"
    wnids = ("n00000001", "n00000002")
    plant(imagenet, {f"train/{wnid}/{i}.JPEG": jpeg(i) for i, wnid in enumerate(wnids)})
    plant(imagenet, {f"val/{i}.JPEG": jpeg(i) for i in range(2)})
    folder = plant(place.root / "wds", {"x.tar": tar([("a.jpg", jpeg(1)), ("a.cls", b"1")])})
    tree = class_tree(place.root / "tree", 2)
    lines = {
        "a shell": f"$({place.shell})\n`{place.shell}`\n",
        "options": "-rf\n--overwrite\n",
        "control characters": f"{ESCAPE}\n{ESCAPE}x\n",
        "4,096 characters": f"{LONG}\n{LONG}y\n",
        "10^6 digits": f"{'9' * 10**6}\n{'9' * 10**6}\n",
        "negative": "-1\n-2\n",
        "paths": "../../canary\n/etc/passwd\n",
        "code": f"{place.python}\n{place.python} \n",
        "not text": "\udcff\udcfe\n\0\0\n",
        "empty": "",
        "NaN": "nan\ninf\n",
    }
    hostile = []
    for number, (name, text) in enumerate(lines.items()):
        file = place.root / f"list-{number}.txt"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        out = str(place.out / f"list-{number}")
        shutil.copytree(folder, place.root / f"wds-{number}")
        for what, arguments, may_pass in (
            (
                "--val-labels",
                ("pack", "imagenet", str(imagenet), out, "--split", "val", "--val-labels", str(file)),
                False,
            ),
            ("--classes", ("index", str(place.root / f"wds-{number}"), "--classes", str(file), "--workers", "1"), True),
            ("--subset-file", ("pack", "imagefolder", str(tree), out, "--subset-file", str(file)), False),
            ("--keys", ("extract", str(folder), "--keys", text.split("\n")[0].replace("\0", ""), out), False),
            (
                "--split",
                (
                    "pack",
                    "files",
                    str(tree),
                    out,
                    f"--split={text.splitlines()[0] if text else ''}".replace("\0", ""),
                    "--workers",
                    "1",
                ),
                False,
            ),
        ):
            may = may_pass or (what == "--split" and name in ("NaN", "10^6 digits", "empty"))
            hostile.append(Trial(f"{name}, {what}", SHARDS, arguments, may))
    csv = place.root / "LOC_val_solution.csv"
    csv.write_text(
        f'ImageId,PredictionString\n"$({place.shell})","{ESCAPE}"\n=cmd|\'{place.shell}\'!A1,n00000001 1 2\n'
    )
    arguments = ("pack", "imagenet", str(imagenet), str(place.out / "csv"), "--split", "val", "--val-labels", str(csv))
    hostile.append(Trial("CSV of formulas", SHARDS, arguments))
    mat = place.root / "kit"
    plant(mat, {"meta.mat": zlib.compress(bytes(10**8), 1), "ground_truth.txt": b"1\n2\n"})
    arguments = (*arguments[:-1], str(mat / "ground_truth.txt"))
    hostile.append(Trial("meta.mat that inflates", SHARDS, arguments))
    with (place.root / "zeros.txt").open("wb") as file:
        file.truncate(2**40)
    zeros = str(place.root / "zeros.txt")
    hostile.append(Trial("1 TiB of zeros, --val-labels", SHARDS, (*arguments[:-1], zeros)))
    hostile.append(
        Trial(
            "1 TiB of zeros, --subset-file",
            SHARDS,
            ("pack", "files", str(tree), str(place.out / "z"), "--subset-file", zeros),
        )
    )
    hostile.append(Trial("1 TiB of zeros, --classes", SHARDS, ("index", str(folder), "--classes", zeros)))
    for split in ("../canary", str(place.canary), "a/b", "..", "", "-rf", "a\nb", f"$({place.shell})"):
        arguments = ("pack", "files", str(tree), str(place.out / "splits"), f"--split={split}", "--workers", "1")
        hostile.append(Trial(f"--split {split!r}", SHARDS, arguments, may_pass=split == ""))
    honest = ("pack", "imagefolder", str(tree), str(place.out / "lists"), "--workers", "1")
    return Kind(Trial("honest", SHARDS, honest), hostile)


def urls(place: Place, server: str) -> Kind:
    """Addresses of shards; `server` answers with redirects to a file, to itself, or with an endless body."""
    secret = "hunter2"
    places = [
        f"pipe:{place.shell}",
        f"pipe:{place.shell} |",
        f"| {place.shell}",
        f"`{place.shell}`",
        f"$({place.shell})",
        f"; {place.shell}",
        f"exec:{place.shell}",
        f"ssh://h/$({place.shell})",
        "file:///etc/passwd",
        "file://evil.example/x",
        "file:///../../etc",
        "file:/etc/passwd",
        "gopher://127.0.0.1:1/x",
        "dict://127.0.0.1:1/x",
        "ftp://u:hunter2@127.0.0.1:1/x",
        "sftp://127.0.0.1:1/x",
        "jar:http://x!/y",
        "data:application/json,{}",
        "data://text/plain;base64,e30=",
        "local:///etc",
        "memory://x",
        "filecache::http://127.0.0.1:1/x",
        "simplecache::file:///etc/passwd",
        "zip://x::file:///etc/passwd",
        "reference://x",
        "github://a:b@c/d",
        "hdfs://127.0.0.1:1/x",
        "smb://127.0.0.1/x",
        "gdrive://x",
        "python://os",
        "http://",
        "http:///x",
        "http://[::1",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:-1/x",
        "http://127.0.0.1:x/",
        "://x",
        "http://\0/x",
        f"http://{ESCAPE}/x",
        f"http://127.0.0.1:1/{ESCAPE}",
        f"http://u:{secret}@127.0.0.1:1/x?token={secret}#{secret}",
        f"https://127.0.0.1:1/x?X-Amz-Signature={secret}",
        "http://127.0.0.1:1/" + "x" * 10**5,
        "http://127.0.0.1:1/a\r\nHost: evil/x",
        f"{server}/to-file",
        f"{server}/to-loop",
        f"{server}/to-other",
        f"{server}/to-data",
        f"{server}/to-gopher",
        f"{server}/huge",
        f"{server}/endless",
        f"{server}/gzip",
        f"{server}/liar",
        f"{server}/deep",
    ]
    cache = place.root / "cache"
    environment = {"FASTSSL_CACHE": str(cache), "NO_PROXY": "*", "no_proxy": "*"}
    remote = ("data.remote.attempts=1", "data.remote.timeout_s=2", f"data.remote.cache={cache}")
    hostile = []
    for url in places:
        if "127.0.0.1:1" not in url and server not in url:
            hostile.append(Trial(f"info {url[:40]}", SHARDS, ("info", url), environment=environment))
        if "=" not in url and "," not in url and "`" not in url:
            arguments = ("checkpoint=random", f"data.root='{url}'", *remote, "evaluator=knn")
            hostile.append(Trial(f"evaluate {url[:40]}", EVALUATE, arguments, environment=environment))
    patterns = [
        "{0..999999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{0..99}" * 20,
        "{a,b}" * 40,
        "{{{{{{{{",
        "{" * 10**5,
        "{0..9" * 10**4,
        "{9..0}.tar",
        f"{{0..{'9' * 5000}}}",
        "{a..z}",
        "{}",
        f"pipe:{place.shell}",
        f"x-{{0..1}}.tar::pipe:{place.shell}",
        "http://127.0.0.1:1/x.tar",
        "s3://b/x.tar",
        "gs://b/x.tar",
        "../../../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        f"-{ESCAPE}",
        "\0",
        "hf://x/y.tar",
        f"$({place.shell}).tar",
    ]
    for pattern in patterns:
        arguments = ("pack", "webdataset", "--split", "train", "--", pattern, str(place.out / "patterns"))
        hostile.append(Trial(f"pack {pattern[:40]}", SHARDS, arguments))
    return Kind(Trial("honest", EVALUATE, ("--version",)), hostile, cpu_s=1.0)


def paths(place: Place, shards: Path) -> Kind:
    """Folders to write to that lead elsewhere: through a link in the place of a file, or a name."""
    victim = place.root / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    hostile = []
    out = place.folder("extract")
    for row in range(3):
        (out / f"{row:09d}.jpg").symlink_to(victim / f"made-{row}")
    hostile.append(Trial("extract onto a dangling link", SHARDS, ("extract", str(shards), "--keys", "0", str(out))))
    for number, name in enumerate(
        (
            "manifest.json",
            "train-000000.tar",
            "train-000000.tar.partial",
            "index.npy.partial",
            "manifest.json.partial",
            "pack.journal",
            "pack.journal.partial",
            "index.npy",
        )
    ):
        dst = place.folder(f"dst-{number}")
        (dst / "train").mkdir()
        (dst / "train" / name).symlink_to(victim / "kept")
        tree = class_tree(place.root / f"tree-{number}", 1)
        hostile.append(
            Trial(
                f"pack onto a link as {name}",
                SHARDS,
                ("pack", "imagefolder", str(tree), str(dst), "--overwrite", "--workers", "1"),
                True,
            )
        )
    run = place.folder("run")
    evil_names = [f"evaluator.name={place.canary}", "evaluator.name=../../canary", f"evaluator.name={ESCAPE}"]
    rest = (f"data.root={shards}", f"run.dir={run / 'x'}")
    evaluated = ("checkpoint=random", f"data.root={shards}", f"eval.out={run}")
    hostile += [Trial(f"evaluate {text[:40]}", EVALUATE, (text, *evaluated)) for text in evil_names]
    methods = ("method.name=../../canary", f"method.name={place.canary}")
    hostile += [Trial(f"train {text[:40]}", TRAIN, (text, *rest)) for text in methods]
    splits = ("../train", str(shards / "train"), "../../canary", "a\0b", LONG, ESCAPE)
    hostile += [Trial(f"data.split={split[:20]!r}", TRAIN, (f"data.split='{split}'", *rest)) for split in splits]
    return Kind(Trial("honest", SHARDS, ("info", str(shards))), hostile, cpu_s=1.0)


def names(place: Place) -> Kind:
    """File and folder names that would steer a terminal, a shell or an option parser."""
    hostile = []
    odd = [
        f"{ESCAPE}.jpg",
        "a\nerror: all is well.jpg",
        "a\rb.jpg",
        f"$({place.shell}).jpg",
        f"`{place.shell}`.jpg",
        "-rf.jpg",
        "--overwrite.jpg",
        "\u202egpj.exe.jpg",
        "\udcff\udcfe.jpg",
        "a\tb\x08.jpg",
        "[red]x[/red].jpg",
        "{0.__class__}%s%n.jpg",
        "x" * 250 + ".jpg",
        "\x9b2J.jpg",
    ]
    for number, name in enumerate(odd):
        for bad in (False, True):
            tree = place.root / f"{number}-{bad}"
            plant(tree, {f"{name[:-4]}/{name}": b"no image" if bad else jpeg(number), "b/b.jpg": jpeg(1)})
            out = str(place.out / f"names-{number}-{bad}")
            for source in ("imagefolder", "files"):
                arguments = ("pack", source, str(tree), f"{out}-{source}", "--workers", "1")
                hostile.append(
                    Trial(f"{name!r} {source} {'bad' if bad else 'good'}", SHARDS, arguments, may_pass=not bad)
                )
            if bad:
                arguments = (
                    "pack",
                    "imagefolder",
                    str(tree),
                    f"{out}-quarantined",
                    "--on-bad",
                    "quarantine",
                    "--workers",
                    "1",
                )
                hostile.append(Trial(f"{name!r} quarantined", SHARDS, arguments, may_pass=True))
        hostile.append(
            Trial(f"{name!r} as SRC", SHARDS, ("pack", "files", "--", f"./{name}/x", str(place.out / "src")))
        )
        hostile.append(Trial(f"{name!r} as DIR", SHARDS, ("verify", f"./{name}/x")))
        hostile.append(
            Trial(f"{name!r} as CHECKPOINT", EXPORT, ("safetensors", f"./{name}/x", str(place.out / "x.safetensors")))
        )
        hostile.append(Trial(f"{name!r} as OUT", EXPORT, ("safetensors", "x", str(place.out / f"{name}/x"))))
    tree = class_tree(place.root / "honest", 1)
    return Kind(
        Trial("honest", SHARDS, ("pack", "imagefolder", str(tree), str(place.out / "names"), "--workers", "1")), hostile
    )

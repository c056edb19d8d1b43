"""The wheel: holds the configs, and works in another environment, from a folder with decoys of our package names."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = folder.glob("fastssl_train-*.whl")
    return path


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """(bin folder, working directory with decoys): only the wheel is installed there; its dependencies are lent."""
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "env", with_pip=False, symlinks=True)
    python = root / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = (root / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file does not run that folder's own .pth files, so the checkout stays out of reach.
    (packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = root / "work"
    for decoy in ("pipelines", "shard_tools", "configs"):
        (work / decoy).mkdir(parents=True)
        (work / decoy / "__init__.py").write_text("raise RuntimeError('a decoy was imported')\n")
    return python.parent, work


def run(place, *command):
    folder, work = place
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program = [str(folder / command[0]), *command[1:]]
    return subprocess.run(program, cwd=work, env=environment, capture_output=True, text=True, timeout=240)


def test_the_wheel_holds_the_rooms_the_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastssl", "pipelines", "shard_tools", f"{wheel.name.split('-py3')[0]}.dist-info"}
    shipped = {name.removeprefix("fastssl/configs/") for name in names if name.startswith("fastssl/configs/")}
    ours = {str(p.relative_to(REPOSITORY / "configs")) for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert shipped == ours


def test_the_wheel_holds_the_kernel_and_says_so_in_its_tag(wheel, place):
    assert "pipelines/native/libviews.so" in zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-linux" in wheel.name
    script = "from pipelines.native import kernel; print(kernel.why_not() or kernel.LIBRARY)"
    done = run(place, "python", "-P", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "site-packages/pipelines/native/libviews.so" in done.stdout


def test_without_a_compiler_the_wheel_is_built_without_the_kernel(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(build, env={**os.environ, "CC": "/bin/false"}, capture_output=True, text=True, check=True)
    assert "without the native backend's kernel: the C compiler refused" in done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def test_the_code_that_runs_is_the_wheels(place):
    done = run(
        place,
        "python",
        "-P",
        "-c",
        "import fastssl, pipelines, shard_tools; print(fastssl.__file__, pipelines.__file__)",
    )
    assert done.returncode == 0, done.stderr
    assert str(REPOSITORY) not in done.stdout
    assert "site-packages" in done.stdout


@pytest.mark.parametrize("command", [("fastssl-train",), ("python", "-m", "fastssl.train")])
def test_settings_compose_from_any_folder_in_spite_of_decoys(place, command):
    done = run(place, *command, "data.root=x", "recipe=cifar10_moco_v2_cpu", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "queue_length: 4096" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "shard_tools",
        "fastssl-train",
        "fastssl-evaluate",
        "fastssl-views",
        "fastssl-bench",
        "fastssl-export",
        "fastssl-detect",
        "fastssl-reconstructions",
        "fastssl-submit",
    ],
)
def test_every_command_has_help(place, command):
    done = run(place, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() or command in done.stdout


def test_pack_and_train_from_the_wheel(place):
    _, work = place
    packed = run(place, "shard_tools", "pack", "demo", "shards", "--limit", "64")
    assert packed.returncode == 0, packed.stderr
    trained = run(
        place, "python", "-m", "fastssl.train", "recipe=demo", "data.root=shards", "run.dir=run", "run.device=cpu",
        "run.batch_size=16", "run.duration=2steps", "method.queue_length=16", "optim.warmup=0steps",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (work / "run" / "checkpoints" / "LAST").is_file()


def test_a_foreign_package_that_is_already_loaded_is_named(tmp_path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    script = "import sys; sys.path.insert(0, sys.argv[1]); import pipelines; import fastssl"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert f"package 'pipelines' was already imported from {tmp_path / 'pipelines'}" in done.stderr

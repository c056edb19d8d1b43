"""Our own code holds nothing that could run what it reads: a walk over the syntax of every module that is shipped."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.record import REPOSITORY

ROOMS = ("fastssl", "pipelines", "shard_tools")

# (module, what): why it is no danger
ALLOWED = {
    ("fastssl/weights/read.py", "pickle"): "for the name of its error, which torch.load raises; nothing is unpickled",
    ("fastssl/weights/detectron2.py", "pickle"): "dumps: the format that detectron2 reads is a pickle; none is read",
    ("fastssl/dist.py", "unpickling"): "objects of the same job's other ranks, which run the same code",
    ("fastssl/evaluate/svm.py", "joblib"): "Parallel, for processes; none of its files are read",
    ("pipelines/native/hatch_build.py", "a script of a name"): "when the package is built, of a file of the package",
    (
        "shard_tools/sources/voc07.py",
        "xml",
    ): "its parser refuses a document type, and without one there are no entities",
}

_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
    "xml",
    "code",
}
_CALLS = {
    "eval": "eval",
    "exec": "exec",
    "compile": "compile",
    "__import__": "import of a name",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "tempfile.mktemp": "mktemp",
    "importlib.import_module": "import of a name",
    "importlib.__import__": "import of a name",
    "runpy.run_path": "a script of a name",
    "runpy.run_module": "a script of a name",
    "hydra.utils.instantiate": "instantiate",
    "hydra.utils.call": "instantiate",
    "hydra.utils.get_class": "instantiate",
    "hydra.utils.get_method": "instantiate",
    "hydra.utils.get_object": "instantiate",
    "torch.hub.load": "code of others",
    "torch.package.PackageImporter": "code of others",
    "torch.jit.load": "code of others",
    "torch.distributed.checkpoint.load": "unpickling",
    "numpy.fromregex": "",
    "pandas.read_pickle": "unpickling",
    "OmegaConf.register_new_resolver": "a resolver",
    "OmegaConf.register_resolver": "a resolver",
}
_ENDINGS = {
    "extractall": "extraction",
    "extract": "extraction",
    "instantiate": "instantiate",
    "register_new_resolver": "a resolver",
    "Unpickler": "unpickling",
    "broadcast_object_list": "unpickling",
    "all_gather_object": "unpickling",
    "gather_object": "unpickling",
    "scatter_object_list": "unpickling",
    "recv_object_list": "unpickling",
}
_ALIASES = {"np": "numpy", "td": "torch.distributed"}


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every construct in a module's text that could run data, or put files where data says."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from (
                (line, name.split(".")[0]) for name in (a.name for a in node.names) if name.split(".")[0] in _MODULES
            )
        elif isinstance(node, ast.ImportFrom):
            yield from ((line, what) for what in _imported(node))
        elif isinstance(node, ast.Call):
            yield from ((line, what) for what in _called(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ("_target_", "_partial_"):
            yield line, "_target_"


def _imported(node: ast.ImportFrom) -> Iterator[str]:
    module = node.module or ""
    if module.split(".")[0] in _MODULES:
        yield module.split(".")[0]
    for alias in node.names:
        name = f"{module}.{alias.name}"
        if name in _CALLS:
            yield _CALLS[name]


def _called(node: ast.Call) -> Iterator[str]:
    name = _full_name(node.func)
    last = name.rpartition(".")[2]
    keywords = {word.arg: word.value for word in node.keywords}
    if name in _CALLS and not (name == "compile" and _is_regex(node)):
        yield _CALLS[name]
    elif "." in name and last in _ENDINGS and not name.startswith("re."):
        yield _ENDINGS[last]
    if name.endswith("torch.load") and not _is_true(keywords.get("weights_only")):
        yield "torch.load without weights_only=True"
    if _is_true(keywords.get("allow_pickle")):
        yield "allow_pickle"
    if name in ("numpy.load", "numpy.memmap.load") and not _is_false(keywords.get("allow_pickle")):
        yield "numpy.load without allow_pickle=False"
    if "shell" in keywords and not _is_false(keywords["shell"]):
        yield "a shell"
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"):
        loader = _full_name(keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else ast.Constant(None)))
        if not loader.endswith("SafeLoader"):
            yield "yaml without SafeLoader"
    if (
        last == "getattr"
        and len(node.args) > 1
        and _full_name(node.args[0]) in ("builtins", "os", "importlib", "sys.modules")
    ):
        yield "a function by name"


def _is_regex(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute)


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _full_name(node: ast.AST) -> str:
    """`numpy.load` of `np.load`; what is called on a result has a dot before its name."""
    if isinstance(node, ast.Name):
        return _ALIASES.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value)}.{node.attr}"
    return ""


def modules() -> list[Path]:
    return sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))


@pytest.mark.fault(
    "a call in our own code that could run data: eval, unpickling, a shell, extraction, an import by name",
    "found in the syntax; none is there",
)
def test_no_module_can_run_what_it_reads(record_property):
    found, paths = set(), modules()
    for path in paths:
        name = path.relative_to(REPOSITORY).as_posix()
        found.update((name, what, line) for line, what in dangers(path.read_text()))
    unexpected = sorted(entry for entry in found if entry[:2] not in ALLOWED | _LISTED)
    assert not unexpected, unexpected
    assert set(ALLOWED) <= {entry[:2] for entry in found}, "an exception is not needed any more"
    assert len(paths) > 100
    record_property("seen", f"{len(paths)} modules, {len(SNIPPETS)} forms of such calls seen in snippets")


# The list of what is refused has to name it.
_LISTED = {("fastssl/composable.py", "_target_"): ""}


def test_what_pickle_is_imported_for_is_not_unpickling():
    read = ast.parse((REPOSITORY / "fastssl/weights/read.py").read_text())
    write = ast.parse((REPOSITORY / "fastssl/weights/detectron2.py").read_text())
    used = [
        {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _full_name(node.value) == "pickle"}
        for tree in (read, write)
    ]
    assert used == [{"UnpicklingError"}, {"dumps"}]


def test_no_config_names_what_to_call():
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"_target_|_partial_|!!|\$\{\w+[:.]\w*:", text), path


SNIPPETS = {
    "eval(text)": "eval",
    "exec(text)": "exec",
    "compile(text, 'x', 'eval')": "compile",
    "__import__(name)": "import of a name",
    "import importlib\nimportlib.import_module(name)": "import of a name",
    "from importlib import import_module": "import of a name",
    "import pickle": "pickle",
    "from pickle import loads": "pickle",
    "import marshal": "marshal",
    "import shelve": "shelve",
    "import dill as d": "dill",
    "import joblib": "joblib",
    "import cloudpickle": "cloudpickle",
    "torch.load(path)": "torch.load without weights_only=True",
    "torch.load(path, weights_only=False)": "torch.load without weights_only=True",
    "torch.load(path, weights_only=safe)": "torch.load without weights_only=True",
    "np.load(path, allow_pickle=True)": "allow_pickle",
    "np.load(path)": "numpy.load without allow_pickle=False",
    "subprocess.run(text, shell=True)": "a shell",
    "subprocess.Popen(text, shell=flag)": "a shell",
    "os.system(text)": "a shell",
    "os.popen(text)": "a shell",
    "from os import system": "a shell",
    "yaml.load(text)": "yaml without SafeLoader",
    "yaml.load(text, Loader=yaml.Loader)": "yaml without SafeLoader",
    "yaml.unsafe_load(text)": "yaml without SafeLoader",
    "yaml.full_load(text)": "yaml without SafeLoader",
    "hydra.utils.instantiate(cfg)": "instantiate",
    "from hydra.utils import instantiate": "instantiate",
    "cfg['_target_']": "_target_",
    "archive.extractall(folder)": "extraction",
    "archive.extract(name)": "extraction",
    "from xml.etree import ElementTree": "xml",
    "import xml.sax": "xml",
    "tempfile.mktemp()": "mktemp",
    "from tempfile import mktemp": "mktemp",
    "torch.hub.load(repo, name)": "code of others",
    "torch.jit.load(path)": "code of others",
    "OmegaConf.register_new_resolver('eval', eval)": "a resolver",
    "pickle.Unpickler(file).load()": "unpickling",
    "td.all_gather_object(x, y)": "unpickling",
    "td.broadcast_object_list(x)": "unpickling",
    "getattr(builtins, name)": "a function by name",
    "runpy.run_path(path)": "a script of a name",
    "asyncio.create_subprocess_shell(text)": "a shell",
    "torch.distributed.checkpoint.load(state)": "unpickling",
    "subprocess.getoutput(text)": "a shell",
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_construct_is_seen(snippet):
    assert SNIPPETS[snippet] in [what for _, what in dangers(snippet)]


@pytest.mark.parametrize(
    "harmless",
    [
        "re.compile(text)",
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "subprocess.run([a, b])",
        "torch.compile(f)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "np.load(path, allow_pickle=False)",
        "json.loads(text)",
        "import zlib",
    ],
)
def test_what_is_harmless_is_not(harmless):
    assert list(dangers(harmless)) == []

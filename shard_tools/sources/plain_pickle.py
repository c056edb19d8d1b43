"""Pickles of plain data, read without Python's unpickler, which calls whatever a pickle names.

`pickletools` only splits a pickle into its operations; here are those that build dicts, lists, tuples, text, bytes,
whole numbers and arrays of bytes, as NumPy pickles them. Nothing is imported or called. Two limits bound what a small
file can become: the number of operations, and that keys of a dict are text or bytes (a tuple of tuples of itself can be
written in 60 operations, and takes years to hash).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_OPERATIONS = 400_000  # a batch of CIFAR-10 has 40,000, and one that Python 3 rewrote by protocol 2, 110,000

_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_ENCODE = "_codecs encode"  # how Python 3 writes bytes in protocol 2
_KNOWN = (*_ARRAY, "numpy ndarray", "numpy dtype", _ENCODE)


def loads(content: bytes) -> Any:
    """The object; raises ValueError (or IndexError, where operations take what was never put) for any other pickle."""
    machine = _Machine()
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if number == MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
        if operation.name == "STOP":
            return _plain(machine.stack.pop())
        step = _STEPS.get(operation.name)
        if step is None:
            raise ValueError(f"it uses {operation.name}, which image data does not need")
        step(machine, argument)
    raise ValueError("it has no end")


class _Name(str):
    """One of `_KNOWN`, which stands for itself."""


class _Type:
    """An array's type in the making; `code` is NumPy's."""

    def __init__(self, code: object):
        self.code = code


class _Array:
    """An array in the making; `value` is the finished one."""

    value: np.ndarray | None = None


class _Machine:
    """The stack of a pickle, the heights of its marks, and what it has noted by number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        height = self.marks.pop()
        taken = self.stack[height:]
        del self.stack[height:]
        return taken

    def last(self, number: int) -> tuple[Any, ...]:
        if len(self.stack) < number:
            raise ValueError("it takes more than was put")
        taken = tuple(self.stack[-number:])
        del self.stack[-number:]
        return taken

    def name(self, name: str) -> None:
        if name not in _KNOWN:
            raise ValueError(f"it asks for {name.replace(' ', '.')}, which image data does not need")
        self.stack.append(_Name(name))

    def fill(self, pairs: list[Any]) -> None:
        """Put key, value, key, value into the dict on top."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("it puts a key into what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) not in (str, bytes):
                raise ValueError("a key is neither text nor bytes")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(values)

    def make(self) -> None:
        """REDUCE, of the few names that are known."""
        name, arguments = self.last(2)
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no name")
        if name in _ARRAY:
            self.stack.append(_Array())
        elif name == "numpy dtype" and arguments:
            self.stack.append(_Type(arguments[0]))
        elif name == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
            self.stack.append(arguments[0].encode("latin1"))
        else:
            raise ValueError(f"it calls {name.replace(' ', '.')} in a way that image data does not")

    def build(self) -> None:
        """The state of an array; that of a type, which is byte order and fields, says nothing of bytes."""
        (state,) = self.last(1)
        target = self.stack[-1]
        if isinstance(target, _Array):
            target.value = _bytes_of(state)
        elif not isinstance(target, _Type):
            raise ValueError("it gives a state to what has none")


def _bytes_of(state: Any) -> np.ndarray:
    """(N, ...) uint8 of (version, shape, type, whether Fortran's order, bytes)."""
    _, shape, kind, fortran, content = state
    if not isinstance(kind, _Type) or kind.code not in ("u1", b"u1") or not isinstance(content, bytes):
        raise ValueError("it holds an array of something else than bytes")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError("it holds an array of an impossible shape")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _plain(document: Any) -> Any:
    """The top level with its arrays in place of what they were made in."""
    if not isinstance(document, dict):
        return document
    return {key: value.value if isinstance(value, _Array) else value for key, value in document.items()}


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_old_text(machine: _Machine, argument: str) -> None:
    machine.stack.append(argument.encode("latin1"))  # text of Python 2 is bytes


def _note(machine: _Machine, argument: int | None) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _recall(machine: _Machine, argument: int) -> None:
    if argument not in machine.memo:
        raise ValueError("it recalls what was never noted")
    machine.stack.append(machine.memo[argument])


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _tuple_of(number: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(machine.last(number))


def _dict(machine: _Machine, _: Any) -> None:
    pairs = machine.since_mark()
    machine.stack.append({})
    machine.fill(pairs)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push_old_text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _note),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": _dict,
    "APPEND": lambda machine, _: machine.extend(list(machine.last(1))),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.fill(list(machine.last(2))),
    "SETITEMS": lambda machine, _: machine.fill(machine.since_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda machine, _: machine.name(" ".join(map(str, machine.last(2)))),
    "REDUCE": lambda machine, _: machine.make(),
    "BUILD": lambda machine, _: machine.build(),
}

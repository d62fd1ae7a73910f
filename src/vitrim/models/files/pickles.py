"""Pickles with tensors, read without running anything in them and without more memory than their file has bytes.

`torch.load(weights_only=True)` runs no foreign code either, but it allocates whatever sizes the file declares, and it
refuses a file for a path or a NumPy number next to the weights. Here a pickle can build dicts, lists, numbers, text and
the entries of tensors. Objects of well-known harmless classes become an `Inert` placeholder: their classes are never
imported. Any other name of a class or function is refused.
"""

import codecs
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .file_tensors import Bounded, Entry, Storage, Unusable

_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Int": torch.int32, "Long": torch.int64, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_HARMLESS_MODULES = (
    "pathlib.", "collections.", "datetime.", "numpy.core.multiarray.", "numpy._core.multiarray.", "typing.",
    "omegaconf.", "yacs.config.", "easydict.", "addict.", "ml_collections.", "mmengine.config.",
    "lightning_fabric.utilities.data.", "lightning.fabric.utilities.data.",
)  # fmt: skip
_HARMLESS = frozenset({
    "argparse.Namespace", "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "numpy.dtype", "numpy.ndarray",
    "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
    "pytorch_lightning.utilities.parsing.AttributeDict", "torch.device", "torch.Size", "torch.Generator",
    "torch.serialization._get_layout", "torch.per_tensor_affine", "torch.per_tensor_symmetric",
    "torch.per_channel_affine", "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams",
    *(f"builtins.{name}" for name in (
        "int", "float", "bool", "str", "bytes", "bytearray", "list", "tuple", "set", "frozenset", "complex", "slice",
        "range", "long", "unicode",  # The last two as Python 2 calls int and str, in its protocols too.
    )),
})  # fmt: skip
"""What training scripts keep next to the weights. Only placeholders are made of it."""


class CodeError(Exception):
    """The pickle names a class or function that is not known to be harmless."""


class Inert:
    """In place of an object whose class does not matter."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A name that a pickle may use, and what is made when it is called."""

    name: str
    make: Callable[..., object]


class Reader(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]  (of C's no single operation can be replaced)
    """An unpickler with nothing to call but `_Known`. It is a stack machine, so deep nesting needs no recursion."""

    def __init__(self, file: Bounded, size: int, storage: Callable[[torch.dtype, str, int], Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self._size, self._storage = size, storage

    # Names.

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if (builder := _BUILDERS.get(full)) is not None:
            return _Known(full, lambda *args: builder(self, *args))
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return _STORAGES.get(name.removesuffix("Storage"), Unusable("quantised"))
        if full in ("torch.storage.UntypedStorage", "torch.storage._UntypedStorage"):
            return torch.uint8
        if full in _HARMLESS or full.startswith(_HARMLESS_MODULES):
            return _Known(full, lambda *args: Inert())
        raise CodeError(full)

    def get_extension(self, code: int) -> None:
        raise CodeError(f"extension {code}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel, *rest = pid
        if kind != "storage" or any(part is not None for part in rest) or type(numel) is not int or numel < 0:
            raise ValueError("not a storage")
        return self._storage(dtype, str(key), numel) if isinstance(dtype, torch.dtype) else dtype

    # Tensors.

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> object:
        return self._typed(storage, offset, shape, stride, getattr(storage, "dtype", None))

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> object:
        return self._typed(storage, offset, shape, stride, dtype)

    def _typed(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> object:
        if isinstance(storage, Unusable):
            return storage
        return Entry.checked(storage, dtype, shape, stride, offset, most=self._size)

    def _parameter(self, data: Any, *rest: Any) -> object:
        return data

    def _of_type(self, build: Any, kind: Any, args: Any, *rest: Any) -> object:
        return self._call(build, args) if isinstance(build, _Known) else Unusable("foreign")

    def _mapping(self, *args: Any) -> dict[Any, Any]:
        pairs = next((arg for arg in args if isinstance(arg, list | tuple)), ())
        return {_key(key): value for key, value in pairs}

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        if codecs.lookup(encoding).name not in ("iso8859-1", "utf-8"):
            raise CodeError(f"_codecs.encode to {encoding}")
        return text.encode(encoding)

    # Operations. Those that are not here only move values between the stack and the memo.

    def _call(self, made_by: Any, args: Any) -> object:
        if not isinstance(made_by, _Known):
            raise ValueError("a call of something else than a class")
        return made_by.make(*args)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._call(klass, args))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.append(self._call(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        self.stack.pop()  # Attributes of an object of which only the items, or nothing, matters.

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_additems(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Inert):
            raise ValueError("items of something else than a list")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, Inert):
            raise ValueError("items of something else than a dict")

    def load_set(self) -> None:
        self.append(Inert())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # pyright: ignore[reportPrivateUsage]
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: load_set,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _key(key: Any) -> Any:
    """The key of a dict, if it is quick to hash; nested tuples may take for ever."""
    plain = (str, int, float, bytes, type(None))
    if isinstance(key, plain) or (isinstance(key, tuple) and all(isinstance(part, plain) for part in key)):
        return key
    return key if isinstance(key, Inert) else Inert()


def _unusable(kind: str) -> Callable[..., object]:
    return lambda reader, *args: Unusable(kind)


_BUILDERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": Reader._mapping,
    "collections.defaultdict": Reader._mapping,
    "collections.Counter": Reader._mapping,
    "builtins.dict": Reader._mapping,
    "_codecs.encode": Reader._encode,
    "torch._utils._rebuild_tensor": Reader._tensor,
    "torch._utils._rebuild_tensor_v2": Reader._tensor,
    "torch._utils._rebuild_tensor_v3": Reader._typed_tensor,
    "torch._utils._rebuild_parameter": Reader._parameter,
    "torch._utils._rebuild_parameter_with_state": Reader._parameter,
    "torch.nn.parameter.Parameter": Reader._parameter,
    "torch._tensor._rebuild_from_type_v2": Reader._of_type,
    "torch._utils._rebuild_sparse_tensor": _unusable("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _unusable("sparse"),
    "torch._utils._rebuild_qtensor": _unusable("quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unusable("without data"),
    "torch._utils._rebuild_nested_tensor": _unusable("nested"),
    "torch._utils._rebuild_wrapper_subclass": _unusable("foreign"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unusable("foreign"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _unusable("foreign"),
}

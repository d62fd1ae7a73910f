"""Files of `torch.save`: ZIP archives, and before PyTorch 1.6 pickles with the bytes of the tensors behind them."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .file_tensors import BombError, Bounded, Storage
from .pickles import CodeError, Reader

_MAX_PICKLE = 32 << 20  # Bytes of a pickle without its tensors; real ones have some 100 kB.
_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # With which an old file begins, in two pickles.
_TOO_LARGE = "declares larger tensors than it has bytes; it is damaged, or made to fill the memory"


def read_zip(file: BinaryIO, path: Path, size: int) -> object:
    """The content of a file that `torch.save` wrote since PyTorch 1.6: a ZIP archive without compression."""
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    if sum(info.file_size for info in records.values()) > size:
        raise BombError("unpacks to more bytes than it has, which no file of torch.save does; get it elsewhere")
    main = next((name for name in records if name.endswith("/data.pkl")), None)
    if main is None:
        raise EOFError("no data.pkl")
    root = main.removesuffix("data.pkl")
    if f"{root}constants.pkl" in records:
        raise CodeError("a TorchScript program")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise EOFError("bytes in another order")
    if records[main].file_size > _MAX_PICKLE:
        raise BombError(f"holds {records[main].file_size >> 20} MB besides its tensors; save only its state dict")

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        info = records[f"{root}data/{key}"]
        if numel * dtype.itemsize > info.file_size:
            raise BombError(_TOO_LARGE)

        def read() -> Tensor:
            content = torch.empty(info.file_size, dtype=torch.uint8)
            with path.open("rb") as again, zipfile.ZipFile(again).open(info) as record:
                _fill(content, record.read)  # Compares the checksum at the end.
            return content

        return Storage(dtype, info.file_size, read)

    with archive.open(main) as record:
        return Reader(Bounded(record, records[main].file_size), size, storage).load()


def read_legacy(file: BinaryIO, path: Path, size: int) -> object:
    """The content of a file that `torch.save` wrote before PyTorch 1.6: pickles, then the bytes of all storages."""
    declared: dict[str, tuple[Storage, int]] = {}
    left = size

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        nonlocal left
        if key not in declared:
            declared[key] = Storage(dtype, numel * dtype.itemsize), numel
            left -= numel * dtype.itemsize
        if left < 0:
            raise BombError(_TOO_LARGE)
        return declared[key][0]

    source = Bounded(file, min(size, _MAX_PICKLE))

    def load() -> Any:
        return Reader(source, size, storage).load()

    if (load(), load()) != _LEGACY:
        raise EOFError("not a file of torch.save")
    load()  # What the system was.
    content, keys = load(), load()
    for key in keys:
        one, numel = declared[str(key)]
        if struct.unpack("<q", file.read(8))[0] != numel or file.tell() + one.nbytes > size:
            raise EOFError("cut short")
        one.reader = _reader_at(path, file.tell(), one.nbytes)
        file.seek(one.nbytes, 1)
    return content


def _reader_at(path: Path, start: int, nbytes: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        content = torch.empty(nbytes, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(start)
            _fill(content, file.read)
        return content

    return read


def _fill(content: Tensor, read: Callable[[int], bytes]) -> None:
    view, start = memoryview(content.numpy().data), 0
    while block := read(1 << 20):
        view[start : start + len(block)] = block[: len(view) - start]
        start += len(block)
        if start >= len(view):
            break
    if start < len(view):
        raise EOFError("cut short")

"""Files of weights: which kind of file it is, and which of the things in it are the weights."""

import json
import logging
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_safetensors
from torch import Tensor

from ...errors import CheckpointError
from ...text import printable, short_name
from .file_tensors import BombError, Entry, Unusable
from .pickles import CodeError
from .torch_files import read_legacy, read_zip

log = logging.getLogger(__name__)
State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_AVERAGED = frozenset({"ema", "swa", "averaged", "average", "avg", "polyak", "shadow"})
_OF_TRAINING = frozenset({"optimizer", "optimiser", "optim", "scheduler", "scaler", "loss", "criterion", "meter"})
_NESTS = (
    "state_dict", "model_state_dict", "model", "module", "network", "net", "params", "weights", "backbone",
    "student", "teacher",
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")
_HEADER = 100 << 20  # The longest header that safetensors allows.


def is_averaged(name: str) -> bool:
    """Whether a name says that its weights were averaged over training: those are the ones to use.

    >>> is_averaged("model_ema"), is_averaged("modelEMA"), is_averaged("swaWeights"), is_averaged("schema")
    (True, True, True, False)
    """
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return bool(words & _AVERAGED) and not words & _OF_TRAINING


def read_weights(path: str | Path) -> State:
    """The tensors of a safetensors file or of a PyTorch checkpoint, on the CPU, as copies; no code in it is ever run.

    Of a training checkpoint it takes the weights of the model, the averaged ones where there are both, and reports
    what it took. The prefixes of `DataParallel` and `torch.compile` are removed.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or holds no weights.
    """
    path = Path(path)
    content = read_content(path)
    state, taken = _choose(content, path)
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if taken:
        log.warning("%s: took the weights under %s", printable(path), taken)
    faults = [f"{short_name(name)} is {value.kind}" for name, value in state.items() if isinstance(value, Unusable)]
    if faults:
        raise CheckpointError(f"{path} holds tensors that cannot be weights ({faults[0]}); save plain dense ones")
    try:
        return {name: value.tensor() if isinstance(value, Entry) else value for name, value in state.items()}
    except Exception as error:  # Readers of foreign bytes fail in many ways.
        raise _damaged(path) from error


def read_content(path: Path) -> object:
    """All that the file holds: dicts, lists and plain values around tensors, or around entries of tensors."""
    with opened(path) as file:
        start, size = file.read(64), path.stat().st_size
        file.seek(0)
        if not start:
            raise CheckpointError(f"{path} is empty; copy or download it again")
        if start.lstrip()[:1] == b"<":
            raise CheckpointError(f"{path} is a web page, not weights; download the file itself")
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not weights; run git lfs pull")
        try:
            if start[:2] == b"PK":
                return read_zip(file, path, size)
            if start[8:9] == b"{":
                return parse_safetensors(file.read())
            return read_legacy(file, path, size)
        except CheckpointError:
            raise
        except CodeError as error:
            raise CheckpointError(
                f"{path} holds code ({short_name(error)}), refused; convert it to safetensors, or save only its "
                "state dict, if you trust it"
            ) from error
        except BombError as error:
            raise CheckpointError(f"{path} {error}") from error
        except Exception as error:  # Readers of foreign bytes fail in many ways.
            raise _damaged(path) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as copies: memory mapped to it would change, or end the process, with it.

    Raises:
        CheckpointError: a damaged file.
    """
    with opened(path) as file:
        content = file.read()
    try:
        return parse_safetensors(content)
    except Exception as error:  # Readers of foreign bytes fail in many ways.
        raise _damaged(path) from error


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a safetensors file, and the shapes of its tensors, without reading them."""
    with opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER, path.stat().st_size - 8):
            raise _damaged(path)
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
            return {str(key): str(value) for key, value in metadata.items()}, shapes
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(path) from error


def opened(path: Path) -> Any:
    """The file, open for reading bytes; `CheckpointError` if it cannot be read, or is a pipe, a device or a folder."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise CheckpointError(f"{path} is {what}, not a file of weights")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no file of weights at {path}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from None


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, cut short or no file of weights; get it again")


def _choose(content: object, path: Path) -> tuple[dict[str, Any], str]:
    """The mapping from names to tensors, and where it was found if there was a choice."""
    taken: list[str] = []
    for _ in range(8):  # A dict may hold itself.
        if not isinstance(content, Mapping):
            break
        averages = [name for name in content if isinstance(name, str) and is_averaged(name)]
        known = [name for name in (*averages, *_NESTS) if isinstance(content.get(name), Mapping)]
        nests = [name for name in known if any(True for _ in _tensors(content[name]))]
        if not nests and not known and not _named_tensors(content):
            # No known name: the only mapping with tensors, if there is only one.
            nests = [name for name, value in content.items() if isinstance(name, str) and _holds_weights(value)]
            if len(nests) > 1:
                names = ", ".join(short_name(name) for name in nests[:4])
                raise CheckpointError(f"{path} holds several state dicts ({names}); save the one to use by itself")
            taken += nests
        if not nests:
            break
        nest = _preferred(content, nests)
        others = [name for name in nests if name != nest]
        others += [name for name in averages if name not in nests and _lists_tensors(content[name])]
        others += [name for name in content if name not in (*nests, *others) and _is_like(content[name], content[nest])]
        if is_averaged(nest) or others:
            taken.append(f"{nest}, not {', '.join(map(str, others))}" if others else nest)
        content = content[nest]
    tensors = _named_tensors(content)
    if not tensors:
        raise CheckpointError(f"{path} holds no state dict (names to tensors); save model.state_dict()")
    return tensors, "; in it ".join(short_name(text, 200) for text in taken)


def _preferred(content: Mapping[Any, Any], nests: list[str]) -> str:
    """Of several: averaged weights; the teacher of self-distillation, which is an average of its student."""
    shapes = {name: sorted(value.shape for value in _tensors(content[name])) for name in nests}
    if "student" in nests and shapes.get("teacher") == shapes["student"] and nests[0] == "student":
        return "teacher"
    return nests[0]


def _is_like(content: object, chosen: object) -> bool:
    """Whether both are state dicts of the same network, such as the latest and the best."""
    names = _named_tensors(chosen).keys()
    return bool(names) and _named_tensors(content).keys() == names


def _lists_tensors(content: object) -> bool:
    """Whether there are tensors in lists, as averages without names are kept."""
    parts = list(content.values()) if isinstance(content, Mapping) else [content]
    return any(isinstance(part, list | tuple) and any(isinstance(x, Entry | Tensor) for x in part) for part in parts)


def _tensors(content: object) -> Iterator[Any]:
    """The tensors below a mapping; each mapping is visited once, since it may hold itself."""
    left: list[Any] = [content]
    seen: set[int] = set()
    while left:
        content = left.pop()
        if isinstance(content, Entry | Tensor):
            yield content
        elif isinstance(content, Mapping) and id(content) not in seen:
            seen.add(id(content))
            left += content.values()


def _holds_weights(content: object) -> bool:
    nested = isinstance(content, Mapping) and any(_named_tensors(content.get(name)) for name in _NESTS)
    return nested or bool(_named_tensors(content))


def _named_tensors(content: object) -> dict[str, Any]:
    """The tensors of a state dict; empty if this is none. Numbers and text between them are left out."""
    if not isinstance(content, Mapping):
        return {}
    found = {name: value for name, value in content.items() if isinstance(value, Entry | Tensor | Unusable)}
    return found if all(isinstance(name, str) for name in found) else {}

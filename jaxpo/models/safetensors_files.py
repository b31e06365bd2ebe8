"""Tensors of a directory of safetensors files, verified from their headers and read by slice.

Nothing outside the directory is opened (a hub cache may link into its own blobs), and nothing is ever unpickled.
"""

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from jaxpo.errors import InputError

READABLE = ('*.safetensors', '*.json', '*.txt', '*.model', '*.jinja')
PICKLES = ('*.bin', '*.pt', '*.pth', '*.pkl', '*.pickle', '*.ckpt')
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint by Hugging Face name: what the headers say, and how to read a slice of one."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str  # float32, bfloat16 or float16: what holds every tensor without loss
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    files: tuple[pathlib.Path, ...]  # that hold them


def inside(root: pathlib.Path, name: str) -> pathlib.Path:
    """The file `name` of directory `root`. InputError where the name or a link leads out of the directory."""
    if name in ('', '.', '..') or name != pathlib.PurePosixPath(name).name or '\\' in name or '\0' in name:
        raise InputError(f'{root} names the file {name!r}; only plain file names are read, no paths.')
    path, real_root = root / name, root.resolve()
    allowed = [real_root]
    if real_root.parent.name == 'snapshots':
        # A hub cache: snapshots/COMMIT/NAME links to ../../blobs/HASH. A `blobs` that is itself a link is not one.
        allowed.append(real_root.parent.parent / 'blobs')
    if not any(path.resolve().is_relative_to(directory) for directory in allowed):
        raise InputError(f'{path} is a link that leads out of its directory, to {path.resolve()}; not read.')
    return path


def check_links(root: pathlib.Path) -> None:
    """Raises InputError where a file that might be read lies outside the directory."""
    for path in sorted(root.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in READABLE):
            inside(root, path.name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text('utf-8'))
    except FileNotFoundError:
        raise InputError(f'{path} does not exist.') from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path} is not readable JSON: {error}') from None
    if not isinstance(value, dict):
        raise InputError(f'{path} must hold a JSON object, not a {type(value).__name__}.')
    return value


def open_directory(root: pathlib.Path) -> Tensors:
    """The tensors of a Hugging Face directory. Reads headers only; files stay open (memory-mapped) for `read`."""
    weight_map = _indexed(root) if (root / INDEX).exists() else None
    names = sorted(set(weight_map.values())) if weight_map else [_single(root)]
    files = {name: _open(inside(root, name)) for name in names}
    held = {name: set(file.keys()) for name, file in files.items()}
    if weight_map:
        _check_index(root, weight_map, held)
    return _tensors(root, files)


def open_file(root: pathlib.Path, name: str) -> Tensors:
    """The tensors of one safetensors file of a directory, by the names the file gives them."""
    return _tensors(root, {name: _open(inside(root, name))})


def _tensors(root: pathlib.Path, files: Mapping[str, Any]) -> Tensors:
    # A file is no dict: it has keys, but cannot be iterated.
    slices = {name: file.get_slice(name) for file in files.values() for name in list(file.keys())}
    shapes = {tensor: tuple(entry.get_shape()) for tensor, entry in slices.items()}
    dtype = _common_dtype(root, {tensor: entry.get_dtype() for tensor, entry in slices.items()})
    paths = tuple(root / name for name in files)
    return Tensors(shapes, dtype, lambda name, index: slices[name][index], paths)


def _single(root: pathlib.Path) -> str:
    if (root / SINGLE).exists() or (root / SINGLE).is_symlink():
        return SINGLE
    pickles = sorted(path.name for path in root.iterdir() if any(path.match(pattern) for pattern in PICKLES))
    if pickles:
        raise InputError(
            f'{root} holds its weights as pickles ({", ".join(pickles[:3])}), which can run code when opened; only '
            'safetensors are read. Convert them with transformers: save_pretrained(..., safe_serialization=True).'
        )
    raise InputError(f'{root} has neither {SINGLE} nor {INDEX}.')


def _indexed(root: pathlib.Path) -> dict[str, str]:
    if (root / SINGLE).exists():
        raise InputError(f'{root} has both {SINGLE} and {INDEX}: remove the one that is stale.')
    weight_map = read_json(inside(root, INDEX)).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f'{root / INDEX} has no weight_map.')
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith('.safetensors'):
            raise InputError(f'{root / INDEX} names {name!r}, which is not a safetensors file.')
        inside(root, name)
    missing = sorted(name for name in set(weight_map.values()) if not (root / name).is_file())
    if missing:
        raise InputError(f'{root} lacks the shards {", ".join(missing)} named in {INDEX}.')
    return weight_map


def _check_index(root: pathlib.Path, weight_map: dict[str, str], held: dict[str, set[str]]) -> None:
    """Index and shards must say the same of every tensor."""
    faults = []
    for name, tensors in sorted(held.items()):
        claimed = {tensor for tensor, file in weight_map.items() if file == name}
        faults += [f'{name} lacks {tensor}' for tensor in sorted(claimed - tensors)]
        faults += [f'{name} also holds {tensor}' for tensor in sorted(tensors - claimed)]
    if faults:
        raise InputError(f'{root / INDEX} and its shards disagree: {"; ".join(faults)}.')


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework='np')
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f'{path} is not a whole safetensors file: {error}') from None


def _common_dtype(root: pathlib.Path, dtypes: dict[str, str]) -> str:
    """The one dtype of all tensors; float32, which holds them all, where they differ."""
    for tensor, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise InputError(f'{tensor} in {root} has dtype {dtype}; supported: {", ".join(DTYPES)}.')
    kinds = set(dtypes.values())
    return DTYPES[kinds.pop()] if len(kinds) == 1 else 'float32'

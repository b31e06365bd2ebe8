"""Adapters in the form of the PEFT library: a directory of adapter_config.json and adapter_model.safetensors.

What PEFT would compute otherwise than `models.lora` is refused by the name of its setting. Nothing is ever unpickled.
"""

import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from jaxpo.errors import InputError, unknown
from jaxpo.models import families, leaves, lora
from jaxpo.models.architecture import Architecture
from jaxpo.models.directories import exported, write_json
from jaxpo.models.families import Key
from jaxpo.models.lora import Lora
from jaxpo.models.safetensors_files import PICKLES, Tensors, inside, open_file, read_json

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
ROOT = 'base_model.model.'  # PEFT's wrappers around a causal language model

READ = {'peft_type', 'task_type', 'r', 'lora_alpha', 'use_rslora', 'target_modules', 'bias', 'init_lora_weights'}
WITHOUT_EFFECT = {  # on what a trained adapter computes
    'auto_mapping',
    'base_model_name_or_path',
    'eva_config',
    'inference_mode',
    'lora_dropout',
    'megatron_core',
    'peft_version',
    'qalora_group_size',
    'revision',
}
# Other starts change the weights beneath, or may: their adapters fit the changed weights only.
STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')


def keys(architecture: Architecture, settings: Lora) -> tuple[Key, ...]:
    """Every leaf of the adapter tree, with PEFT's name and shape of its tensors."""
    found = []
    for kernel in lora.kernels(architecture, settings):
        target, stem = kernel.path[-1], ROOT + kernel.name.removesuffix('.weight')
        outputs, inputs = kernel.shape
        parts = ('A', (settings.rank, inputs)), ('B', (outputs, settings.rank))
        for path, (factor, shape) in zip(lora.factor_paths(target), parts):
            found.append(Key(path, f'{stem}.lora_{factor}.weight', shape, architecture.layers, transposed=True))
    return tuple(found)


def read_adapter(directory: str | pathlib.Path, architecture: Architecture) -> tuple[Lora, dict[str, Any]]:
    """The form of a PEFT adapter and its tree: float32 NumPy arrays, `[L, in, r]` and `[L, r, out]`.

    Raises InputError, naming the setting or tensor, where the files are missing or unsafe, the adapter is not plain
    LoRA of whole kernels in all layers, or it does not fit the architecture.
    """
    settings, tensors = open_adapter(directory, architecture)
    tree = {}
    for key in keys(architecture, settings):
        tree[key.path] = leaves.read(key, tensors, (slice(None),) * 3)
        if not np.isfinite(tree[key.path]).all():
            raise InputError(f'{directory}: {"/".join(key.path)} has values that are not finite.')
    return settings, families.nest(tree)


def open_adapter(directory: str | pathlib.Path, architecture: Architecture) -> tuple[Lora, Tensors]:
    """As `read_adapter`, but of configs and headers alone: cheap, for a check before any weight is read."""
    root = pathlib.Path(directory).expanduser()
    if not root.is_dir():
        raise InputError(f'No adapter at {str(directory)!r}: give a directory that holds {CONFIG} and {WEIGHTS}.')
    settings = _settings(root / CONFIG, read_json(inside(root, CONFIG)), architecture)
    if not (root / WEIGHTS).exists():
        raise _no_weights(root)
    tensors = open_file(root, WEIGHTS)
    _check_tensors(root, keys(architecture, settings), tensors.shapes)
    return settings, tensors


def write_adapter(
    directory: pathlib.Path,
    adapter: Mapping[str, Any],
    settings: Lora,
    architecture: Architecture,
    base_name: str,
) -> None:
    """Writes the directory that PEFT reads: factors float32, `base_name` (a path or hub id) as the model beneath.

    Every process must call it; process 0 alone writes. An interrupted export leaves no `directory`.

    Raises InputError where the directory exists and is not empty, the disk has too little room, a value is not finite,
    or the tree is not the adapter that `settings` describes.
    """
    expected = keys(architecture, settings)
    leaves.check(expected, adapter)
    size = sum(4 * math.prod(key.leaf_shape) for key in expected)
    with exported(directory, size) as folder:
        tensors = {
            name: leaves.fetch(key, layer, adapter, 'float32')
            for key in expected
            for layer, name in enumerate(key.names)
        }
        if folder is not None:
            write_json(folder / CONFIG, _config(settings, architecture, base_name))
            safetensors.numpy.save_file(tensors, folder / WEIGHTS, {'format': 'pt'})
            shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner alone


def _config(settings: Lora, architecture: Architecture, base_name: str) -> dict[str, Any]:
    alpha = settings.scale * settings.rank
    if round(alpha) / settings.rank == settings.scale:
        alpha = round(alpha)
    return {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base_name,
        'r': settings.rank,
        'lora_alpha': alpha,
        'lora_dropout': 0.0,
        'target_modules': [_module(key) for key in lora.kernels(architecture, settings)],
        'bias': 'none',
        'fan_in_fan_out': False,
        'use_rslora': False,
        'use_dora': False,
        'modules_to_save': None,
        'layers_to_transform': None,
        'rank_pattern': {},
        'alpha_pattern': {},
        'init_lora_weights': True,
        'inference_mode': True,
    }


def _module(kernel: Key) -> str:
    """The last part of the Hugging Face module's name: `q_proj`."""
    return kernel.name.split('.')[-2]


def _settings(path: pathlib.Path, config: Mapping[str, Any], architecture: Architecture) -> Lora:
    _check_config(path, config)
    rank, alpha = config.get('r', 8), config.get('lora_alpha', 8)  # PEFT's defaults
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path}: 'r' is a whole number above 0, not {rank!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{path}: 'lora_alpha' is a finite number, not {alpha!r}.")
    scale = alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
    return Lora(rank, scale, _targets(path, config.get('target_modules'), architecture))


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    wanted = {'peft_type': ('LORA',), 'task_type': ('CAUSAL_LM', None), 'bias': ('none',), 'init_lora_weights': STARTS}
    defaults = {'task_type': None, 'bias': 'none', 'init_lora_weights': True}
    for name, allowed in wanted.items():
        value = config.get(name, defaults.get(name))
        if value not in allowed:
            listed = ', '.join(map(repr, allowed))
            raise InputError(f'{path}: {name!r} is {value!r}; supported: {listed}.')
    for name, value in config.items():
        # Whatever PEFT adds in the future is off where it is empty.
        if name not in READ | WITHOUT_EFFECT and value:
            raise InputError(f'{path}: {name!r} is {value!r}, which is not supported; only plain LoRA is read.')


def _targets(path: pathlib.Path, modules: Any, architecture: Architecture) -> tuple[str, ...]:
    known = {_module(key): key.path[-1] for key in families.keys(architecture) if key.path[-1] in lora.BLOCKS}
    if modules == 'all-linear':
        return lora.ordered(known.values())
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise InputError(
            f"{path}: 'target_modules' is a list of modules or 'all-linear', not {modules!r} (a pattern is not read: "
            f'list the modules it stands for, of {", ".join(known)}).'
        )
    for name in modules:
        if name.split('.')[-1] not in known:
            raise unknown(f"module in 'target_modules' of {path}", name, known)
    return lora.ordered({known[name.split('.')[-1]] for name in modules})


def _no_weights(root: pathlib.Path) -> InputError:
    pickles = sorted(path.name for path in root.iterdir() if any(path.match(pattern) for pattern in PICKLES))
    if not pickles:
        return InputError(f'{root} has no {WEIGHTS}.')
    return InputError(
        f'{root} holds its adapter as a pickle ({pickles[0]}), which can run code when opened; only {WEIGHTS} is read. '
        'Convert it with PEFT: save_pretrained(..., safe_serialization=True).'
    )


def _check_tensors(root: pathlib.Path, expected: tuple[Key, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one InputError that names every missing, unexpected and misshaped tensor."""
    known = {name: key.shape for key in expected for name in key.names}
    faults = [f'missing {name} {list(shape)}' for name, shape in known.items() if name not in shapes]
    faults += [f'unexpected {name} {list(shape)}' for name, shape in shapes.items() if name not in known]
    faults += [
        f'misshaped {name}: {list(shape)}, expected {list(known[name])}'
        for name, shape in shapes.items()
        if name in known and tuple(shape) != known[name]
    ]
    if faults:
        raise InputError(f'{root / WEIGHTS} does not fit {CONFIG} and the model: ' + '; '.join(sorted(faults)) + '.')

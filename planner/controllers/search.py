"""CMA-ES (`cma` from PyPI), with a state that is saved without pickles and continues bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from wmcache.common.errors import UserError, reason
from wmcache.common.files import write_whole
from wmcache.common.tensors import open_tensors

Array = NDArray[np.float64]

MOST_FULL = 1200
"""Parameters up to which the full covariance is adapted; above, its diagonal, in linear time and memory."""
FLAT = 20
"""Generations of equal fitness after which the search stops; `cma` has 1, but all candidates may fail at the same step for a while."""
NUMBERS = (bool, int, float, np.number, np.bool_)
PLAIN = frozenset({"bool", "int", "float", "list"})
NOT_STATE = frozenset({"logger", "timer", "opts", "inopts", "inputargs"})


class Search:
    """Looks for parameters of high fitness.

    Attributes:
        generation: generations whose fitness is known.
    """

    def __init__(self, start: Array, *, population: int, sigma: float, seed: int) -> None:
        """Begin at parameters [size]. Raise UserError where cma is not installed."""
        try:
            import cma
        except ImportError as error:
            raise UserError(f"cma is not installed ({error}); pip install 'wmcache[world-models]'") from error
        self._rng = np.random.default_rng(seed)
        options = {
            "popsize": population,
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": float("nan"),  # otherwise cma seeds NumPy's global generator
            "verbose": -9,  # no output, no files
            "tolflatfitness": FLAT,
            "CMA_diagonal": len(start) > MOST_FULL,
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
        }
        self._version = str(cma.__version__)
        self._strategy: Any = cma.CMAEvolutionStrategy(start, sigma, options)

    @property
    def generation(self) -> int:
        """See the attributes."""
        return int(self._strategy.countiter)

    @property
    def mean(self) -> Array:
        """The mean of the distribution, float64 [size]."""
        return np.array(self._strategy.mean, np.float64)

    @property
    def sigma(self) -> float:
        """The step size."""
        return float(self._strategy.sigma)

    def ask(self) -> Array:
        """Draw the candidates of the next generation, float64 [population, size]."""
        return np.stack(self._strategy.ask())

    def tell(self, candidates: Array, fitness: Array) -> None:
        """Adapt the distribution to the fitness [population] of what `ask` has returned."""
        self._strategy.tell(list(candidates), (-fitness).tolist())

    def stop(self) -> list[str]:
        """List the criteria by which `cma` regards the search as finished; empty while it goes on."""
        return sorted(self._strategy.stop())

    def save(self, file: Path) -> None:
        """Write the state between two generations, atomically."""
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, str] = {}
        first: dict[int, str] = {}  # of arrays that several attributes share
        for path, value in _leaves(self._strategy):
            if isinstance(value, np.ndarray) and (known := first.setdefault(id(value), path)) != path:
                kinds[path] = f"={known}"
                continue
            column_major = isinstance(value, np.ndarray) and value.flags.fnc  # products depend on the order in memory
            kinds[path] = "transposed" if column_major else type(value).__name__
            tensors[path] = torch.from_numpy(np.array(value.T if column_major else value, order="C"))
        rng, checksum = self._rng.bit_generator.state, _digest(tensors)
        about = {"cma": self._version, "rng": rng, "kinds": kinds, "sha256": checksum}
        write_whole(file, save(tensors, {"state": json.dumps(about)}))

    def load(self, file: Path) -> None:
        """Continue from a saved state of a search with the same arguments; raises UserError where the file is damaged."""
        try:
            with open_tensors(file) as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            about = json.loads(metadata["state"])
            if _digest(tensors) != about["sha256"]:
                raise ValueError("it differs from its checksum")  # noqa: TRY301
            if about["cma"] != self._version:
                raise UserError(f"{file} is of cma {about['cma']}; install that version, or choose another --out")
            self.tell(self.ask(), np.zeros(self._strategy.popsize))  # cma makes some of its attributes here
            values: dict[str, Any] = {}
            for path, kind in about["kinds"].items():
                values[path] = values[kind[1:]] if kind.startswith("=") else _value(tensors[path], kind)
                owner, name = _owner(self._strategy, path)
                setattr(owner, name, values[path])
            self._rng.bit_generator.state = about["rng"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            hint = "restore it from a copy, or choose another --out"
            raise UserError(f"{file} cannot be read ({reason(error)}); {hint}") from error


def _value(tensor: Tensor, kind: str) -> Any:
    if kind in PLAIN:
        return tensor.tolist()
    array = tensor.numpy().copy()
    return array.T if kind == "transposed" else array if kind == "ndarray" else array[()]


def _leaves(thing: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the numbers, arrays and lists of numbers in the objects of `cma`, with the path of attributes to each."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    for name, value in sorted(vars(thing).items()):
        here = f"{path}.{name}" if path else name
        if name in NOT_STATE:
            continue
        if isinstance(value, NUMBERS) or _is_array(value):
            yield here, value
        elif type(value).__module__.partition(".")[0] == "cma" and hasattr(value, "__dict__"):
            yield from _leaves(value, here, seen)


def _is_array(value: Any) -> bool:
    if type(value) is list:
        return all(isinstance(item, NUMBERS) for item in value)
    return isinstance(value, np.ndarray) and value.dtype != object


def _owner(thing: Any, path: str) -> tuple[Any, str]:
    """Return the object whose attribute a path of `_leaves` is, and its name; raises ValueError where it is no number, array or list."""
    *parents, name = path.split(".")
    for parent in parents:
        thing = vars(thing)[parent]
        if type(thing).__module__.partition(".")[0] != "cma":
            raise ValueError(f"{path} is no state")
    before = vars(thing).get(name)
    if not (before is None or isinstance(before, NUMBERS) or _is_array(before)):
        raise ValueError(f"{path} is no state")
    return thing, name


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

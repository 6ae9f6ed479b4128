"""The modules in a checkpoint of DINO-WM (models/vit.py, models/proprio.py in its repository), as weights of `DinoWm`.

Every module below the predictor and the two embeddings is compared with a table of what the reference has there, so that nothing that
would change the numbers is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.trainer.models.dino_wm import DinoWmOptions
from wmcache.trainer.pickled_modules import AGAIN, Archive, Record, StoredTensor, shown

LINEAR, NORM = "torch.nn.modules.linear.Linear", "torch.nn.modules.normalization.LayerNorm"
DROPOUT, CONV = "torch.nn.modules.dropout.Dropout", "torch.nn.modules.conv.Conv1d"
SOFTMAX, GELU = "torch.nn.modules.activation.Softmax", "torch.nn.modules.activation.GELU"
SEQUENTIAL, LIST = "torch.nn.modules.container.Sequential", "torch.nn.modules.container.ModuleList"
PREDICTOR, EMBEDDING = "models.vit.ViTPredictor", "models.proprio.ProprioceptiveEmbedding"
LAYERS = "predictor.transformer.layers"
BOTH = ("weight", "bias")


@dataclass(frozen=True)
class Expected:
    """What the reference has at a path: a class, and parameters `parameters` that are `name` in `DinoWm`."""

    kind: str
    name: str = ""
    parameters: tuple[str, ...] = ()


PREDICTOR_MODULES = {
    "predictor": Expected(PREDICTOR),
    "predictor.dropout": Expected(DROPOUT),
    "predictor.transformer": Expected("models.vit.Transformer"),
    "predictor.transformer.norm": Expected(NORM, "norm", BOTH),
    LAYERS: Expected(LIST),
}
# Both implementations cut the rows of to_qkv into q, k and v, and then each into heads.
BLOCK_MODULES = {
    "": Expected(LIST),
    ".0": Expected("models.vit.Attention"),
    ".0.norm": Expected(NORM, "norm_attention", BOTH),
    ".0.attend": Expected(SOFTMAX),
    ".0.dropout": Expected(DROPOUT),
    ".0.to_qkv": Expected(LINEAR, "qkv", ("weight",)),
    ".0.to_out": Expected(SEQUENTIAL),
    ".0.to_out.0": Expected(LINEAR, "out", BOTH),
    ".0.to_out.1": Expected(DROPOUT),
    ".1": Expected("models.vit.FeedForward"),
    ".1.net": Expected(SEQUENTIAL),
    ".1.net.0": Expected(NORM, "norm_mlp", BOTH),
    ".1.net.1": Expected(LINEAR, "mlp.0", BOTH),
    ".1.net.2": Expected(GELU),
    ".1.net.3": Expected(DROPOUT),
    ".1.net.4": Expected(LINEAR, "mlp.3", BOTH),
    ".1.net.5": Expected(DROPOUT),
}
SETTINGS: dict[str, dict[str, Any]] = {
    NORM: {"eps": 1e-5},
    GELU: {"approximate": "none"},
    SOFTMAX: {"dim": -1},
    CONV: {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1},
}
"""Settings of modules that `DinoWm` implements."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
EXACT = (torch.float32, torch.float16, torch.bfloat16)
MAX_MODULES = 2000

PARTS = ("predictor", "action_encoder", "proprio_encoder")
UNUSED = {"epoch", "encoder", "decoder"} | {
    f"{part}_optimizer" for part in ("encoder", "predictor", "action_encoder", "proprio_encoder", "decoder")
}


class ModuleReader:
    """Reads the weights from an archive whose modules are all accounted for; raises UserError otherwise."""

    def __init__(self, archive: Archive, side: int, history: int, concat_dim: int) -> None:
        """Read from `archive` a model of side x side patches, as its settings describe it."""
        self.archive, self.history, self.concat_dim = archive, history, concat_dim
        self.tokens = side * side + 2 * (not concat_dim)

    def read(self, root: object) -> tuple[dict[str, Tensor], DinoWmOptions, int]:
        """Return the weights by their names in `DinoWm`, the model's options, and the epoch."""
        if not isinstance(root, dict):
            self._refuse("it is not a dict of modules")
        if unknown := [str(name)[:80] for name in root if name not in (*PARTS, *UNUSED)]:
            self._refuse(f"it contains {', '.join(unknown[:5])}, which train.py of DINO-WM does not save")
        if missing := [name for name in (*PARTS, "epoch") if name not in root]:
            self._refuse(f"it lacks {', '.join(missing)}")
        if type(epoch := root["epoch"]) is not int:
            self._refuse("its epoch is not a number")
        weights: dict[str, Tensor] = {}
        for part, name in (("action_encoder", "embed_action"), ("proprio_encoder", "embed_proprio")):
            weights |= self._embedding(root[part], part, name)
        action, proprio = (weights[f"{name}.bias"].numel() for name in ("embed_action", "embed_proprio"))
        if action != proprio:
            self._refuse(f"action_encoder makes {action} and proprio_encoder makes {proprio} dimensions, not the same")
        sizes, predictor = self._predictor(root["predictor"])
        options = DinoWmOptions(
            combine="features" if self.concat_dim else "tokens",
            proprio="embedding",
            predict="frame",
            standardise=False,
            width=0,
            embedding=action,
            **sizes,
        )
        return weights | predictor, options, epoch

    def _embedding(self, record: object, part: str, name: str) -> dict[str, Tensor]:
        modules, tensors = self._flatten(record, part)
        expected = {part: Expected(EMBEDDING), f"{part}.patch_embed": Expected(CONV, name, BOTH)}
        weights = self._weights(modules, tensors, expected)
        if weights[f"{name}.weight"].ndim != 3 or weights[f"{name}.weight"].shape[2] != 1:
            self._refuse(f"{part} sees more than one frame at once (tubelet_size)")
        weights[f"{name}.weight"] = weights[f"{name}.weight"][..., 0].contiguous()
        return weights

    def _predictor(self, record: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the sizes of the transformer, and its weights."""
        modules, tensors = self._flatten(record, "predictor")
        position = tensors.pop("predictor.pos_embedding", None)
        layers = [name for name in modules if name.startswith(f"{LAYERS}.") and name.count(".") == 3]
        blocks = {f"{LAYERS}.{number}": f"blocks.{number}." for number in range(len(layers))}
        expected = PREDICTOR_MODULES | {
            path + below: Expected(module.kind, block + module.name, module.parameters)
            for path, block in blocks.items()
            for below, module in BLOCK_MODULES.items()
        }
        weights = self._weights(modules, tensors, expected)
        weights["position"] = self._position(position)
        heads = {
            self._heads(modules[f"{path}.0"].state, weights[f"{block}qkv.weight"]) for path, block in blocks.items()
        }
        dropouts = [module.state.get("p") for module in modules.values() if module.kind == DROPOUT]
        if modules["predictor.dropout"].state.get("p") != 0:
            self._refuse("predictor.dropout.p (emb_dropout) is not 0, and wmcache has no such dropout")
        dropouts.remove(0)
        if len(heads) != 1 or any(value != dropouts[0] for value in dropouts):
            self._refuse("the predictor has no blocks, or blocks of different heads or dropouts")
        if not isinstance(dropouts[0], int | float) or not 0 <= dropouts[0] < 1:
            self._refuse(f"the predictor's dropout is {shown(dropouts[0])}")
        ((count, size),) = heads
        sizes: dict[str, Any] = {"depth": len(blocks), "heads": count, "head_dim": size, "dropout": dropouts[0]}
        return {**sizes, "mlp": weights["blocks.0.mlp.0.bias"].numel()}, weights

    def _position(self, stored: StoredTensor | None) -> Tensor:
        rows = self.history * self.tokens
        if stored is None or len(stored.shape) != 3 or stored.shape[:2] != (1, rows):
            found = None if stored is None else stored.shape
            self._refuse(f"predictor.pos_embedding is {found}, where hydra.yaml makes it (1, {rows}, ...)")
        position = self._read("predictor.pos_embedding", stored)
        return rearrange(position, "1 (h n) d -> h n d", h=self.history).contiguous()

    def _heads(self, attention: dict[str, Any], qkv: Tensor) -> tuple[int, int]:
        """Return number and size of the heads, which the weights do not have; compare the scale and the mask."""
        heads = attention.get("heads")
        if type(heads) is not int or heads < 1 or qkv.ndim != 2 or not len(qkv) or len(qkv) % (3 * heads):
            self._refuse(f"the predictor has {shown(heads)} heads, which do not divide its to_qkv")
        size = len(qkv) // (3 * heads)
        if attention.get("scale") != size**-0.5:
            self._refuse(f"the predictor scales by {shown(attention.get('scale'))}, not by {size}**-0.5")
        mask, rows = attention.get("bias"), self.history * self.tokens
        frame = torch.arange(rows) // self.tokens
        if (
            not isinstance(mask, StoredTensor)
            or mask.shape != (1, 1, rows, rows)
            or not torch.equal(self.archive.read(mask)[0, 0].bool(), frame[:, None] >= frame)
        ):
            self._refuse("the predictor's mask (Attention.bias) is not causal between frames")
        return heads, size

    def _flatten(self, root: object, where: str) -> tuple[dict[str, Record], dict[str, StoredTensor]]:
        """Collect all modules and all parameters below a module, by their paths."""
        modules: dict[str, Record] = {}
        tensors: dict[str, StoredTensor] = {}
        waiting = [(where, root)]
        while waiting:
            path, record = waiting.pop()
            # A damaged file may nest a module in itself.
            if len(modules) >= MAX_MODULES:
                self._refuse(f"{where} has more than {MAX_MODULES} modules")
            if not isinstance(record, Record) or not isinstance(record.state, dict):
                self._refuse(f"{path[:160]} is not a module")
            modules[path] = record
            for group in ("_parameters", "_buffers", "_modules", *HOOKS):
                entries = record.state.get(group, {})
                if not isinstance(entries, dict) or any(type(name) is not str or len(name) > 64 for name in entries):
                    self._refuse(f"{path[:160]}.{group} is not a dict")
                if entries and group in HOOKS:
                    self._refuse(f"{path[:160]} has hooks, which change what it computes")
                for name, value in entries.items():
                    if group == "_modules":
                        waiting.append((f"{path}.{name}", value))
                    elif isinstance(value, StoredTensor):
                        tensors[f"{path}.{name}"] = value
                    elif value is not None:
                        self._refuse(f"{path[:160]}.{name} is not a tensor")
        return modules, tensors

    def _weights(
        self, modules: Mapping[str, Record], tensors: Mapping[str, StoredTensor], expected: Mapping[str, Expected]
    ) -> dict[str, Tensor]:
        """Read the tensors of modules that are all as expected."""
        for path in sorted({*modules, *expected}, key=lambda path: (path.count("."), path)):
            kind = modules[path].kind if path in modules else "missing"
            wanted = expected[path].kind if path in expected else "nothing"
            if kind != wanted:
                self._refuse(f"{path[:160]} is {kind}, where the reference has {wanted}")
            for setting, needed in SETTINGS.get(kind, {}).items():
                if (value := modules[path].state.get(setting, needed)) != needed:
                    self._refuse(f"{path}.{setting} is {shown(value)}, not {needed!r}")
        names = {
            f"{path}.{parameter}": f"{module.name}.{parameter}"
            for path, module in expected.items()
            for parameter in module.parameters
        }
        if different := sorted(set(tensors) ^ set(names)):
            self._refuse(f"{different[0][:160]} is {'missing' if different[0] in names else 'not in the reference'}")
        return {name: self._read(path, tensors[path]) for path, name in names.items()}

    def _read(self, path: str, stored: StoredTensor) -> Tensor:
        """Read a tensor as float32."""
        if stored.storage.dtype not in EXACT:
            self._refuse(f"{path} is {stored.storage.dtype}, which float32 cannot represent")
        values = self.archive.read(stored).float()
        if not torch.isfinite(values).all():
            self._refuse(f"{path} has values that are not finite")
        return values

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.archive.path} cannot be imported: {reason}; {AGAIN}")

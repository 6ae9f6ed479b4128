"""The modules in a checkpoint of DINO-WM (models/vit.py, models/proprio.py in its repository), as weights of `DinoWm`.

Every module is compared with a table of what the reference has there, so that nothing that would change the numbers is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.trainer.models.dino_wm import DinoWmOptions
from wmcache.trainer.pickled_modules import AGAIN, Record, shown

LINEAR, NORM = "torch.nn.modules.linear.Linear", "torch.nn.modules.normalization.LayerNorm"
DROPOUT, CONV = "torch.nn.modules.dropout.Dropout", "torch.nn.modules.conv.Conv1d"
SOFTMAX, GELU = "torch.nn.modules.activation.Softmax", "torch.nn.modules.activation.GELU"
SEQUENTIAL, LIST = "torch.nn.modules.container.Sequential", "torch.nn.modules.container.ModuleList"
PREDICTOR, EMBEDDING = "models.vit.ViTPredictor", "models.proprio.ProprioceptiveEmbedding"
LAYERS = "predictor.transformer.layers"

# path -> class in the reference, and the name of the module with its weights in `DinoWm`
Expected = dict[str, tuple[str, str]]
PREDICTOR_MODULES: Expected = {
    "predictor": (PREDICTOR, ""),
    "predictor.dropout": (DROPOUT, ""),
    "predictor.transformer": ("models.vit.Transformer", ""),
    "predictor.transformer.norm": (NORM, "norm"),
    LAYERS: (LIST, ""),
}
# Both implementations cut the rows of to_qkv into q, k and v, and then each into heads.
BLOCK_MODULES: Expected = {
    "": (LIST, ""),
    ".0": ("models.vit.Attention", ""),
    ".0.norm": (NORM, "norm_attention"),
    ".0.attend": (SOFTMAX, ""),
    ".0.dropout": (DROPOUT, ""),
    ".0.to_qkv": (LINEAR, "qkv"),
    ".0.to_out": (SEQUENTIAL, ""),
    ".0.to_out.0": (LINEAR, "out"),
    ".0.to_out.1": (DROPOUT, ""),
    ".1": ("models.vit.FeedForward", ""),
    ".1.net": (SEQUENTIAL, ""),
    ".1.net.0": (NORM, "norm_mlp"),
    ".1.net.1": (LINEAR, "mlp.0"),
    ".1.net.2": (GELU, ""),
    ".1.net.3": (DROPOUT, ""),
    ".1.net.4": (LINEAR, "mlp.3"),
    ".1.net.5": (DROPOUT, ""),
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
UNUSED = {"epoch", "encoder", "decoder", *(f"{part}_optimizer" for part in (*PARTS, "encoder", "decoder"))}


class ModuleReader:
    """Reads the weights of modules that are all accounted for; raises UserError otherwise."""

    def __init__(self, file: Path, side: int, history: int, concat_dim: int) -> None:
        """Read a model of side x side patches, as its settings describe it; `file` is named in errors."""
        self.file, self.history, self.concat_dim = file, history, concat_dim
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
        reference: dict[str, Any] = {"proprio": "embedding", "predict": "frame", "standardise": False, "width": 0}
        combine: Any = "features" if self.concat_dim else "tokens"
        return weights | predictor, DinoWmOptions(combine=combine, embedding=action, **reference, **sizes), epoch

    def _embedding(self, record: object, part: str, name: str) -> dict[str, Tensor]:
        expected = {part: (EMBEDDING, ""), f"{part}.patch_embed": (CONV, name)}
        weights = self._weights(*self._flatten(record, part), expected)
        weight = weights[f"{name}.weight"]
        if weight.ndim != 3 or weight.shape[2] != 1:
            self._refuse(f"{part} sees more than one frame at once (tubelet_size)")
        return {**weights, f"{name}.weight": weight[..., 0].contiguous()}

    def _predictor(self, record: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
        modules, tensors = self._flatten(record, "predictor")
        position = tensors.pop("predictor.pos_embedding", None)
        layers = [name for name in modules if name.startswith(f"{LAYERS}.") and name.count(".") == 3]
        blocks = {f"{LAYERS}.{number}": f"blocks.{number}." for number in range(len(layers))}
        expected = PREDICTOR_MODULES | {
            path + below: (kind, name and block + name)
            for path, block in blocks.items()
            for below, (kind, name) in BLOCK_MODULES.items()
        }
        weights = self._weights(modules, tensors, expected)
        rows = self.history * self.tokens
        if position is None or position.ndim != 3 or position.shape[:2] != (1, rows):
            found = None if position is None else tuple(position.shape)
            self._refuse(f"predictor.pos_embedding is {found}, where hydra.yaml makes it (1, {rows}, ...)")
        position = self._exact("predictor.pos_embedding", position)
        weights["position"] = rearrange(position, "1 (h n) d -> h n d", h=self.history).contiguous()
        heads = {self._heads(modules[f"{at}.0"].state, weights[f"{block}qkv.weight"]) for at, block in blocks.items()}
        if modules.pop("predictor.dropout").state.get("p") != 0:
            self._refuse("predictor.dropout.p (emb_dropout) is not 0, and wmcache has no such dropout")
        first, *others = [module.state.get("p") for module in modules.values() if module.kind == DROPOUT] or [None]
        if len(heads) != 1 or any(value != first for value in others):
            self._refuse("the predictor has no blocks, or blocks of different heads or dropouts")
        if not isinstance(first, int | float) or not 0 <= first < 1:
            self._refuse(f"the predictor's dropout is {shown(first)}")
        ((count, size),) = heads
        sizes: dict[str, Any] = {"depth": len(blocks), "heads": count, "head_dim": size, "dropout": first}
        return {**sizes, "mlp": weights["blocks.0.mlp.0.bias"].numel()}, weights

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
        causal = (frame[:, None] >= frame)[None, None]
        if not isinstance(mask, Tensor) or mask.shape != causal.shape or not torch.equal(mask.bool(), causal):
            self._refuse("the predictor's mask (Attention.bias) is not causal between frames")
        return heads, size

    def _flatten(self, root: object, where: str) -> tuple[dict[str, Record], dict[str, Tensor]]:
        modules: dict[str, Record] = {}
        tensors: dict[str, Tensor] = {}
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
                    elif isinstance(value, Tensor):
                        tensors[f"{path}.{name}"] = value
                    elif value is not None:
                        self._refuse(f"{path[:160]}.{name} is not a tensor")
        return modules, tensors

    def _weights(
        self, modules: Mapping[str, Record], tensors: Mapping[str, Tensor], expected: Expected
    ) -> dict[str, Tensor]:
        for path in sorted({*modules, *expected}, key=lambda path: (path.count("."), path)):
            kind = modules[path].kind if path in modules else "missing"
            wanted = expected[path][0] if path in expected else "nothing"
            if kind != wanted:
                self._refuse(f"{path[:160]} is {kind}, where the reference has {wanted}")
            for setting, needed in SETTINGS.get(kind, {}).items():
                if (value := modules[path].state.get(setting, needed)) != needed:
                    self._refuse(f"{path}.{setting} is {shown(value)}, not {needed!r}")
        known = [(path, name) for path, (_, name) in expected.items() if name]
        names = {f"{path}.weight": f"{name}.weight" for path, name in known}
        names |= {f"{path}.bias": f"{name}.bias" for path, name in known if not name.endswith("qkv")}
        if different := sorted(set(tensors) ^ set(names)):
            self._refuse(f"{different[0][:160]} is {'missing' if different[0] in names else 'not in the reference'}")
        return {name: self._exact(path, tensors[path]) for path, name in names.items()}

    def _exact(self, path: str, values: Tensor) -> Tensor:
        if values.dtype not in EXACT:
            self._refuse(f"{path} is {values.dtype}, which float32 cannot represent")
        if not torch.isfinite(values).all():
            self._refuse(f"{path} has values that are not finite")
        return values.float()

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.file} cannot be imported: {reason}; {AGAIN}")

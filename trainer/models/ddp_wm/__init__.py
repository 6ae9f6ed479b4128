"""DDP-WM (arXiv 2602.01780): a world model that computes only the tokens that change."""

from wmcache.trainer.models.ddp_wm.model import DdpWm, DdpWmOptions

__all__ = ["DdpWm", "DdpWmOptions"]

"""TD-MPC2 (arXiv 2310.16828): a world model without reconstruction, whose plans end in a learned value."""

from wmcache.trainer.models.td_mpc2.model import TdMpc2, TdMpc2Options

__all__ = ["TdMpc2", "TdMpc2Options"]

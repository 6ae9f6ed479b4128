"""The three programs: `wmcache`, `wmtrain` and `wmplan`.

Commands import what they call when they are called, so that `--help` is quick and `wmtrain` never loads an encoder.
"""

from __future__ import annotations

import click

from wmcache import __version__
from wmcache.commands import bench, data, decode, dream, probe, stores
from wmcache.commands.actor import actor
from wmcache.commands.command import Group
from wmcache.commands.controller import controller
from wmcache.commands.export import export
from wmcache.commands.online import online
from wmcache.commands.plan import wmplan
from wmcache.commands.rounds import rounds
from wmcache.commands.sbatch import sbatch
from wmcache.commands.study import study
from wmcache.commands.train import import_run, wmtrain
from wmcache.commands.traverse import traverse


@click.group(cls=Group)
@click.version_option(__version__, prog_name="wmcache")
def main() -> None:
    """Encode every frame once, train world models on cached latents, re-encode only live observations.

    Typical order: collect, fit (an encoder that is trained on your frames), extract, wmtrain, wmplan.
    """


for known in (
    *(data.collect, data.import_, data.fit, data.extract, data.derive, data.encoders, data.weights),
    *(stores.list_, stores.info, stores.verify, stores.finalize, stores.repair, stores.preview, stores.rm, export),
    *(
        probe.probe,
        traverse,
        bench.bench,
        bench.plan_job,
        import_run,
        decode.imagine,
        dream.dream,
        controller,
        study,
        rounds,
        online,
        sbatch,
    ),
):
    main.add_command(known)
wmtrain.add_command(decode.decoder)
wmtrain.add_command(actor)

__all__ = ["main", "wmplan", "wmtrain"]

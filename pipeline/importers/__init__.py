"""Import formats: data of other projects -> frame dataset. A new format is a file in this folder that registers an `Importer`."""

from wmcache.pipeline.importers.base import IMPORTERS, Importer, Source, write_dataset

__all__ = ["IMPORTERS", "Importer", "Source", "write_dataset"]

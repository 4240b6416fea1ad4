"""imgfs: one flat directory of virtual-machine images over several datadirs of different priority.

The Python API needs no FUSE: `ImageStore(load("imgfs.yaml"))` opens a store.
"""

from imgfs.config import Config, ConfigError, DatadirConfig, Mode, Reseal, load
from imgfs.errors import ImgfsError
from imgfs.hashing import Digests
from imgfs.image import Handle
from imgfs.record import State
from imgfs.store import Added, ImageStore
from imgfs.version import VERSION

__version__ = VERSION

__all__ = [
    "Added",
    "Config",
    "ConfigError",
    "DatadirConfig",
    "Digests",
    "Handle",
    "ImageStore",
    "ImgfsError",
    "Mode",
    "Reseal",
    "State",
    "__version__",
    "load",
]

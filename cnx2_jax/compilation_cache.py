"""Where JAX keeps the programs that it compiled, so that the next process need not compile them again."""

import hashlib
import os
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled() -> None:
    """Names a folder of the user's for JAX's persistent cache, before JAX is imported.

    A folder that the environment names stays, and an empty name switches the cache off. If the folder cannot
    be made, nothing is kept.
    """
    if VARIABLE in os.environ:
        return
    folder = _caches() / "cnx2_jax" / f"compiled-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ[VARIABLE] = str(folder)


def _caches() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ".cache"


def _processor() -> str:
    """Returns a name for this kind of processor.

    What is compiled for one CPU may not run on another, JAX does not tell them apart, and hosts of a cluster
    often share the home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), os.uname().machine)
    return hashlib.sha256(features.encode()).hexdigest()[:8]

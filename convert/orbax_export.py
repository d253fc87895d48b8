"""An Orbax checkpoint of the converted parameters, for programs that read those.

`export` writes a flat dict {parameter name: array}, `tensor_hashes` reads it back the way Orbax
restores it. Arrays stay numpy arrays: they carry no device or sharding, so they restore anywhere.
The only file of the converter that imports Orbax, and with it jax: inside functions and on the
CPU, so that no accelerator is touched. Must not know what the parameters mean.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bailing_jax.errors import EXIT_FAILURE, UserError

# What is written at a time, and the largest chunk and data file; one array may be larger. Such an
# array is copied while it waits for the disk: its export needs 0.1 to 1.6 GB, seldom its own size.
_BATCH_BYTES = 2**27


def export(arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write an Orbax checkpoint that restores as a dict of exactly these names and arrays.

    Args:
        arrays: at least one; any shape and any dtype of numpy or ml_dtypes with whole bytes.
            Memory maps are read in place, as long as their elements are aligned.
        folder: where to; must not exist yet, and still does not if this fails.

    Raises:
        UserError: the folder exists, or Orbax cannot write it.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: already exists", "Move it or give another name.", EXIT_FAILURE)
    hint = (
        "Check that the disk has room and can be written, then convert again; a folder "
        f"{folder.name}.*.partial beside it, if there is one, can be removed."
    )
    with (
        _orbax(folder, "the Orbax checkpoint cannot be written", hint) as ocp,
        _beside(folder) as partial,
    ):
        # Not compressed, because only then are memory maps written without a copy of them.
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, type_handler_registry=_batch_writer(ocp)
        )
        save_args = {name: _save_args(ocp, array) for name, array in arrays.items()}
        args = ocp.args.PyTreeSave(
            dict(arrays), save_args, ocdbt_target_data_file_size=_BATCH_BYTES
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / folder.name, args=args)
        (partial / folder.name).rename(folder)


def tensor_hashes(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """SHA-256 (hex) of every restored array's C-order bytes; memory holds one array at a time.

    Args:
        folder: what `export` wrote.
        arrays: what the checkpoint must hold. Only names, shapes and dtypes are looked at.

    Raises:
        UserError: Orbax cannot read the folder, or it holds other names, shapes or dtypes.
    """
    hint = "Remove the folder and convert again; if that fails too, check the disk."
    hashes: dict[str, str] = {}
    with (
        _orbax(folder, "the Orbax checkpoint cannot be used", hint) as ocp,
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        for name, array in arrays.items():
            wanted = {name: ocp.RestoreArgs()}
            args = ocp.args.PyTreeRestore(wanted, restore_args=wanted, partial_restore=True)
            restored = checkpointer.restore(folder.absolute(), args=args)[name]
            # What a checkpoint does not hold comes back as it was asked for.
            if not isinstance(restored, np.ndarray) or _kind(restored) != _kind(array):
                raise ValueError(f"it does not hold {name} as {_kind(array)}")
            data = np.ascontiguousarray(restored).reshape(-1).view(np.uint8).data
            hashes[name] = hashlib.sha256(data).hexdigest()
            del restored, data  # or they would stay until the next ones are there
        stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
        if extra := sorted(stored.keys() - arrays.keys()):
            raise ValueError(f"it holds {len(extra)} other tensors, e.g. {extra[0]}")
    return hashes


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder of this export's own, where it writes until all is there.

    Once a write has failed, Orbax waits for none of the others: they go on for a while, and where
    the next export wrote to the same place they would meet its files.
    """
    partial = Path(tempfile.mkdtemp(".partial", f"{folder.name}.", folder.absolute().parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batch_writer(ocp: ModuleType) -> Any:
    """A registry whose arrays are written a batch at a time; Orbax's own writes all at once."""

    class BatchWriter(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any) -> list[Any]:
            for batch in _batches(value.nbytes for value in values):
                # A thread of its own writes it, so waiting here blocks no event loop it needs.
                for written in await super().serialize(values[batch], infos[batch], args[batch]):
                    written.result()
            return []

    # Orbax copies numpy arrays in case they change while it writes; these don't.
    writer = BatchWriter(deepcopy_host_arrays=False)
    return ocp.type_handlers.create_type_handler_registry((np.ndarray, writer))


def _save_args(ocp: ModuleType, array: np.ndarray) -> Any:
    # Cut large stacks of matrices between those: pieces lie together in the file, and a program
    # that restores some of the experts reads only theirs.
    cut_first = array.ndim > 2 and array.nbytes > _BATCH_BYTES
    return ocp.SaveArgs(shard_axes=(0,) if cut_first else ())


def _batches(sizes: Iterable[int]) -> Iterator[slice]:
    """Slices of neighbours that together have at most `_BATCH_BYTES`, or of one that has more."""
    start, end, total = 0, 0, 0
    for end, size in enumerate(sizes):
        if end > start and total + size > _BATCH_BYTES:
            yield slice(start, end)
            start, total = end, 0
        total += size
    yield slice(start, end + 1)


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


@contextmanager
def _orbax(folder: Path, problem: str, hint: str) -> Iterator[ModuleType]:
    """Import Orbax, keep its log off the user's stderr, make its errors `UserError`s."""
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # read by jax at import; Orbax initialises it
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    verbosity, hook = absl_logging.get_verbosity(), sys.unraisablehook
    absl_logging.set_verbosity(absl_logging.FATAL)
    # Once one write of a batch has failed, others fail too, or find Orbax's event loop closed.
    sys.unraisablehook = lambda u: None if isinstance(u.exc_value, RuntimeError) else hook(u)
    asyncio_logger, is_news = logging.getLogger("asyncio"), _is_news(folder)
    asyncio_logger.addFilter(is_news)
    try:
        yield ocp
    except Exception as error:  # Orbax documents no set of errors
        reason = str(error).partition(" [tensorstore_spec=")[0]  # a page of settings
        raise UserError(f"{folder}: {problem}: {reason}", hint, EXIT_FAILURE) from error
    else:
        # After a failure the others may take their time.
        sys.unraisablehook = hook
        asyncio_logger.removeFilter(is_news)
    finally:
        absl_logging.set_verbosity(verbosity)


def _is_news(folder: Path) -> Callable[[logging.LogRecord], bool]:
    """What asyncio's log may show: all but failed writes to this folder that nobody waited for."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, ValueError) or str(folder.absolute()) not in str(error)

    return is_news

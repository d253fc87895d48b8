"""Is this folder what it should be? Every byte is read; nothing is written.

A native folder: names, shapes, dtypes and headers against the manifest, then the sha256 and the
values of every tensor and the sha256 of every other file. With its source also the way back:
every checkpoint tensor is put together again and compared with the source's bit for bit. A
Hugging Face folder: that it is a checkpoint of its config, and its values; it carries no hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from convert.mapping import SLAB_BYTES
from convert.native import NativeFolder, NativeTensor, open_native, sha256_of
from convert.output_folder import first_difference
from convert.plan import match
from convert.source import CONFIG_NAME, CheckpointSource, open_source
from convert.strict_json import show
from convert.to_hf import checkpoint_tensors, restored, restored_dtype
from convert.to_native import same_bytes
from convert.values import check_values
from convert.workers import Workers
from convert.writer import SPARE_BYTES, Progress


@dataclass
class Verdict:
    """What was looked at and what is wrong.

    Attributes:
        kind: "native" or "Hugging Face".
        tensors: number of tensors whose values were read.
        compared: number of tensors compared with the source.
        problems: one line each; empty when all is well.
    """

    kind: str
    tensors: int = 0
    compared: int = 0
    problems: list[str] = field(default_factory=list)


def verify_native(
    folder: Path, source: Path | None, num_workers: int, progress: Progress
) -> Verdict:
    """Verify a native folder, against its source too unless that is None.

    Raises:
        UserError: a folder is so wrong that its tensors cannot be found, or cannot be read.
    """
    verdict = Verdict("native")
    with open_native(folder) as native:
        config = native.model_config()
        expected = checkpoint_tensors(native, config)
        stored = {**native.params, **native.extra}
        total = sum(tensor.info.nbytes for tensor in stored.values())
        if source is None:
            workers = Workers(num_workers, num_workers * SLAB_BYTES)
            progress.begin(total, 0)
            _check_stored(native, stored.values(), workers, progress, verdict)
            return verdict
        with open_source(source) as original:
            sizes = [info.nbytes for info in original.tensors.values()]
            # Of a tensor two copies are held, the source's and the one put together.
            workers = Workers(num_workers, 2 * max(sizes) + SPARE_BYTES)
            progress.begin(total + sum(sizes), 0)
            _check_stored(native, stored.values(), workers, progress, verdict)
            _compare_config(native, original, verdict)
            names = [*expected, *native.extra]
            strangers = sorted(original.tensors.keys() ^ set(names))
            if strangers:
                verdict.problems.append(
                    f"{source}: {len(strangers)} tensors are only in one of both, e.g. "
                    f"{show(strangers[0])}"
                )

            def compare(name: str) -> None:
                nbytes = original.tensors[name].nbytes
                with workers.holding(2 * nbytes):
                    verdict.problems += _compare(native, original, name, expected)
                progress.add(name, nbytes)

            shared = [name for name in names if name in original.tensors]
            workers.for_each(compare, shared)
            verdict.compared = len(shared)
    return verdict


def verify_checkpoint(folder: Path, num_workers: int, progress: Progress) -> Verdict:
    """Verify a Hugging Face folder.

    Raises:
        UserError: it is no checkpoint of a supported model, or cannot be read.
    """
    verdict = Verdict("Hugging Face")
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config, where=str(folder / CONFIG_NAME))
        match(config, source.tensors, str(folder))
        sizes = [info.nbytes for info in source.tensors.values()]
        workers = Workers(num_workers, max(sizes) + SPARE_BYTES)
        progress.begin(sum(sizes), 0)

        def check(name: str) -> None:
            nbytes = source.tensors[name].nbytes
            with workers.holding(nbytes):
                tensor = source.read(name)
                try:
                    check_values(tensor, source.tensors[name].file, name)
                except UserError as error:
                    verdict.problems.append(error.message)
            progress.add(name, nbytes)

        workers.for_each(check, source.tensors)
        verdict.tensors = len(source.tensors)
    return verdict


def _check_stored(
    native: NativeFolder,
    tensors: Iterable[NativeTensor],
    workers: Workers,
    progress: Progress,
    verdict: Verdict,
) -> None:
    for name, entry in native.manifest["files"].items():
        if "sha256" in entry and sha256_of(native.folder / name) != entry["sha256"]:
            verdict.problems.append(f"{native.folder / name}: differs from its sha256")

    def check(tensor: NativeTensor) -> None:
        verdict.problems.extend(native.problems_of(tensor, progress.add))

    tensors = list(tensors)
    workers.for_each(check, tensors)
    verdict.tensors = len(tensors)


def _compare_config(native: NativeFolder, original: CheckpointSource, verdict: Verdict) -> None:
    """Equal but for the decay offset, which the converter may have been told to write."""
    ours, theirs = dict(native.config), dict(original.config)
    for config in (ours, theirs):
        config.pop("decay_layer_offset", None)
    difference = first_difference(theirs, ours)
    if difference:
        verdict.problems.append(f"{original.folder / CONFIG_NAME}: {difference}")


def _compare(
    native: NativeFolder, original: CheckpointSource, name: str, expected: dict
) -> list[str]:
    info = original.tensors[name]
    source, parts = expected.get(name, (None, []))
    if source is None:
        stored = native.extra[name].info
        shape, dtype, recorded = stored.shape, stored.dtype, str(stored.dtype)
    else:
        shape, dtype = source.shape, restored_dtype(native, name, parts[0][0])
        recorded = native.params[parts[0][0]].sources[name]
    if str(info.dtype) != recorded:
        return [f"{info.file}: tensor {show(name)} is {info.dtype}, was {recorded}"]
    if info.shape != shape:
        return [f"{info.file}: tensor {show(name)} has shape {info.shape}, was {shape}"]
    try:
        found = restored(native, name, source, parts, dtype) if source else native.files.read(name)
    except UserError as error:  # values that no weight has
        return [error.message]
    wanted = original.read(name)
    same = same_bytes(wanted if wanted.dtype == dtype else wanted.astype(dtype), found)
    return [] if same else [f"{info.file}: tensor {show(name)} differs from {native.folder}"]

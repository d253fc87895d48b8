"""Native -> Orbax: the same arrays as one Orbax checkpoint, for programs that read those.

    manifest.json      as a native folder's, with another format name
    orbax/             the checkpoint: a dict from parameter path to array
    extra.safetensors  and config, tokenizer, ...: as in the native folder

Orbax's files differ from one export to the next, so what is compared is the sha256 of every
tensor, read back the way Orbax restores it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_FAILURE, UserError
from convert.native import (
    EXTRA_FILE,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    NativeFolder,
    check_params,
    sha256_of,
)
from convert.orbax_export import export, tensor_hashes
from convert.source import read_json
from convert.to_hf import extra_tensor
from convert.writer import Conversion, Folder, OutFile

FORMAT = "bailing-jax orbax"
CHECKPOINT = "orbax"


def plan_orbax(native: NativeFolder) -> tuple[ModelConfig, Conversion]:
    """Lay out the export of a native folder; reads no tensor.

    Raises:
        UserError: the manifest's tensors are not those of the model.
    """
    config = native.model_config()
    paths = [param.path for param in check_params(native, config)]
    digest = sha256_of(native.folder / MANIFEST_NAME)
    extra = tuple(extra_tensor(native, name) for name in native.extra)
    num_bytes = sum(native.params[path].info.nbytes for path in paths)
    small = native.small_files()

    def make(folder: Path) -> None:
        arrays = {path: native.map(path) for path in paths}
        export(arrays, folder)
        found = tensor_hashes(folder, arrays)
        wrong = [path for path in paths if found[path] != native.params[path].sha256]
        if wrong:
            raise UserError(
                f"{folder}: {len(wrong)} tensors differ from the native folder, e.g. {wrong[0]}",
                "Verify the native folder, check the disk, then convert again.",
                EXIT_FAILURE,
            )

    return config, Conversion(
        files=(OutFile(EXTRA_FILE, extra, {}),) if extra else (),
        small=small,
        last=lambda _records: {MANIFEST_NAME: _manifest(native.manifest, digest)},
        identity={"command": "to orbax", "native_manifest_sha256": digest},
        is_done=lambda folder: _is_done(folder, digest),
        check_unchanged=native.files.check_unchanged,
        notes=[],
        folder=Folder(CHECKPOINT, len(paths), num_bytes, make),
    )


def is_export_of(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder is the export of a conversion to native, told by that one's identity."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return False
    found = read_json(path, "the manifest", MANIFEST_LIMIT)
    if found.get("format") != FORMAT:
        return False
    kept = [key for key in identity if key not in ("format", "files")]
    return all(found.get(key) == identity[key] for key in kept)


def _manifest(native: Mapping[str, Any], digest: str) -> bytes:
    """The native manifest without its weight files: tensors and hashes stay."""
    files = {
        name: entry
        for name, entry in native["files"].items()
        if not name.endswith(".safetensors")
    }
    tensors = {
        name: {**entry, "file": EXTRA_FILE if entry["file"] == EXTRA_FILE else CHECKPOINT}
        for name, entry in native["tensors"].items()
    }
    content = {
        **native,
        "format": FORMAT,
        "native_manifest_sha256": digest,
        "files": files,
        "tensors": tensors,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _is_done(folder: Path, digest: str) -> bool:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return False
    return read_json(path, "the manifest", MANIFEST_LIMIT).get("native_manifest_sha256") == digest

"""`org/name`: a model of the Hugging Face hub, in this machine's cache or fetched on request.

Nothing is ever fetched unless the user asks. Only weights in safetensors, JSON, tokenizer,
template, licence and model card are: remote code and pickles stay where they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError

# What a release folder needs to run; see convert.side_files for what is kept of it.
PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*", "LICENCE*", "NOTICE*",
    "README.md",
)  # fmt: skip

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(model: str) -> bool:
    """Whether a name has the form org/name (it may be a folder all the same)."""
    return _HUB_NAME.fullmatch(model) is not None


def find(model: str, *, download: bool) -> Path:
    """The folder of a hub model.

    Args:
        model: org/name.
        download: fetch what is not here, or not up to date; needs the network.

    Raises:
        UserError: it is not in the cache, or can't be fetched.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, local_files_only=not download, allow_patterns=list(PATTERNS)
            )
        )
    # Beside what it documents the library lets errors of its HTTP library through, which is another
    # one in each of its versions.
    except Exception as error:
        if not download:
            raise UserError(
                f"{model}: no such folder, and not in the Hugging Face cache "
                f"({constants.HF_HUB_CACHE})",
                "Add --download to fetch it from the hub, or give the folder it lies in.",
                EXIT_USAGE,
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{model}: cannot be fetched from the hub: {reason}",
            "Check the name, the network, and for a gated model HF_TOKEN.",
            EXIT_FAILURE,
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Packs in a repository of the Hugging Face Hub, by the extra `samda[hub]`.

A repository holds `model.samda.zip`, see :mod:`samda.models.pack`, and its model card as `README.md`. The client of the
Hub keeps tokens, caches and the addresses of private hubs (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from samda.errors import InputError, SamdaError, UsageError, one_line
from samda.io import refuse_full
from samda.models.pack import CARD, pack_model, unpack_model

FILE = "model.samda.zip"
ATTRIBUTES = ".gitattributes"  # that the Hub itself puts into every repository


def push_model(
    model: str | Path, repository: str, version: str | None = None, license: str | None = None, public: bool = False
) -> str:
    """Upload a pack of a model folder as one commit; the repository is made where it does not exist.

    Args:
        model: the model folder.
        repository: "OWNER/NAME".
        version: of the model folder; None: the active one.
        license: under which the model is shared, for its card.
        public: whether a new repository can be read by all; one that exists stays as it is.

    Returns:
        Address of the commit.

    Raises:
        UsageError: no such name, or a repository with files of others.
        InputError: the Hub refuses or cannot be reached.
    """
    hub, repository = _client(), _checked(repository)
    with tempfile.TemporaryDirectory() as folder, _plain_errors(repository):
        pack = pack_model(model, Path(folder) / FILE, version, license)
        with zipfile.ZipFile(pack) as archive:
            card = archive.read(CARD)
        api = hub.HfApi(library_name="samda")
        api.create_repo(repository, private=not public, exist_ok=True)
        present = set(api.list_repo_files(repository)) - {ATTRIBUTES}
        if present and FILE not in present:
            raise UsageError(
                f"{repository} holds other files ({', '.join(sorted(present)[:3])}); choose another repository"
            )
        files = {CARD: card, FILE: str(pack)}
        operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repository, operations, commit_message="Model of samda").commit_url)


def pull_model(repository: str, folder: str | Path, revision: str | None = None) -> Path:
    """Write the model folder of a pack in a repository; see :func:`samda.models.pack.unpack_model`.

    Args:
        repository: "OWNER/NAME".
        folder: the model folder to write.
        revision: branch, tag or commit; None: the newest.

    Raises:
        UsageError: no such name.
        InputError: there is no such repository, revision or pack, no access to it, or the Hub cannot be reached.
    """
    hub, repository = _client(), _checked(repository)
    refuse_full(Path(folder).expanduser())  # before the download
    with _plain_errors(repository):
        file = hub.HfApi(library_name="samda").hf_hub_download(repository, FILE, revision=revision)
    return unpack_model(file, folder)


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError("the Hugging Face Hub needs huggingface_hub; pip install 'samda[hub]'") from error
    return huggingface_hub


def _checked(repository: str) -> str:
    if repository.count("/") != 1:
        raise UsageError(f"repository {repository!r} must be OWNER/NAME")
    return repository


@contextlib.contextmanager
def _plain_errors(repository: str) -> Iterator[None]:
    """The client's errors, of many kinds, in one line."""
    try:
        yield
    except SamdaError:
        raise
    except Exception as error:
        text = one_line(str(error).rpartition("\n\n")[2])  # before it, the client names the request
        raise InputError(
            f"{repository}: {text}; check the name, the connection and your access (`hf auth login`)"
        ) from error

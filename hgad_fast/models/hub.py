"""Models in repositories of a hub: one model file with its card up, one model file down.

The client is huggingface_hub, which comes with timm; it is imported by the first call. Of a repository nothing is
fetched but the model file, which is checked as any other: it may come from anybody, and nothing in it is executed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ..environment import VERSION
from ..features.hub import ask_hub, reaching_hub
from ..files import file_hash, printable
from ..training.checkpoint import MODEL

README = "README.md"  # what a hub shows of a repository
LOG_IN = "hf auth login, the variable HF_TOKEN, or token="

Model = TypeVar("Model", bound="OnHub")


class OnHub:
    """What a model of any method does with a hub: it goes up with its card, and comes down."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Return a model of this method from a repository of a hub, or from a folder; see `Detector.load`.

        Args:
            repo_id: owner/name of the repository, or a folder with a ``model.safetensors``, which comes first.
            revision: branch, tag or commit; a commit's hash fixes the model for good.
            token: of the hub; None: ``HF_TOKEN``, or that of ``hf auth login``.
            cache_dir: where downloads are kept; None: the hub's own folder.
            device: the device of the model; None: the CPU.
            local_files_only: take what has been downloaded before, and do not ask the hub.

        Raises:
            ConnectionError: the hub cannot be reached, or has no such repository, revision or file.
            ValueError: as by `load`; or `repo_id` is no name of a repository, or a folder, which has no revisions.
        """
        path = _model_file(repo_id, revision, token, cache_dir, local_files_only)
        return cast(Any, cls).load(path, device)

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        card: str | os.PathLike[str] | None = None,
        include_backbone: bool = True,
    ) -> str:
        """Upload the model and its card to a repository of a hub, which is made if need be, in one commit.

        Args:
            repo_id: owner/name.
            private: whether only its owners see the repository. None: as it is, or for a new one as the hub makes them,
                which mostly is for everybody. A repository that is not as asked for is left as it is.
            token: one that may write; None: ``HF_TOKEN``, or that of ``hf auth login``.
            revision: the branch, which is made if need be; None: the main one.
            commit_message: what the history of the repository says.
            card: its text (of several lines), a file with it, or the folder of the model's training: the ``card.md`` in
                it, which may have been edited, or without one what its record and kept figures tell
                (`evaluation.card`). None: what the model alone tells, without figures.
            include_backbone: as in `save`. Without it users need the same weights of the backbone.

        Returns:
            The address of the commit.

        Raises:
            ConnectionError: the hub cannot be reached, or refuses.
            ValueError: `repo_id` is no name of a repository, the repository is public though `private` (or the other
                way round), `card` is none, or the folder's model is another.
        """
        name = _repository(repo_id)
        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / MODEL
            self.save(file, include_backbone)
            readme = _card(self, file, card, name, include_backbone)
            client = huggingface_hub.HfApi(token=token, library_name="hgad_fast", library_version=VERSION)
            failure = f"{name} could not be uploaded to the hub"
            with reaching_hub(failure, lambda error: _remedy(error, name, revision, writing=True)):
                client.create_repo(name, private=private, exist_ok=True)
                is_private = private if private is None else client.model_info(name).private
            if is_private != private:
                raise ValueError(
                    f"private is {private}, and {name} is {'private' if is_private else 'public'}: nothing was "
                    "uploaded; change its settings on the hub, or name another repository"
                )
            with reaching_hub(failure, lambda error: _remedy(error, name, revision, writing=True)):
                if revision is not None and not revision.startswith("refs/"):
                    client.create_branch(name, branch=revision, exist_ok=True)
                commit = client.create_commit(
                    name,
                    [
                        huggingface_hub.CommitOperationAdd(MODEL, file),
                        huggingface_hub.CommitOperationAdd(README, readme.encode()),
                    ],
                    commit_message=commit_message or f"{type(self).__name__} by hgad_fast {VERSION}",
                    revision=revision,
                )
        return commit.commit_url


def _model_file(
    repo_id: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """Return the model file of a folder, or of a repository, downloaded unless that was done before."""
    local = Path(repo_id) / MODEL if isinstance(repo_id, (str, os.PathLike)) else None
    if local is not None and local.is_file():
        if revision is not None:
            raise ValueError(f"repo_id is {printable(repo_id)}, a folder here, which has no revision {revision!r}")
        return local
    name = _repository(repo_id)
    import huggingface_hub

    what = f"{MODEL} of {name}" + (f" at {revision}" if revision else "")
    what += " (the folder of this name here holds none)" if Path(name).is_dir() else ""
    cache = None if cache_dir is None else os.fspath(cache_dir)
    with reaching_hub(f"{what} could not be had from the hub", lambda error: _remedy(error, name, revision)):
        if not local_files_only:
            ask_hub(f"{name}@{revision or ''}", MODEL, cache_dir=cache, token=token)
        try:
            path = huggingface_hub.hf_hub_download(
                name,
                MODEL,
                revision=revision,
                token=token,
                cache_dir=cache,
                local_files_only=local_files_only,
                library_name="hgad_fast",
                library_version=VERSION,
            )
        except huggingface_hub.utils.LocalEntryNotFoundError as error:  # behind it is why the hub did not answer
            raise error.__cause__ or error from None
    return Path(path)


def _repository(repo_id: str | os.PathLike[str]) -> str:
    """Return the name of a repository.

    Raises:
        ValueError: it cannot be one.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(repo_id, (str, os.PathLike)):
        raise ValueError(f"repo_id is {repo_id!r}; it must be a text, the name of a repository (owner/name)")
    name = os.fspath(repo_id)
    if Path(name).is_file():
        raise ValueError(f"repo_id is {printable(name)!r}, a file here: hgad_fast.load reads it")
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError(f"{name} has no owner")
    except HFValidationError as error:
        raise ValueError(
            f"repo_id is {printable(name)!r}, which is no name of a repository (owner/name, of letters, digits, -, _ "
            f"and .) and no folder that holds a {MODEL}"
        ) from error
    return name


def _card(model: Any, file: Path, card: str | os.PathLike[str] | None, name: str, include_backbone: bool) -> str:
    """Return the text of the card that goes with a model file; see `OnHub.push_to_hub`."""
    from ..evaluation.card import CARD, background_in, model_card  # not before it is needed: it brings the evaluation

    if card is None:
        return model_card(model, file, repo=name)
    if isinstance(card, str) and "\n" in card:
        return card
    path = Path(card)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not (path / MODEL).is_file():
        raise ValueError(
            f"card is {printable(card)}: it must be a text of several lines, a file, or the folder of a training with "
            f"its {MODEL}"
        )
    kept = file.with_name("kept.safetensors")
    type(model).load(path / MODEL).save(kept, include_backbone)
    if file_hash(kept) != file_hash(file):
        raise ValueError(
            f"card is {printable(path)}, whose {MODEL} is another model than the one to be uploaded (or it has been "
            "calibrated since): its figures would not be true of this one"
        )
    if not (path / CARD).is_file():
        return model_card(model, file, background_in(path), repo=name)
    text = (path / CARD).read_text(encoding="utf-8")
    if file_hash(path / MODEL) not in text:
        raise ValueError(
            f"{printable(path / CARD)} is the card of another model: write it anew (hgad-fast card --overwrite), or "
            "remove it"
        )
    return text


def _remedy(error: Exception, name: str, revision: str | None, writing: bool = False) -> str:
    """Return what somebody can do about an error of the hub's client."""
    from huggingface_hub import utils

    status = getattr(getattr(error, "response", None), "status_code", None)
    access = f"a token that may {'write to' if writing else 'read'} it ({LOG_IN})"
    if isinstance(error, utils.GatedRepoError):
        return f"{name} is open to those whom its owner admits: ask on its page on the hub, then give {access}."
    if isinstance(error, utils.LocalTokenNotFoundError):
        return f"The hub knows no user: give {access}."
    if isinstance(error, utils.RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision or 'main'!r}."
    if isinstance(error, utils.RepositoryNotFoundError):
        return f"There is no repository {name}, or it is private: look at the name, or give {access}."
    if status in (401, 403):
        return f"The token is unknown, or does not allow this: give {access}."
    if isinstance(error, utils.EntryNotFoundError) and not isinstance(error, utils.LocalEntryNotFoundError):
        return f"{name} holds no {MODEL}: it is no repository that push_to_hub has filled."
    if writing:
        return "Look at the network and at the state of the hub, which is asked only where HF_HUB_OFFLINE is not set."
    return (
        "Look at the network and at the state of the hub, which is asked only where HF_HUB_OFFLINE is not set and "
        "local_files_only is False; without it a model loads that was downloaded before, or one of a folder."
    )

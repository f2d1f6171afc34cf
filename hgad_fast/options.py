"""Options that commands of the command line share, what their values mean, and its errors in its own words.

Nothing here imports torch at the top, so that the command line answers at once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .importing import dynamo_deferred, uncollected
from .terminal import printable, say, working

METHOD_NAMES = "gaussian, hgad, vqflow"  # those that are registered, as a test holds
PRESET_NAMES = "official, fast (hgad); gaussian, gaussian-dinov2 (gaussian); official, small (vqflow)"
DEFAULT_METHOD = "hgad"


def _list_fields(assignments: list[str] | None) -> list[str] | None:
    """Print the fields of the configurations where ``--set help`` asks for them."""
    if "help" in (assignments or ()):
        from .methods import METHODS
        from .models.config import Config
        from .models.fields import field_table

        print(field_table(Config, [METHODS[name].config_class for name in sorted(METHODS)]))
        raise typer.Exit
    return assignments


Method = Annotated[
    str | None,
    typer.Option(help=f"The method of detection: {METHOD_NAMES}; default: that of --preset, or {DEFAULT_METHOD}."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is a GPU.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"A named set of fields to start from: {PRESET_NAMES}. What each needs and reaches: hgad-fast presets."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="JSON file with fields of the configuration (HGADConfig, ...).")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        callback=_list_fields,
        is_eager=True,
        help="FIELD=VALUE of the configuration, e.g. img_size=512; may be repeated. --set help lists the fields.",
    ),
]
Backbone = Annotated[str | None, typer.Option(help="A timm model (backbone_arch).")]
Weights = Annotated[str | None, typer.Option(help="'pretrained', 'packaged', a state-dict file, or 'random'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON on stdout.")]
ImgSize = Annotated[
    str | None,
    typer.Option(
        metavar="[native|N]",
        help="See images as they are (native), or with a short side of N pixels; default: as in training. Thresholds "
        "fit if the model was calibrated at the same size: hgad-fast calibrate.",
    ),
]

# What messages of the library call arguments, as the command line calls them.
_IN_PYTHON: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"--skip-bad, skip_bad=True": "--skip-bad",
    r"model\.(calibrate|absorb), hgad-fast \1": r"hgad-fast \1",
    r"model\.add_class, hgad-fast add-class": "hgad-fast add-class",
    r"backbone_weights=None (for random weights )?\(--weights random\)": "--weights random",
    r"backbone_weights='packaged' \(--weights packaged\)": "--weights packaged",
    r"backbone_weights \(--weights FILE\)": "--weights FILE",
    r"backbone_weights=None": "--weights random",
    r"backbone_weights=(?=')": "--weights ",
    r"(\w+Config\.)?backbone_weights": "--weights",
    r"cache_dtype='(\w+)'": r"--cache-dtype \1",
    r"cache='(\w+)'": r"--cache \1",
    r"resume=True": "--resume",
    r"skip_bad=True": "--skip-bad",
    r"img_size='native'": "--img-size native",
    r"img_size(?= (is|as) )": "--img-size",
    r"size=\(height, width\) \(--size HxW\)": "--size HxW",
    r"size=\[\(h, w\), \.\.\.\] \(--size HxW,HxW,\.\.\.\)": "--size HxW,HxW,...",
    r"check=False \(--no-check\)": "--no-check",
    r"check_images \(--check-images\)": "--check-images",
    r"inputs='features' \(--inputs features\)": "--inputs features",
    r"output_dir": "--output",
    r"alpha(?= is )": "--alpha",
    r"defect_rate(?= is )": "--defect-rate",
    r"(cache_dir|cache_dtype|cache_limit|false_alarm_rate|max_memory|map_path|skip_bad)": lambda found: (
        "--" + found[1].replace("_", "-")
    ),
}


@contextmanager
def begin(what: str) -> Iterator[None]:
    """Say what a command begins with, and only then import torch; of several processes the first one says it."""
    with working(what) if is_first() else nullcontext():
        with uncollected():
            from .models import hgad  # noqa: F401 (brings torch and most of the library)
        with dynamo_deferred():
            yield


def in_options(message: str) -> str:
    """Return a message of the library with the options of the command line in the place of arguments of Python."""
    for pattern, replacement in _IN_PYTHON.items():
        message = re.sub(rf"(?<![\w/\\.-]){pattern}(?![\w/\\.-]\w)", replacement, message)  # no parts of paths
    return message


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the library's own errors (bad input, missing extras, a diverged run) into a message and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: say(f"hgad-fast: {in_options(str(message))}")
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `hgad-fast ... | head`: typer ends quietly
        except KeyboardInterrupt:
            say("hgad-fast: interrupted; every file written so far is whole")
            raise typer.Exit(130) from None
        except Exception as error:
            if not isinstance(error, (ValueError, OSError, ImportError)) and not _ends_a_training(error):
                raise
            say(f"hgad-fast: {in_options(str(error))}")
            raise typer.Exit(1) from error

    return run


def _ends_a_training(error: Exception) -> bool:
    from .training.fit import NonFiniteLossError
    from .training.processes import LostProcessError

    return isinstance(error, (NonFiniteLossError, LostProcessError))


def require_package(module: str, what: str, extra: str) -> None:
    """Raise a ModuleNotFoundError that names the extra, where a module is missing that `what` needs."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{what} needs {module}: pip install 'hgad-fast[{extra}]'", name=module)


def is_first() -> bool:
    """Return whether this is the only process, or of those that torchrun started the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def quoted(words: Iterable[str | os.PathLike[str]]) -> str:
    """Return a command that can be copied to a shell."""
    shown = list(map(printable, words))
    return subprocess.list2cmdline(shown) if os.name == "nt" else shlex.join(shown)


def configuration(
    method: str | None,
    preset: str | None,
    class_names: tuple[str, ...],
    file: Path | None,
    assignments: list[str] | None,
    backbone: str | None,
    weights: str | None,
) -> Any:
    """Return the configuration that the options of `train` and `ablate` ask for."""
    from .methods import config_class
    from .models.fields import assignment

    settings_class = config_class(method, preset)
    fields: dict[str, Any] = {"n_classes": len(class_names), "class_names": class_names}
    if file is not None:
        fields |= _json_object(file)
    fields |= dict(assignment(text) for text in assignments or [])
    if backbone is not None:
        fields["backbone_arch"] = backbone
    if weights is not None:
        fields["backbone_weights"] = None if weights == "random" else weights
    return settings_class.from_fields(fields) if preset is None else settings_class.preset(preset, **fields)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{printable(path)} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{printable(path)} holds a {type(fields).__name__}; it must hold the fields of a configuration"
        )
    return fields


def usable_device(name: str | None) -> str:
    """Return the device asked for if the operations can run on it."""
    import torch

    from . import ops

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun starts a process for each GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        ops.path(torch.empty(0, device=name))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason} (--device cpu always works)") from error
    return name


def image_size(text: str | None) -> int | str | None:
    """Return the value of --img-size."""
    if text is None or text == "native":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--img-size is {text!r}; give the short side in pixels, or native")
    return int(text)


def given_class(text: str | None, groups: Sequence[str]) -> int | str | None:
    """Return the class that ``--class`` names: a number, unless a group of the model has it as its name.

    What is too long for the number of a class stays a text, as Python reads no numbers of thousands of digits.
    """
    return int(text) if text and text.isdecimal() and len(text) < 20 and text not in groups else text


def numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers of an option, which have commas between them."""
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; write whole numbers with commas between them, such as 1,5") from error


def require_rate(false_alarm_rate: float | None) -> None:
    """Raise a ValueError for a false-alarm rate that is none."""
    if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
        raise ValueError(f"--false-alarm-rate is {false_alarm_rate}; allowed: above 0 and below 1")


def require_no_folder(output: Path | None) -> None:
    """Raise a ValueError where --output, which names a file to write, is a folder."""
    if output is not None and output.is_dir():
        raise ValueError(f"--output is {printable(output)}, a folder; name the file to write")


def load_model(path: Path, device: str | None, false_alarm_rate: float | None = None) -> Any:
    """Return the model in a file, with another false-alarm rate if one is given."""
    from .methods import load

    require_rate(false_alarm_rate)
    model = load(path, usable_device(device))
    if false_alarm_rate is not None:
        if model.calibration is None:
            raise ValueError(f"{printable(path)} is not calibrated, so --false-alarm-rate means nothing")
        model.calibration.false_alarm_rate = false_alarm_rate
    return model

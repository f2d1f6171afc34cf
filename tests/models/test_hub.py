"""Models go to a hub with their card and come back the same; whatever the hub refuses is one sentence with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import small_detectors
import small_gaussian
import torch
from hub_server import OWNER, READER, Hub, Repository
from huggingface_hub import constants

from hgad_fast import GaussianModel, HGADModel
from hgad_fast.evaluation import run_folder
from hgad_fast.evaluation.card import write_card
from hgad_fast.models.detector import Detector

NAME = "acme/screws"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Yield an empty hub on loopback, which the client asks, without a token and with an empty cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture(scope="module")
def model() -> GaussianModel:
    return small_detectors.gaussian()


def file_of(model: Detector, folder: Path) -> bytes:
    model.save(folder / "saved.safetensors")
    return (folder / "saved.safetensors").read_bytes()


def filled(hub: Hub, content: bytes, **properties: bool) -> Repository:
    """Put a repository with a model file on the hub."""
    hub.repositories[NAME] = Repository(**properties)
    hub.repositories[NAME].branches["main"]["model.safetensors"] = content
    return hub.repositories[NAME]


def refused(error: type[Exception] = ConnectionError, repo_id: object = NAME, **options: object) -> str:
    with pytest.raises(error) as caught:
        GaussianModel.from_pretrained(repo_id, **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("make", [small_detectors.hgad, small_detectors.vqflow, small_detectors.gaussian])
def test_a_model_of_any_method_goes_up_in_one_commit_and_comes_back_the_same(make, hub, tmp_path):
    model = make()
    address = model.push_to_hub(NAME, token=OWNER, commit_message="first")
    files = hub.repositories[NAME].branches["main"]
    assert sorted(files) == ["README.md", "model.safetensors"]
    assert hub.repositories[NAME].messages == ["first"] and address.startswith(f"{hub.url}/{NAME}/commit/")
    assert files["model.safetensors"] == file_of(model, tmp_path)
    loaded = type(model).from_pretrained(NAME)
    images = small_detectors.images_of_classes(3)
    expected, result = model.score(images), loaded.score(images)
    assert torch.equal(result.anomaly_map, expected.anomaly_map)
    assert torch.equal(result.is_anomalous, expected.is_anomalous)
    card = files["README.md"].decode()
    assert f'model = {type(model).__name__}.from_pretrained("{NAME}")' in card
    assert hub_server.hash_of(files["model.safetensors"]) in card and "## Figures\n\n**None.**" in card


def test_nothing_but_the_model_file_is_asked_for(model, hub, tmp_path):
    filled(hub, file_of(model, tmp_path)).branches["main"]["code.py"] = b"raise SystemExit"
    GaussianModel.from_pretrained(NAME)
    path = f"/{NAME}/resolve/main/model.safetensors"
    assert {request.partition(" ")[2] for request in hub.requests} == {path}


def test_a_revision_is_a_branch_that_is_made_or_a_commit(model, hub):
    other = small_detectors.gaussian(dim=4)
    model.push_to_hub(NAME, token=OWNER)
    commit = other.push_to_hub(NAME, token=OWNER, revision="line-2").rpartition("/")[2]
    assert GaussianModel.from_pretrained(NAME).config.dim == model.config.dim
    assert GaussianModel.from_pretrained(NAME, revision="line-2").config.dim == 4
    assert GaussianModel.from_pretrained(NAME, revision=commit).config.dim == 4
    assert f"{NAME} has no branch, tag or commit 'line-3'" in refused(revision="line-3")


def test_private_is_kept_to(model, hub):
    model.push_to_hub(NAME, token=OWNER, private=True)
    assert hub.repositories[NAME].private
    model.push_to_hub(NAME, token=OWNER)
    hub.repositories[NAME].private = False
    with pytest.raises(ValueError, match=f"private is True, and {NAME} is public: nothing was uploaded"):
        model.push_to_hub(NAME, token=OWNER, private=True)
    assert len(hub.repositories[NAME].messages) == 2


def test_tokens_come_from_the_argument_and_the_environment(model, hub, tmp_path, monkeypatch):
    filled(hub, file_of(model, tmp_path), private=True)
    message = refused()
    assert f"There is no repository {NAME}, or it is private" in message
    assert all(way in message for way in ("hf auth login", "HF_TOKEN", "token="))
    assert READER not in refused(token=READER)
    assert GaussianModel.from_pretrained(NAME, token=OWNER).groups == model.groups
    monkeypatch.setenv("HF_TOKEN", OWNER)
    shutil.rmtree(tmp_path / "cache")
    assert GaussianModel.from_pretrained(NAME).groups == model.groups
    assert "hf auth login" in refused(token=False, cache_dir=tmp_path / "other")


@pytest.mark.parametrize("token", [None, READER])
def test_a_gated_repository_names_its_page_and_the_login(token, model, hub, tmp_path):
    filled(hub, file_of(model, tmp_path), gated=True)
    message = refused(token=token)
    assert "is open to those whom its owner admits: ask on its page" in message and "hf auth login" in message


def test_who_may_not_write_is_told_so(model, hub):
    for token, status in ((None, "401 Unauthorized"), (READER, "403 Forbidden")):
        with pytest.raises(ConnectionError) as error:
            model.push_to_hub(NAME, token=token)
        message = str(error.value)
        assert f"{NAME} could not be uploaded to the hub (" in message and status in message and "\n" not in message
        assert "give a token that may write to it (hf auth login" in message
    assert not hub.repositories


def test_a_missing_repository_or_file_is_named(hub):
    assert f"There is no repository {NAME}" in refused(token=OWNER)
    hub.repositories[NAME] = Repository()
    assert f"{NAME} holds no model.safetensors" in refused()


def test_a_hub_in_trouble_is_named_with_its_status(hub, model):
    hub.status = 418
    assert "418" in refused() and "state of the hub" in refused()
    with pytest.raises(ConnectionError, match="418.*Look at the network"):
        model.push_to_hub(NAME, token=OWNER)


def test_files_of_others_are_refused_as_those_at_hand(model, hub, tmp_path):
    filled(hub, b"nonsense")
    assert "is no whole safetensors file" in refused(ValueError)
    filled(hub, file_of(model, tmp_path))
    with pytest.raises(ValueError, match="method 'gaussian', and HGADModel is of another: .* or GaussianModel"):
        HGADModel.from_pretrained(NAME)


def test_offline_what_was_downloaded_loads(model, hub, tmp_path, monkeypatch):
    filled(hub, file_of(model, tmp_path))
    assert "local_files_only is False; without it a model loads that was downloaded" in refused(local_files_only=True)
    GaussianModel.from_pretrained(NAME)
    asked = len(hub.requests)
    assert GaussianModel.from_pretrained(NAME, local_files_only=True).groups == model.groups
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert GaussianModel.from_pretrained(NAME).groups == model.groups
    message = refused(repo_id="acme/bolts")
    assert "HF_HUB_OFFLINE" in message and "acme/bolts" in message
    with pytest.raises(ConnectionError, match=r"acme/bolts could not be uploaded .* HF_HUB_OFFLINE"):
        model.push_to_hub("acme/bolts", token=OWNER)
    assert len(hub.requests) == asked


def test_without_a_network_it_fails_at_once_or_takes_the_download(model, hub, tmp_path, monkeypatch):
    filled(hub, file_of(model, tmp_path))
    GaussianModel.from_pretrained(NAME)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s for an unreachable hub"))
    assert GaussianModel.from_pretrained(NAME).groups == model.groups
    assert "Look at the network" in refused(repo_id="acme/bolts")
    with pytest.raises(ConnectionError, match="acme/bolts could not be uploaded to the hub"):
        model.push_to_hub("acme/bolts", token=OWNER)


def test_a_folder_comes_first_and_has_no_revisions(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / NAME / "model.safetensors")
    for folder in (NAME, tmp_path / NAME, f"./{NAME}/"):
        assert GaussianModel.from_pretrained(folder).groups == model.groups
    assert not hub.requests
    assert "a folder here, which has no revision 'v1'" in refused(ValueError, revision="v1")
    (tmp_path / NAME / "model.safetensors").unlink()
    message = refused(token=OWNER)
    assert f"There is no repository {NAME}" in message and "the folder of this name here holds none" in message


@pytest.mark.parametrize("name", ["screws", "a/b/c", "../run", "/tmp/run", "acme/ schrauben\n", "acme--x/a", ""])
def test_wrong_names_are_refused_before_anything_is_asked(name, model, hub):
    assert "is no name of a repository (owner/name" in refused(ValueError, name)
    with pytest.raises(ValueError, match="no name of a repository"):
        model.push_to_hub(name, token=OWNER)
    assert not hub.requests


def test_what_is_no_name_is_an_error(model, tmp_path):
    for call in (model.push_to_hub, GaussianModel.from_pretrained):
        with pytest.raises(ValueError, match="repo_id is None; it must be a text"):
            call(None)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a file here: hgad_fast.load reads it"):
        GaussianModel.from_pretrained(tmp_path / "model.safetensors")


def test_a_card_is_a_text_a_file_or_the_folder_of_the_training(model, hub, tmp_path, monkeypatch):
    def readme(**options: object) -> str:
        model.push_to_hub(NAME, token=OWNER, **options)
        return hub.repositories[NAME].branches["main"]["README.md"].decode()

    assert readme(card="# Mine\n") == "# Mine\n"
    (tmp_path / "card.md").write_text("# Ünsere\n", encoding="utf-8")
    assert readme(card=tmp_path / "card.md") == readme(card=str(tmp_path / "card.md")) == "# Ünsere\n"
    run = tmp_path / "run"
    model.save(run / "model.safetensors")
    (run / "run.json").write_text(json.dumps({"data": "/home/me/nuts", "date": "2026-01-02T03:04:05+00:00"}))
    monkeypatch.setattr(run_folder, "evaluate", lambda *given, **options: pytest.fail("scores test images"))
    for include_backbone in (True, False):
        card = readme(card=run, include_backbone=include_backbone)
        assert "Trained on the dataset nuts, on 2026-01-02." in card and "/home" not in card
        assert ("The file does not hold the backbone" in card) == (not include_backbone)
    edited = write_card(run).read_text(encoding="utf-8").replace("# license: ", "license: mit  # ")
    (run / "card.md").write_text(edited, encoding="utf-8")
    assert "license: mit" in edited and readme(card=run) == edited
    (run / "card.md").write_text("# of another model", encoding="utf-8")
    with pytest.raises(ValueError, match="card.md is the card of another model: write it anew"):
        readme(card=run)
    (run / "card.md").unlink()
    calibrated = GaussianModel.load(run / "model.safetensors")
    calibrated.calibration.false_alarm_rate = 0.5
    for other in (calibrated, small_detectors.gaussian(dim=4)):
        with pytest.raises(ValueError, match="whose model.safetensors is another model than the one to be uploaded"):
            other.push_to_hub(NAME, token=OWNER, card=run)
    with pytest.raises(ValueError, match="a text of several lines, a file, or the folder of a training"):
        readme(card="nowhere.md")


def test_a_model_of_features_goes_up_too(hub):
    model = small_gaussian.fitted()
    model.push_to_hub(NAME, token=OWNER)
    loaded = GaussianModel.from_pretrained(NAME)
    features = small_gaussian.class_features(3)
    assert torch.equal(loaded.score_features(features).image_score, model.score_features(features).image_score)
    assert "score_features(features)" in hub.repositories[NAME].branches["main"]["README.md"].decode()


def test_a_fresh_process_imports_the_client_late_and_takes_its_variables(model, hub, tmp_path):
    """A process of its own: what is read when the client is imported cannot be set in this one."""
    filled(hub, file_of(model, tmp_path), private=True)
    script = "import sys, hgad_fast.models.gaussian; print('huggingface_hub' in sys.modules); "
    script += f"print(hgad_fast.GaussianModel.from_pretrained({NAME!r}).groups)"
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": OWNER}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout == f"False\n{model.groups}\n", done.stderr

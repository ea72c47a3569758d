"""Profiles: read strictly, laid over the configs as the exporter would have written them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deploy import tuning
from deploy.pbtxt import parse
from deploy.server import Server, triton
from deploy.stubs import stubs_of
from deploy.tuning import DEFAULT, LEAST, PROFILES, Profile, lay_over, profile_of, read_profile
from export.config_from_contract import KNOBS, config_from_text, configs_of, text_of
from retrieval_client import Encoder, Settings
from retrieval_contract import models
from retrieval_contract.errors import DeployError
from retrieval_contract.release import Release
from tests.conftest import ROOT

PARTS = (*models.MODELS, *models.ENSEMBLES)
OTHER = {
    model: {name: LEAST[name] + at + 3 for at, name in enumerate(knobs)}
    for model, knobs in DEFAULT.models.items()
}
"""Another value for every knob."""
PLAIN = {model: dict(knobs) for model, knobs in DEFAULT.models.items()}


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_our_reader_of_configs_reads_and_writes_what_protobuf_does(
    part: models.Model, release: Release
) -> None:
    for config in configs_of(part, release, release.release_id).values():
        text = text_of(config)
        assert parse(text).text() == text


@pytest.mark.parametrize("text", ["a 1\n", "a {\n", "}\n"])
def test_what_is_no_config_of_ours_is_said(text: str) -> None:
    with pytest.raises(DeployError, match="export the release again"):
        parse(text)


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_a_profile_makes_the_configs_that_export_would(
    part: models.Model, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = configs_of(part, release, release.release_id)
    for model, knobs in OTHER.items():
        monkeypatch.setitem(KNOBS, model, knobs)
    wanted = configs_of(part, release, release.release_id)
    for name, config in plain.items():
        path = tmp_path / part.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(config))
    for profile, expected in ((Profile(OTHER), wanted), (Profile(PLAIN), plain)):
        assert lay_over(profile, tmp_path) == []
        for name, config in expected.items():
            assert config_from_text((tmp_path / part.name / name).read_text()) == config, name
    assert wanted != plain or part is models.PRODUCT_ENCODER


def test_the_default_names_every_model_and_every_knob_has_a_least_value() -> None:
    assert set(DEFAULT.models) == {part.name for part in PARTS} - {models.PRODUCT_ENCODER.name}
    assert {name for knobs in DEFAULT.models.values() for name in knobs} == set(LEAST)
    assert profile_of("default") == DEFAULT


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_profile_that_is_shipped_can_be_read_and_written(path: Path, tmp_path: Path) -> None:
    found = profile_of(path.stem)
    written = tmp_path / "written.toml"
    written.write_text(found.text())
    assert profile_of(str(written)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quer_encoder = 1", r"quer_encoder: expected one of query_cache_mb, \[query_encoder\]"),
        ("[towers]\nthreads = 1", r"towers: expected one of query_cache_mb, \[query_encoder\]"),
        ("[query_tower]\nthread = 1", "query_tower.thread: expected one of instances, threads"),
        ("[query_tokenizer]\nthreads = 1", "query_tokenizer.threads: expected one of instances, d"),
        (
            "[query_tower]\nthreads = 0",
            "query_tower.threads: expected a whole number from 1, got 0",
        ),
        ("[query_tower]\ndelay_us = true", "query_tower.delay_us: .* number from 0, got True"),
        ('query_cache_mb = "8"', "query_cache_mb: expected a whole number from 0, got '8'"),
        ("[query_tower", "expected a TOML file, got"),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(DeployError, match=rf"mine\.toml: {said}"):
        profile_of(str(path))


def test_a_name_that_is_none_says_which_there_are() -> None:
    with pytest.raises(DeployError, match=r"profile huge: expected one of default, one_core, or a"):
        profile_of("huge")


def test_flags_and_file_together() -> None:
    import argparse

    from deploy.query_cache import add_cache_flag

    parser = argparse.ArgumentParser()
    tuning.add_profile_flag(parser)
    add_cache_flag(parser)

    def said(*words: str) -> Profile | None:
        return tuning.profile_from(parser.parse_args(words))

    assert said() is None
    assert said("--profile=default") == DEFAULT
    assert said("--query-cache-mb=8") == Profile(query_cache_mb=8)
    assert said("--profile=default", "--query-cache-mb=8") == Profile(DEFAULT.models, 8)
    with pytest.raises(SystemExit):
        said("--query-cache-mb=-1")


def test_a_server_runs_as_its_profile_says(release_folder: Path, tmp_path: Path) -> None:
    """Copies are counted, the rest is read from the running server; the release is untouched."""
    path = tmp_path / "mine.toml"
    path.write_text(
        "query_cache_mb = 4\n[query_encoder]\ninstances = 2\ndelay_us = 100\n"
        "[product_preprocessor]\ninstances = 1\n[product_tower]\nthreads = 1\n"
    )
    before = {p: p.read_bytes() for p in release_folder.rglob("*.pbtxt")}
    log = (tmp_path / "log").open("w")
    with triton(release_folder, log=log, profile=profile_of(str(path))) as server:
        found = [stub.model for stub in stubs_of(server.process.pid)]
        assert found.count(models.QUERY_UNCACHED) == 2
        assert found.count(models.PRODUCT_PREPROCESSOR.name) == 1
        assert delay_of(server, models.QUERY_UNCACHED) == 100
        assert delay_of(server, models.QUERY_TOKENIZER.name) == 0
        with Encoder(Settings(triton=server.grpc_address)) as encoder:
            assert encoder.served().cached
    assert {p: p.read_bytes() for p in release_folder.rglob("*.pbtxt")} == before


def delay_of(server: Server, model: str) -> int:
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc_address) as client:
        config = client.get_model_config(model).config
    delay: int = config.dynamic_batching.max_queue_delay_microseconds
    return delay


def test_the_serve_image_lays_a_profile_over_links(release_folder: Path, tmp_path: Path) -> None:
    """By the interpreter of the image's packages: no protobuf, no client."""
    code = (
        "import sys; from pathlib import Path; from deploy import container, tuning\n"
        "profile = tuning.Profile(tuning.profile_of('one_core').models, 8)\n"
        "home, flags = container.fitted(Path(sys.argv[1]), profile)\nprint(home, *flags)\n"
    )
    done = subprocess.run(
        [ROOT / ".venv-server" / "bin" / "python", "-c", code, release_folder],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    home, flag = done.stdout.split()
    assert flag == f"--cache-config=local,size={8 * 2**20}"
    repository = Path(home) / "model_repository"
    assert tmp_path in repository.parents
    for target in models.Target:
        path = repository / models.PRODUCT_TOWER.name / "configs" / f"{target}.pbtxt"
        assert config_from_text(path.read_text()).instance_group[0].count == 1
    graph = next((repository / models.QUERY_TOWER.name).glob("*/model.onnx"))
    assert os.path.islink(graph)
    assert graph.exists()
    cached = config_from_text((repository / models.QUERY_CACHED / "config.pbtxt").read_text())
    assert cached.response_cache.enable


def test_profiles_come_with_the_code() -> None:
    assert {path.name for path in PROFILES.glob("*.toml")} == {"default.toml", "one_core.toml"}
    assert read_profile(PROFILES / "default.toml", DEFAULT.models) == DEFAULT

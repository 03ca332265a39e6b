"""The command line of every stage, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cigpose.config import preset_text
from pipelines import download, evaluate, register, render, shard, train
from pipelines.stage import stage

STAGES = {module.__name__: module for module in (download, evaluate, register, render, shard, train)}


@pytest.fixture
def made(project: Path) -> list[Any]:
    """A project with the quickstart's params.yaml; what a stage of a test's own was called with."""
    (project / "params.yaml").write_text(preset_text("quickstart"))
    return []


@pytest.mark.parametrize("name", STAGES)
def test_a_mistyped_option_is_refused_before_anything_is_done(
    name: str, made: list[Any], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mistake in ("--restrat", "--sho", "--res"):
        with pytest.raises(SystemExit) as end:
            STAGES[name].main([mistake])
        assert end.value.code == 2
        assert f"unrecognized arguments: {mistake}" in capsys.readouterr().err
    assert not (project / "data").exists() and not (project / ".runs").exists()


@pytest.mark.parametrize("name", STAGES)
def test_help_is_what_the_module_says_of_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        STAGES[name].main(["--help"])
    assert end.value.code == 0
    assert str(STAGES[name].__doc__).strip() in capsys.readouterr().out


def test_a_member_is_the_one_asked_for_else_the_one_dvc_runs(
    made: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @stage("render", member_of="data.render")
    def main(config: Any, key: str) -> None:
        made.append(key)

    monkeypatch.delenv("DVC_STAGE", raising=False)
    main(["people"])
    for named in ("render@crowd", "../dvc.yaml:render@crowd"):
        monkeypatch.setenv("DVC_STAGE", named)
        main([])
    assert made == ["people", "crowd", "crowd"]
    for named in ("shard@people", "render", ""):
        monkeypatch.setenv("DVC_STAGE", named)
        with pytest.raises(SystemExit) as end:
            main([])
        assert end.value.code == 2
        assert (
            "python -m pipelines.render: error: name one key of data.render in params.yaml." in capsys.readouterr().err
        )
    assert len(made) == 3


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("https://me:secret@host/file is no tar."), 1, "render: https://host/file is no tar.\n"),
        (FileNotFoundError("params: not there."), 1, "render: params: not there.\n"),
        (LookupError("not registered."), 1, "render: not registered.\n"),
        (KeyboardInterrupt(), 130, "render: stopped. Nothing is lost.\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_is_one_sentence_without_credentials(
    made: list[Any], capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    @stage("render", errors=(LookupError,), when_stopped="Nothing is lost.")
    def main(config: Any) -> None:
        raise error

    assert main([]) == status
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback(made: list[Any]) -> None:
    @stage("render")
    def main(config: Any) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        main([])

"""Commands that need no ranks: what they print and their exit codes."""

import pytest

from gingham.cli import main


@pytest.mark.parametrize("command", ["trace"])
def test_what_is_not_built_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--anything"]) == 2
    assert "not built yet" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "cores" in out and "BLAS" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "2.5d", "--ranks", "6"], "nearest valid"),
        (["--mode", "2d", "--grid", "2,2,1"], "exclude each other"),
        (["--grid", "2,2,1", "--ranks", "3"], "needs 4 ranks"),
        (["--text", "no such file"], "does not exist"),
    ],
)
def test_train_refuses_what_cannot_work(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_grid_must_be_three_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--grid", "2x2"])
    assert "three numbers" in capsys.readouterr().err

"""Memory that runs out before a run begins is an error with a remedy, not a bug."""

import pytest

from klippo.cli.ending import ending


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_anywhere_has_its_exit_code(error: Exception, capsys) -> None:
    @ending
    def command() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    said = capsys.readouterr().err
    assert ended.value.code == 3
    assert "the memory ran out" in said
    assert "Traceback" not in said


def test_another_error_of_the_runtime_stays_a_bug(capsys) -> None:
    @ending
    def command() -> int:
        raise RuntimeError("something else")

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 1
    assert "Traceback" in capsys.readouterr().err

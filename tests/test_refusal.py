"""How a script ends: the exit status and the one line on stderr."""

import errno
from argparse import Namespace

import pytest

from utils.refusal import Refused, run


def ending_in(error: BaseException):
    def main(args: Namespace) -> None:
        raise error

    return main


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_what_main_returns_is_the_exit_status(returned, status):
    assert run(lambda args: returned, Namespace) == status


def test_main_gets_the_parsed_arguments():
    assert run(lambda args: args.number, lambda: Namespace(number=1)) == 1


def test_refused_input_is_one_line_and_status_2(capsys):
    assert run(ending_in(Refused("first\n   second")), Namespace) == 2
    assert capsys.readouterr().err.endswith(": first second\n")


def test_a_refusal_stays_a_line_that_can_be_read_whatever_it_names(capsys):
    assert run(ending_in(Refused(f"name {'x' * 10_000_000} is too long; use a shorter one")), Namespace) == 2
    message = capsys.readouterr().err
    assert len(message) < 1100
    assert "name xxx" in message and message.endswith("is too long; use a shorter one\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_disk_that_cannot_be_written_is_one_line_and_status_2(number, capsys):
    assert run(ending_in(OSError(number, "why", "where")), Namespace) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "where" in message and "why" in message


def test_interrupt_is_status_130():
    assert run(ending_in(KeyboardInterrupt()), Namespace) == 130


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "ours"), AssertionError()])
def test_faults_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(ending_in(error), Namespace)

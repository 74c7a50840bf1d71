"""command.py: what the commands print of errors."""

import multiprocessing
import sys

import pytest

from command import report_exception


@pytest.mark.parametrize("error", [EOFError("gone"), ConnectionResetError("gone")])
def test_a_data_worker_is_silent_when_the_main_process_has_gone(error, capfd):
    def report():
        report_exception(type(error), error, None)
        sys.stderr.flush()

    worker = multiprocessing.get_context("fork").Process(target=report)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""
    report()  # in the main process it is a fault like any other
    assert "gone" in capfd.readouterr().err

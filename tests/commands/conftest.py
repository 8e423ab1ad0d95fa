"""The command line as a function."""

import pytest

from metake.commands.cli import main


@pytest.fixture
def metake(capsys):
    """Run a command; gives exit code, standard output and standard error."""

    def call(*words):
        capsys.readouterr()
        try:
            code = main(list(words))
        except SystemExit as exit:
            code = exit.code
        return (code, *capsys.readouterr())

    return call

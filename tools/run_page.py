"""Run one page at its default parameters: python tools/run_page.py notebooks/page.ipynb out.ipynb

What papermill's own command does, and for pages side by side two things more: a kernel whose port another one took
before it could (two in a thousand pairs that start in the same second) is started again, and kernels tell nothing of
their transport.
"""

import sys
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

STARTS = 3


def run(page: Path, out: Path) -> None:
    for start in range(1, STARTS + 1):
        try:
            papermill.execute_notebook(
                page, out, kernel_name="python3", cwd=page.parent, progress_bar=False,
                extra_arguments=["--log-level=ERROR"]
            )
            return
        except PapermillExecutionError as error:
            sys.exit(str(error))
        except RuntimeError as error:
            if "Kernel died before replying" not in str(error) or start == STARTS:
                raise


if __name__ == "__main__":
    try:
        run(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

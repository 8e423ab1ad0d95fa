"""Run notebooks in place at their default parameters and keep the outputs:
python tools/refresh.py [notebooks/page.ipynb ...]

As many side by side as there are cores, one thread each. No timing, no local metadata: a second run gives no difference
unless a result changed. A notebook that fails stays as it was.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {
    "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
    "METAKE_FIGURES": "figures", "METAKE_VERDICTS": "results/verdicts", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"
}

import nbformat  # noqa: E402  (the environment first: kernels inherit it)
from kernels import fork_kernels  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def refresh(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    part = path.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(path)


def told(path: Path) -> bool:
    """Whether a notebook ran; says which, and why not."""
    try:
        refresh(path)
    except Exception as error:  # of any page's code: the others go on
        print(f"{path.name} failed and stays as it was: {error}", flush=True)
        return False
    print(f"ran {path.name}", flush=True)
    return True


if __name__ == "__main__":
    fork_kernels()
    names = sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a kernel, a process of its own
        sys.exit(0 if all(list(pool.map(told, (Path(name).resolve() for name in names)))) else 1)

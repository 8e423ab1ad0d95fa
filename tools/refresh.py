"""Run notebooks in place at their default parameters and keep the outputs:
python tools/refresh.py [notebooks/page.ipynb ...]

No timing, no local metadata: a second run gives no difference unless a result changed. A notebook that fails stays as
it was.
"""

import os
import sys
from pathlib import Path

os.environ |= {
    "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
    "METAKE_FIGURES": "figures", "METAKE_VERDICTS": "results/verdicts"
}

import nbformat  # noqa: E402  (the environment first: kernels inherit it)
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


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(f"running {os.path.relpath(name)}", flush=True)
        refresh(Path(name).resolve())

# The paper's tables and figures as a grid of cells, run by an engine that others keep: book/grid.md tells how.
# What the cells are is said in metake/experiments/grid.py, which is tested there; here is only how they are run.
#
#     snakemake --profile profiles/local            everything in small, on the embedded model
#     snakemake --profile profiles/slurm paper      everything at the paper's size, on a cluster

import shlex
import sys

sys.path.insert(0, str(workflow.basedir))
from metake.experiments.grid import Grid, collect
from metake.experiments.scales import SCALES

GIVEN = {word: value for word, value in config.items() if word != "python"}
GRIDS = {name: Grid.of(name, GIVEN) for name in SCALES}
CELLS = {output: cell for grid in GRIDS.values() for output, cell in grid.cells.items()}
PYTHON = config.get("python", sys.executable)

localrules: tiny, paper, recording_tiny, recording_paper
wildcard_constraints: folder=r"runs/grid/(tiny|paper)/[^/]+/.+", done=r"summary\.json|record\.json|[^/]+\.jsonl", target=r"[^/]+"


def cell(wildcards):
    return CELLS[f"{wildcards.folder}/{wildcards.done}"]


rule tiny:
    input: list(GRIDS["tiny"].recordings)


rule paper:
    input: list(GRIDS["paper"].recordings)


# The output is the file that a cell writes last, whole: what a killed one left beside it is kept, and gone on with.
rule cell:
    input: lambda wildcards: cell(wildcards).after
    output: "{folder}/{done}"
    log: "{folder}.{done}.log"
    threads: 1
    params: words=lambda wildcards: shlex.join(cell(wildcards).words)
    resources:
        gpu=lambda wildcards: cell(wildcards).needs.gpu,
        mem_mb=lambda wildcards: cell(wildcards).needs.mem_mb,
        runtime=lambda wildcards: cell(wildcards).needs.runtime,
    shell: "{PYTHON:q} -m metake {params.words} >> {log:q} 2>&1"


for name, grid in GRIDS.items():
    rule:
        name: f"recording_{name}"
        input: lambda wildcards, grid=grid: [one.output for one in grid.recordings[f"{grid.scale.results}/{wildcards.target}.jsonl"].cells]
        output: f"{grid.scale.results}/{{target}}.jsonl"
        params: grid=name
        run:
            collect(GRIDS[params.grid], str(output))

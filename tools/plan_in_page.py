"""Record the planned targets of the page *Edit your own fact*: python tools/plan_in_page.py [--out FILE] [--limit N]

Of every request of the grid (`metake.experiments.in_the_page.pairs`) Stage I, ROME's targets and MetaKE's refinement,
which need gradients and so are not computed in a browser. About three minutes on one thread; it goes on from what FILE
holds (remove it to start anew), and a sample is made again by the tests.
"""

import argparse
from pathlib import Path

import metake as mk
from metake.experiments import in_the_page
from metake.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "results" / "edit_in_the_page.safetensors"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--limit", type=int, help="stop after so many requests of the grid")
    given = parser.parse_args()
    lm = mk.load(in_the_page.MODEL)
    statistics = mk.statistics(lm, layers=METHODS["memit"](lm.name).layers)
    requests = in_the_page.pairs(lm.tokenizer)[: given.limit]
    known = in_the_page.Plans.load(given.out) if given.out.exists() else None
    for plans in in_the_page.plan(lm, statistics, requests, known=known):
        plans.save(given.out)
        print(f"{len(plans.requests)} of {len(requests)}: {given.out}", flush=True)

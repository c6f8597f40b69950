"""One table from several output folders: python scripts/compare.py out/a out/b ..."""

import json
import sys
from pathlib import Path

import pandas as pd


def row(folder):
    """One run's line: what ran, how much trained, its main score x 100."""
    try:
        facts = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: error: {folder} holds no results of run_glue.py: {error}")
    metric = facts["main_metric"]
    split = next(name for name in facts["last"] if name.startswith("validation"))
    terms = facts["bias_terms"]
    method = facts["fine_tune_type"] + (
        f" ({', '.join(terms)})" if terms not in ([], ["all"]) else ""
    )
    return {
        "task": facts["task"],
        "method": method + " (random encoder)" * facts["random_encoder"],
        "learning rate": f"{facts['learning_rate']:g}",
        "seed": facts["seed"],
        "trained": f"{facts['trained_parameters'] / facts['all_parameters']:.2%}",
        "score": metric,
        "train": f"{100 * facts['last']['train'][metric]:.1f}",
        "validation": f"{100 * facts['last'][split][metric]:.1f}",
        "best": f"{100 * facts['best'][split][metric]:.1f} (epoch {facts['best']['epoch']})",
        "seconds": f"{sum(facts['seconds'].values()):.1f}",
    }


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(pd.DataFrame([row(folder) for folder in sys.argv[1:]]).to_string(index=False))

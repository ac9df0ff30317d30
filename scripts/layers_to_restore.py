"""Which layers of a tuned model should get the base's weights back? Prints methods for a recipe (docs/frontier.md).

    python scripts/layers_to_restore.py runs/dose --of full-5e-4 --n 5

The run must have measured importance and clustering of the model: of a point of a curve that is
`frontier: {measure: [drift, importance, clustering]}`. Printed are blends with `scale: 0` in N layers each: those
whose share of the importance changed most, those whose weights did (mean over their matrices of the change's norm over
the base's), those whose share changed least, and three random draws. Add them to the recipe and continue the run.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from palimpsest.files import UserError, read_json

RANDOM = 3  # draws


def main() -> None:
    arguments = parse_arguments()
    try:
        results = read_json(arguments.run / "results.json")
        print(as_methods(arguments.of, layers_to_restore(results, arguments.of, arguments.n)), end="")
    except UserError as error:
        sys.exit(str(error))


def layers_to_restore(results: Mapping[str, Any], of: str, n: int) -> dict[str, list[int]]:
    """Sets of `n` layers by the name of their method. results: the value of results.json."""
    try:
        base, tuned = _shares(results["layers"], "base", of)
        changes: dict[int, list[float]] = defaultdict(list)
        for row in results["delta"]:
            if row["method"] == of and row["relative_norm"] is not None:
                changes[row["layer"]].append(row["relative_norm"])
        sound = all(map(isfinite, (*base.values(), *tuned.values(), *chain(*changes.values()))))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"results.json has no tables layers and delta as a study writes them ({type(error).__name__}: {error}); "
            "continue the run, which writes it anew."
        ) from error
    if not tuned or not changes:
        raise UserError(
            f"{of} has no importance or no change of weights in this run's results.json; measure both (of a point of a "
            "curve: frontier: {measure: [drift, importance, clustering]}) and continue the run."
        )
    layers = sorted(base)
    if not sound or not layers == sorted(tuned) == sorted(changes):
        raise UserError(
            f"The layers of {of} in this run's results.json are not the base's, each with its share of the importance "
            "and a change of its weights; layers can be put back in a method that has the base's layers."
        )
    if not 0 < n <= len(layers) // 2:
        most = len(layers) // 2
        raise UserError(f"--n is {n}; of {len(layers)} layers 1 to {most} can be put back, so that others are left.")
    shifted = {layer: abs(tuned[layer] - base[layer]) for layer in layers}
    changed = {layer: fmean(values) for layer, values in changes.items()}
    return {
        "shifted": _most(shifted, n),
        "changed": _most(changed, n),
        "steady": _most({layer: -value for layer, value in shifted.items()}, n),
        **{
            f"random{seed}": sorted(np.random.default_rng(seed).choice(layers, n, replace=False).tolist())
            for seed in range(RANDOM)
        },
    }


def _shares(records: Sequence[Mapping[str, Any]], *models: str) -> list[dict[int, float]]:
    """Of each model every layer's share of the importance for text, by the first reduction that all of them have."""
    found: list[dict[str, dict[int, float]]] = [{} for _ in models]
    for row in records:
        if row["model"] in models and row["modality"] == "text" and row["kind"] == "all":
            of = found[models.index(row["model"])].setdefault(row["reduction"], {})
            of[row["layer"]] = row["share"]
    shared = next((reduction for reduction in found[0] if all(reduction in of for of in found)), "")
    return [of.get(shared, {}) for of in found]


def _most(values: Mapping[int, float], n: int) -> list[int]:
    return sorted(sorted(values, key=lambda layer: (-values[layer], layer))[:n])


def as_methods(of: str, chosen: Mapping[str, Sequence[int]]) -> str:
    """Lines of a recipe; each is a curve of its own, so that it is measured as the points of curves are."""
    return "".join(
        f"  {name}_back: {{kind: blend, of: {of}, scale: 0, layers: {list(layers)}, curve: {name}_back}}\n"
        for name, layers in chosen.items()
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory, or a folder with its results.json")
    parser.add_argument("--of", required=True, metavar="METHOD", help="the tuned model that gets layers back")
    parser.add_argument("--n", type=int, default=5, help="layers to put back (default 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

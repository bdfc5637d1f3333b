"""Causal tracing: heat maps of the average indirect effect, one for each kind of state, layers by tokens.

    python analysis/tracing.py FOLDER [--out FOLDER]

FOLDER is what `retention layers MODEL --out FOLDER` wrote. One colour scale for all three maps; where there is room,
the number stands in its cell. Writes PNG and PDF.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from retention.tracing import KINDS, POSITIONS
from retention.types import UserError

TITLE = {"residual": "residual stream", "mlp": "MLP", "attention": "attention"}
ROOM = 12  # layers up to which numbers fit into the cells


def read(folder: Path) -> tuple[pd.DataFrame, dict]:
    """The rows and what is told beside them. Raises UserError where either is missing."""
    files = [folder / "tracing.csv", folder / "tracing.json"]
    for file in files:
        if not file.is_file():
            raise UserError(f"no such file: {file}; write it with `retention layers MODEL --out {folder}`")
    rows = pd.read_csv(files[0])
    whole = rows["kind"].nunique() * rows["layer"].nunique() * rows["position"].nunique()
    if set(rows["kind"]) != set(KINDS) or len(rows) != whole:
        raise UserError(f"{files[0]}: holds {len(rows)} rows of {whole}; write it anew with `retention layers`")
    return rows, json.loads(files[1].read_text(encoding="utf-8"))


def draw(axes: Axes, rows: pd.DataFrame, positions: list[str], top: float, bottom: float) -> AxesImage:
    """One map."""
    map_ = rows.pivot(index="position", columns="layer", values="aie").loc[positions]
    values = map_.to_numpy()
    # cividis looks the same to people with any colour vision, and prints in grey.
    image = axes.imshow(values, cmap="cividis", vmin=bottom, vmax=top, aspect="auto", interpolation="nearest")
    if values.shape[1] <= ROOM:
        for (i, j), value in np.ndenumerate(values):
            light = value > (top + bottom) / 2
            text = f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color="black" if light else "white")
    layers = list(map_.columns)
    every = max(1, -(-len(layers) // ROOM))
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder written by `retention layers`")
    parser.add_argument("--out", type=Path, default=None, help="folder for the figure; left out, the same")
    args = parser.parse_args()
    rows, about = read(args.folder)
    positions = [position for position in POSITIONS if (rows["position"] == position).any()]
    n = rows.drop_duplicates("position").set_index("position")["n"]
    bottom, top = min(0.0, rows["aie"].min()), max(rows["aie"].max(), 1e-6)
    plt.rcParams.update(style.RC)
    figure, grid = plt.subplots(1, 3, figsize=(7.2, 0.9 + 0.24 * len(positions)), sharey=True, layout="constrained")
    together = about["settings"]["window"]
    for axes, kind in zip(grid, KINDS, strict=True):
        image = draw(axes, rows[rows["kind"] == kind], positions, top, bottom)
        windowed = kind != "residual" and together > 1
        axes.set_title(TITLE[kind] + (f", {together} layers around" if windowed else ""))
        axes.set_xlabel("layer")
    grid[0].set_yticks(range(len(positions)), [f"{position} (n = {n[position]})" for position in positions])
    bar = figure.colorbar(image, ax=grid, pad=0.01, aspect=12)
    bar.set_label("average indirect effect\n(difference of probability)", fontsize=7)
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{Path(about['model']).name}: {about['facts_known']} known facts, total effect {about['total_effect']:.2f}, "
        f"noise {about['settings']['noise']:g} SD, {about['settings']['samples']} samples a fact",
        fontsize=8,
    )
    for path in style.save(figure, args.out or args.folder, "tracing"):
        print(f"figure: {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"tracing: {error}")

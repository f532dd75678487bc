"""What a search may edit, before it begins: as a table in the terminal and as rows."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.models.residual_writers import PlacedWriter, matrix_shape, stored_as

COLUMNS = ("layers", "component", "writer", "d_model × inputs", "kind")


class _Alike(NamedTuple):
    """What writers of several layers have in common."""

    component: str
    name: str
    shape: tuple[int, ...]
    kind: str


def writer_rows(writers: Sequence[PlacedWriter], behind_norms: Collection[str]) -> list[dict[str, Any]]:
    """
    {"id", "component" (attn | mlp), "layers" (indices), "writer" (its path in a layer, * for numbers of experts),
    "shape" ([experts,] d_model, inputs), "n_matrices", "kind"}, equal layers in one row, in the order of the first.
    behind_norms: names of writers whose output a norm multiplies.
    """
    found: dict[_Alike, list[int]] = {}
    for each in writers:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", each.name.partition(".")[2])
        shape = matrix_shape(each.writer)
        kind = stored_as(each.writer) + (", norm behind" if each.name in behind_norms else "")
        found.setdefault(_Alike(each.component, name, shape, kind), []).append(each.layer)
    return [
        {
            "id": f"{ranges(layers)}.{alike.name}", "component": alike.component,
            "layers": sorted(set(layers)), "writer": alike.name, "shape": list(alike.shape),
            "n_matrices": len(layers) * (alike.shape[0] if len(alike.shape) == 3 else 1), "kind": alike.kind,
        }
        for alike, layers in found.items()
    ]  # fmt: skip


def ranges(layers: Sequence[int]) -> str:
    """ "0-5,8" for 0 to 5 and 8."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ",".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in found)


def print_writers(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    n_matrices = sum(row["n_matrices"] for row in rows)
    table = Table(*COLUMNS, title=f"What may be edited: {n_matrices} matrices", title_justify="left", box=SIMPLE_HEAD)
    for row in rows:
        # Text, not markup: a module's name is data.
        cells = (
            ranges(row["layers"]),
            row["component"],
            row["writer"],
            " × ".join(map(str, row["shape"])),
            row["kind"],
        )
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console.print(table)

"""The table of what may be edited."""

import io

from rich.console import Console

from src.abliteration.writers_table import print_writers, ranges, writer_rows
from src.models.post_norms import gains_behind
from src.models.residual_writers import matrix, matrix_shape, residual_writers
from tests.tiny_layouts import WRITABLE, layout


def test_equal_layers_are_one_row() -> None:
    model = layout("lfm2_moe", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
    rows = writer_rows(residual_writers(model), ())
    assert [(row["layers"], row["component"], row["writer"], row["shape"], row["kind"]) for row in rows] == [
        ([0, 2], "attn", "conv.out_proj", [32, 32], "dense"),
        ([0], "mlp", "feed_forward.w2", rows[1]["shape"], "dense"),
        ([1, 3], "attn", "self_attn.out_proj", [32, 32], "dense"),
        ([1, 2, 3], "mlp", "feed_forward.experts.down_proj", [4, 32, 16], "4 fused experts"),
    ]
    assert [row["n_matrices"] for row in rows] == [2, 1, 2, 12]
    assert len({row["id"] for row in rows}) == len(rows)
    printed = io.StringIO()
    print_writers(rows, Console(file=printed, width=80))
    assert "17 matrices" in printed.getvalue() and "1-3" in printed.getvalue() and "4 × 32 × 16" in printed.getvalue()


def test_norms_behind_writers_are_named() -> None:
    model = layout("glm4")
    writers = residual_writers(model)
    assert {row["kind"] for row in writer_rows(writers, gains_behind(model, writers))} == {"dense, norm behind"}


def test_shapes_are_those_of_the_matrices() -> None:
    for name in WRITABLE:
        for each in residual_writers(layout(name)):
            assert matrix_shape(each.writer) == tuple(matrix(each.writer).shape), (name, each.name)


def test_ranges_of_layers() -> None:
    assert ranges([3, 1, 2, 2, 8]) == "1-3,8" and ranges([0]) == "0"

"""Names of results: distinct in any case, and those of their pictures where they can be."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.serve.files import output_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("x.jpg y.png", "x y"),
        ("x.jpg x.png", "x x_png"),
        ("a/x.jpg b/x.jpg", "x b_x"),
        ("a/x.jpg a/x.png b/x.jpg b/x.png", "x x_png b_x b_x_png"),
        ("x.jpg x.png x_png.gif", "x x_png x_png_gif"),
        ("b_x.jpg a/x.jpg b/x.jpg", "b_x x b_x_jpg"),
        ("r/a/x.jpg s/a/x.jpg t/a/x.jpg", "x a_x a_x_jpg"),
        ("X.jpg x.jpg", "X x_jpg"),
        ("/a/x.jpg /x.jpg ../x.jpg", "x x_jpg_2 x_jpg_3"),
        ("x.jpg x.jpg x.jpg", "x x_jpg x_jpg_2"),
        ("x.tar.png x.tar.jpg", "x.tar x_tar_jpg"),
    ],
)
def test_output_names(paths: str, names: str) -> None:
    assert output_names([Path(path) for path in paths.split()]) == names.split()


@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["", "a/", "b/", "a/b/", "/", "../", "A/"]),
            st.sampled_from(["x", "X", "a_x", "x_jpg", "b_a_x", "x_jpg_2"]),
            st.sampled_from([".jpg", ".png", ".JPG", ""]),
        ),
        max_size=24,
    )
)
def test_output_names_are_distinct_in_any_case(paths: list[str]) -> None:
    names = output_names([Path(path) for path in paths])
    assert len({name.casefold() for name in names}) == len(paths)
    assert not any("/" in name or name.startswith(".") for name in names)
    if paths:
        assert names[0] == Path(paths[0]).stem

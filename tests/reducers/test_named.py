"""Reducers by their names: what is written is what is read."""

import pytest

from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.exits import Exits
from tokenstep.reducers.named import REDUCERS, reducer_of, text_of
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe


@pytest.mark.parametrize(
    ("text", "reducer"),
    [
        ("tome:share=0.1", ToMe(share=0.1)),
        ("tome:r=13", ToMe(r=13)),
        ("evit", EViT()),
        ("evit:keep=0.5,blocks=[2,4],fuse=false", EViT(0.5, (2, 4), fuse=False)),
        ("random:share=0.3,seed=4", RandomDrop(0.3, seed=4)),
        ("exits:thresholds=[1,0.9],spare=2", Exits((1.0, 0.9), spare=2)),
    ],
)
def test_a_text_names_a_reducer(text: str, reducer: Reducer | Exits) -> None:
    assert reducer_of(text) == reducer
    assert reducer_of(text_of(reducer)) == reducer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tom", "choose from exits, tome, evit, .*random"),
        ("tome:share", "KEY=VALUE"),
        ("tome:shares=0.1", "shares"),
        ("tome:share=0.9", "0 to 0.5"),
        ("tome", "share"),
        ("evit:keep='much'", "keep"),
        ("evit:blocks=[0]", "blocks"),
        ("random:share=1.0", "share"),
        ("exits:thresholds=[2.0]", "0 to 1"),
        ("random:seed=99999999999999999999", "seed"),
        ("evit:blocks=[]", "blocks"),
        ("evit:keep=0.5 }\nx={y=1", "KEY=VALUE"),
    ],
)
def test_a_wrong_text_is_one_line_that_says_what_to_give(text: str, said: str) -> None:
    with pytest.raises(TokenstepError, match=said) as caught:
        reducer_of(text)
    assert "\n" not in str(caught.value)


def test_every_name_is_a_frozen_dataclass() -> None:
    for kind in REDUCERS.values():
        assert kind.__dataclass_params__.frozen

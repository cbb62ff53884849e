"""Where tokens go, in one picture or a labelled folder, and the report of it.

`picture` segments a picture and makes its tables. `folder_sums` adds up a labelled folder, and
`folder` makes its tables. `maps` draws maps and `plots` draws tables. `sections` lists what a
report consists of, and `report` writes it as one page.
"""

"""Where tokens go: views of one picture, sums over a labelled folder, and the report of both.

`views` looks at a picture, `sums` and `folder` at a labelled set; `figures` draws maps and `plots`
rows of tables; `sections` says what a report consists of and `report` writes it as one page.
"""

"""Where tokens go, in one picture or a labelled folder, and the report of it.

`views` segments a picture and makes its tables. `sums` adds up a labelled folder, and `folder`
makes its tables. `figures` draws maps and `plots` draws tables. `sections` lists what a report
consists of, and `report` writes it as one page.
"""

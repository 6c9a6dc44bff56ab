"""`twilight report`: what many runs found, as one table, pictures and one page.

Data moves one way: `collect` reads files, `settings` says which runs may share a curve, `table` puts dense beside
sparse and flags what looks too good, `points` pools rows into points, `quality`, `maps` and `speed` draw them, `page`
shows all of it.
"""

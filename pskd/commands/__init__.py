"""The commands of `pskd`, one a module: `add_arguments(parser)` and `run(arguments)`. What `index`
does is long, and lies in `indexing`.

What takes long to import waits until a command line is accepted.
"""

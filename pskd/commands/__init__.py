"""The commands of `pskd`, one a module: `add_arguments(parser)` and `run(arguments)`.

What takes long to import waits until a command line is accepted.
"""

# SPDX-License-Identifier: Apache-2.0
"""The command line: `main.py` dispatches to one module per command.

A command is a module of this package with a docstring (its help; the first line is the summary),
`add_arguments(parser)` and `run(args)`, which returns None and raises an error on failure. To add a command, add its
module and list it in :data:`samda.cli.main.COMMANDS`. Imports of torch belong inside `run`, to keep `samda --help`
fast.
"""

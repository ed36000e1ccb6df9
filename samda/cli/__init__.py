# SPDX-License-Identifier: Apache-2.0
"""The command line: `main.py` finds the command, one file a command does the rest.

A command is a module of this package with a docstring (its help; the first line is the summary),
`add_arguments(parser)` and `run(args)`, which returns nothing and raises where it fails. To add one, write its file
and name it in :data:`samda.cli.main.COMMANDS`. Heavy imports belong inside `run`: `samda --help` must not wait for
torch.
"""

# SPDX-License-Identifier: Apache-2.0
"""`python -m samda` is the command `samda`."""

from samda.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

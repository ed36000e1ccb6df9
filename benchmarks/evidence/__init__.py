# SPDX-License-Identifier: Apache-2.0
"""Evidence that can be run again; `python -m benchmarks.evidence` from the root of the repository."""

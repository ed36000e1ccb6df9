# SPDX-License-Identifier: Apache-2.0
"""Networks: images to class logits."""

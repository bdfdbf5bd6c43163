# SPDX-License-Identifier: Apache-2.0
"""Ways in from other libraries, one file per library. Nothing here is imported before its library is."""
